"""The model's ranking compared with the compiler's, if a search compiled every layout (`--search --compile-all`).

The compiler's time of a layout is its own cycles for matmuls and memory traffic and the transfers of its program, with
the attention kernel's modelled cycles, which both share. Its memory is its own. The correlation of ranks is Spearman's.
"""

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from jaxcoder.config.mesh import SLICE_AXIS
from jaxcoder.formatting import format_bytes, format_table
from jaxcoder.plan.make import Plan, make_plan
from jaxcoder.train.dry_run import row

FIRST = 3
"""So many of the model's first should contain the best."""


def lines_of_ranking(compiled: Sequence[Plan]) -> Iterator[str]:
    """compiled: every layout that was compiled, those that do not fit too."""
    judged = [(make_plan(plan.config, plan.topology, None).fits, plan) for plan in compiled]
    fitting = sorted((plan for plan in compiled if plan.fits), key=lambda plan: plan.modelled.expected)
    yield from row("ranking", f"{len(compiled):,} layouts compiled, {len(fitting):,} fit")
    if len(fitting) > 1:
        yield from row("", _order(fitting))
        off = [plan.modelled.expected / plan.compilers_time.expected for plan in fitting]
        yield from row("", f"modelled over compiled time: {_spread(off)}")
    off = [plan.estimate.total * plan.topology.chip.devices_per_chip / plan.peak_bytes for plan in compiled
           if plan.peak_bytes]  # fmt: skip
    if off:
        yield from row("", f"estimated over compiled memory: {_spread(off)}")
    for said, fits in (("judged to fit, but does not", False), ("judged not to fit, but does", True)):
        wrong = [plan for judged_to_fit, plan in judged if plan.fits == fits and judged_to_fit != fits]
        yield from row("", f"{said}: {len(wrong)}")
        for plan in wrong:
            yield from row("", f"  {layout_of(plan)}: {_memory(plan)}")
    yield ""
    by_compiler = sorted(fitting, key=lambda plan: plan.compilers_time.expected)
    table = [
        [
            place + 1, by_compiler.index(plan) + 1, layout_of(plan), f"{plan.modelled.expected:.3f}",
            f"{plan.compilers_time.expected:.3f}", format_bytes(_estimate(plan)), format_bytes(plan.peak_bytes),
        ]
        for place, plan in enumerate(fitting)
    ]  # fmt: skip
    columns = ["model's", "compiler's", "layout", "s modelled", "compiled", "memory modelled", "compiled"]
    yield from format_table(columns, table).splitlines()


def _order(fitting: Sequence[Plan]) -> str:
    """fitting: in the model's order."""
    times = [plan.compilers_time.expected for plan in fitting]
    place, loss = int(np.argmin(times)), min(times[:FIRST]) / min(times) - 1
    contain = "contain" if place < FIRST else "do not contain"
    return (
        f"correlation of ranks of modelled and compiled times {rank_correlation(fitting):.2f}; the model's first "
        f"{min(FIRST, len(times))} {contain} the compiler's best (the model's number {place + 1}); the best of them is "
        f"{loss:.1%} slower than it"
    )


def rank_correlation(plans: Sequence[Plan]) -> float:
    """Spearman's, of modelled and compiled times."""
    return spearman([plan.modelled.expected for plan in plans], [plan.compilers_time.expected for plan in plans])


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs; nan where all of one are equal."""
    ranks = [_ranks(np.asarray(values, float)) for values in (first, second)]
    centred = [r - r.mean() for r in ranks]
    norms = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / norms) if norms else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2


def _spread(factors: Sequence[float]) -> str:
    return f"{min(factors):.2f} to {max(factors):.2f}, median {median(factors):.2f}"


def _estimate(plan: Plan) -> int:
    return plan.estimate.total * plan.topology.chip.devices_per_chip


def _memory(plan: Plan) -> str:
    said = "more than there is" if plan.peak_bytes is None else format_bytes(plan.peak_bytes)
    return f"estimated {format_bytes(_estimate(plan))}, compiled {said}, of {format_bytes(plan.memory_of_chip)}"


def layout_of(plan: Plan) -> str:
    """As options of `jaxcoder train`."""
    mesh, micro = plan.config.mesh, plan.config.microbatch_size
    sizes = " ".join(f"--mesh.{axis} {size}" for axis, size in mesh.sizes.items() if size > 1 or axis != SLICE_AXIS)
    size = f"--microbatch-size {micro} " if micro is not None else ""
    remat = plan.config.compute.remat
    return f"{sizes} {size}--compute.remat {remat}"
