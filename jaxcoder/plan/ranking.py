"""The model's ranking of layouts compared with the compiler's (`--search --compile-all`).

The compiler's step time is its estimated cycles of matmuls and memory traffic plus the transfers of its program;
attention is modelled in both rankings.
"""

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from jaxcoder.config.mesh import SLICE_AXIS
from jaxcoder.formatting import format_bytes, format_table
from jaxcoder.plan.make import Plan, make_plan
from jaxcoder.train.dry_run import row

FIRST = 3
"""The model's first layouts that are checked for the compiler's best."""


def lines_of_ranking(compiled: Sequence[Plan]) -> Iterator[str]:
    """compiled: all layouts that were compiled, including those that do not fit."""
    fitting = sorted((plan for plan in compiled if plan.fits), key=lambda plan: plan.modelled.expected)
    times = [plan.compiler_time.expected for plan in fitting]
    yield from row("ranking", f"{len(compiled):,} layouts compiled, {len(fitting):,} fit")
    if len(fitting) > 1:
        modelled = [plan.modelled.expected for plan in fitting]
        best, loss = int(np.argmin(times)), min(times[:FIRST]) / min(times) - 1
        yield from row(
            "",
            f"rank correlation of modelled and compiled times {spearman(modelled, times):.2f}; the model's first "
            f"{min(FIRST, len(times))} {'contain' if best < FIRST else 'do not contain'} the compiler's best (the "
            f"model's number {best + 1}); the best of them is {loss:.1%} slower than it",
        )
        yield from row(
            "", f"modelled over compiled time: {_spread([m / t for m, t in zip(modelled, times, strict=True)])}"
        )
    ratios = [plan.estimated_bytes / plan.peak_bytes for plan in compiled if plan.peak_bytes]
    if ratios:
        yield from row("", f"estimated over compiled memory: {_spread(ratios)}")
    predicted = [(make_plan(plan.config, plan.topology, None).fits, plan) for plan in compiled]
    for label, fits in (("predicted to fit, but does not", False), ("predicted not to fit, but does", True)):
        wrong = [plan for predicted_fit, plan in predicted if plan.fits == fits and predicted_fit != fits]
        yield from row("", f"{label}: {len(wrong)}")
        for plan in wrong:
            yield from row(
                "",
                f"  {layout_of(plan)}: estimated {format_bytes(plan.estimated_bytes)}, compiled {peak_memory(plan)}, "
                f"of {format_bytes(plan.chip_memory)}",
            )
    yield ""
    table = [
        [
            number, sorted(times).index(compiled_time) + 1, layout_of(plan), f"{plan.modelled.expected:.3f}",
            f"{compiled_time:.3f}", format_bytes(plan.estimated_bytes), peak_memory(plan),
        ]
        for number, (plan, compiled_time) in enumerate(zip(fitting, times, strict=True), 1)
    ]  # fmt: skip
    columns = ["model's", "compiler's", "layout", "s modelled", "compiled", "memory modelled", "compiled"]
    yield from format_table(columns, table).splitlines()


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share their mean rank. nan if all values of one are equal."""
    ranks = [_ranks(np.asarray(values, float)) for values in (first, second)]
    centred = [r - r.mean() for r in ranks]
    norms = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / norms) if norms else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2


def _spread(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f}"


def peak_memory(plan: Plan) -> str:
    """Per chip; the compiler may refuse a program without a figure."""
    return "more than available" if plan.peak_bytes is None else format_bytes(plan.peak_bytes)


def layout_of(plan: Plan) -> str:
    """The layout as options of `jaxcoder train`."""
    mesh, microbatch = plan.config.mesh, plan.config.microbatch_size
    sizes = [f"--mesh.{axis} {size}" for axis, size in mesh.sizes.items() if size > 1 or axis != SLICE_AXIS]
    if microbatch is not None:
        sizes.append(f"--microbatch-size {microbatch}")
    return " ".join([*sizes, f"--compute.remat {plan.config.compute.remat}"])
