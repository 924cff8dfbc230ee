"""Search for the fastest layout of a run on a topology: mesh x microbatch x remat policy.

The model ranks thousands of layouts in a second, a compile takes minutes: the first of the ranking are compiled until a
few fit or the time limit is reached.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from jaxcoder.config import MeshConfig, RunConfig
from jaxcoder.config.mesh import MESH_AXES, SLICE_AXIS, DimRules
from jaxcoder.config.validate import validate
from jaxcoder.errors import ConfigError, JaxcoderError
from jaxcoder.formatting import format_bytes, format_duration, format_table
from jaxcoder.plan.make import MOST_SHARDS, CompileOne, Plan, make_plan, prepare
from jaxcoder.plan.ranking import layout_of, lines_of_ranking, peak_memory
from jaxcoder.plan.report import as_dict, lines_of
from jaxcoder.plan.topology import Topology
from jaxcoder.train.dry_run import row

logger = logging.getLogger(__name__)

MOST_WINDOWS = 16  # per batch shard in a microbatch
COMPILED = 3  # compiled layouts that fit, after which the search stops
MARGIN = 1.15  # largest estimated memory relative to the chip's: the estimate may be too high
SHOWN = 12  # rows of the table


@dataclass(frozen=True, kw_only=True)
class Search:
    topology: Topology
    candidates: int
    """Number of valid layouts."""
    ranked: list[Plan]
    """Modelled plans of the layouts that should fit, fastest first."""
    compiled: list[Plan] = field(default_factory=list)
    """In the order of `ranked`."""
    out_of_time: bool = False
    failures: list[str] = field(default_factory=list)
    compile_all: bool = False

    @property
    def best(self) -> Plan | None:
        """The fastest that fits, among the compiled ones if there are any."""
        fitting = [plan for plan in self.compiled or self.ranked if plan.fits]
        return min(fitting, key=lambda plan: plan.compiler_time.expected, default=None)


def search(
    config: RunConfig,
    topology: Topology,
    compile_one: CompileOne | None,
    *,
    minutes: float,
    compile_all: bool = False,
) -> Search:
    """Varies the mesh, microbatch and remat policy of config. ConfigError if no layout is valid.

    compile_one: None to rank without compiling. minutes: for compiling. compile_all: compile every layout, those that
    should not fit last, to evaluate the ranking.
    """
    plans = [make_plan(candidate, topology, None) for candidate in candidates(config, topology)]
    if not plans:
        prepare(config, topology)  # raises if the problem is not the mesh
        raise ConfigError(
            f"no mesh of powers of two divides the {config.global_batch_size:,} windows and the heads of {config.name} "
            f"over the {topology.devices:,} devices of {topology}: change --global-batch-size."
        )
    likely = [plan for plan in plans if plan.estimated_bytes <= MARGIN * plan.chip_memory]
    ranked = sorted(likely, key=lambda plan: (plan.time.expected, plan.estimated_bytes))
    which = "nothing is compiled" if compile_one is None else f"{'all' if compile_all else 'the best'} are compiled"
    logger.info(f"{len(plans):,} layouts, {len(ranked):,} of which should fit; {which}.")
    found = Search(topology=topology, candidates=len(plans), ranked=ranked, compile_all=compile_all)
    if compile_one is None:
        return found
    to_compile = ranked
    if compile_all:
        unlikely = [plan for plan in plans if plan.estimated_bytes > MARGIN * plan.chip_memory]
        to_compile = ranked + sorted(unlikely, key=lambda plan: plan.estimated_bytes)
    deadline = time.monotonic() + 60 * minutes
    for plan in to_compile:
        is_done = sum(done.fits for done in found.compiled) >= COMPILED or len(found.failures) >= COMPILED
        if is_done and not compile_all:
            break
        if time.monotonic() >= deadline:
            return replace(found, out_of_time=True)
        try:
            done = make_plan(plan.config, topology, compile_one(plan.config, topology))
        except JaxcoderError as error:
            found.failures.append(f"{layout_of(plan)}: {error}")
            continue
        found.compiled.append(done)
        fits = f"fits, {done.time.expected:.3f} s a step" if done.fits else "does not fit"
        logger.info(f"{layout_of(done)}: {fits}")
    return found


def candidates(config: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    """All valid layouts of the run on the topology."""
    for mesh in meshes(config.mesh, topology):
        shards = DimRules().shards("batch", mesh)
        for micro in (windows * shards for windows in _powers(1, MOST_WINDOWS)):
            if config.global_batch_size % micro:
                continue
            size = None if micro == config.global_batch_size else micro
            for remat in ("none", "minimal", "offload", "block"):
                if remat == "offload" and topology.chip.host_bandwidth is None:
                    continue
                compute = replace(config.compute, remat=remat)
                candidate = replace(config, mesh=mesh, microbatch_size=size, compute=compute)
                try:
                    validate(candidate, topology.devices)
                except ConfigError:
                    continue
                yield candidate


def meshes(mesh: MeshConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Meshes of the topology's devices: powers of two, with the remaining devices on the axis that shards weights."""
    (weights,) = DimRules().of("embed")
    free = [axis for axis in MESH_AXES if axis != weights]
    ranges = {axis: list(_powers(1, MOST_SHARDS)) for axis in free}
    ranges[SLICE_AXIS] = list(_powers(topology.num_slices, topology.devices))
    for sizes in itertools.product(*(ranges[axis] for axis in free)):
        left, rest = divmod(topology.devices, math.prod(sizes))
        if not rest:
            yield replace(mesh, **dict(zip(free, sizes, strict=True)), **{weights: left})


def _powers(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def lines_of_search(found: Search) -> Iterator[str]:
    """The ranking, the model's error, and the plan of the best layout."""
    yield f"{found.candidates:,} layouts on {found.topology}; {len(found.ranked):,} should fit by the model:"
    yield ""
    table = [
        [
            str(number), layout_of(plan), f"{plan.time.expected:.3f}",
            format_bytes(plan.estimated_bytes) + ("" if plan.fits else " (more than available)"),
        ]
        for number, plan in enumerate(found.ranked[:SHOWN], 1)
    ]  # fmt: skip
    yield from format_table(["", "layout", "s a step", "memory a chip"], table).splitlines()
    if found.compiled and found.compile_all:
        yield ""
        yield from lines_of_ranking(found.compiled)
    elif found.compiled:
        yield ""
        yield "Compiled:"
        yield ""
        columns = ["layout", "fits", "s a step", "modelled", "by cycles", "memory", "modelled", "compile"]
        yield from format_table(columns, [_compiled_row(plan) for plan in found.compiled]).splitlines()
        yield ""
        yield from row("model", accuracy(found))
    for failure in found.failures:
        yield from row("not compiled", failure)
    if found.out_of_time:
        yield from row("stopped", "the time limit was reached before more was compiled: --minutes allows more")
    yield ""
    if found.best is None:
        yield from row("verdict", f"no layout of this run fits on {found.topology}: take more chips, or larger ones.")
        return
    yield from row("best", layout_of(found.best))
    yield ""
    yield from lines_of(found.best)


def _compiled_row(plan: Plan) -> list[str]:
    return [
        layout_of(plan),
        "yes" if plan.fits else "no",
        f"{plan.time.expected:.3f}" if plan.fits else "-",
        f"{plan.modelled.expected:.3f}",
        f"{plan.compiler_time.expected:.3f}" if plan.fits else "-",
        peak_memory(plan),
        format_bytes(plan.estimated_bytes),
        format_duration(plan.compiled.compile_seconds) if plan.compiled else "-",
    ]


def accuracy(found: Search) -> str:
    """The model's figures relative to the compiler's, and whether the order is the same."""
    fitting = [plan for plan in found.compiled if plan.fits]
    memory = [plan.estimated_bytes / plan.peak_bytes for plan in found.compiled if plan.peak_bytes]
    times = [plan.modelled.expected / plan.time.expected for plan in fitting]
    parts = []
    if memory:
        parts.append(f"its memory was {min(memory):.2f} to {max(memory):.2f} of the compiler's")
    if times:
        parts.append(f"its time {min(times):.2f} to {max(times):.2f} of that with the compiler's FLOPs and transfers")
    if len(fitting) > 1:
        is_same = fitting == sorted(fitting, key=lambda plan: plan.compiler_time.expected)
        parts.append(f"the compiled layouts are in {'the same' if is_same else 'another'} order")
    return "; ".join(parts) or "nothing that was compiled fits"


def search_json(found: Search) -> str:
    plain = {
        "topology": str(found.topology),
        "candidates": found.candidates,
        "ranked": [
            {"layout": layout_of(plan), "seconds": plan.time.expected, "bytes_per_chip": plan.peak_bytes}
            for plan in found.ranked
        ],
        "compiled": [
            as_dict(plan) | {"layout": layout_of(plan), "compilers_seconds": plan.compiler_time.expected}
            for plan in found.compiled
        ],
        "accuracy": accuracy(found),
        "best": None if found.best is None else layout_of(found.best),
    }
    return json.dumps(plain, indent=1) + "\n"
