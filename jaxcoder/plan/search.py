"""The best way to lay a run out on a topology: meshes x microbatches x remat policies, ranked by the model, the best
compiled.

The model ranks thousands of layouts in a second; a compile takes minutes. So what the model puts first is compiled,
until a few fit or the time is up, and the answer says how far the model was off.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jaxcoder.config import MeshConfig, RunConfig
from jaxcoder.config.mesh import MESH_AXES, SLICE_AXIS, DimRules
from jaxcoder.config.validate import validate
from jaxcoder.errors import ConfigError, JaxcoderError
from jaxcoder.formatting import format_bytes, format_duration, format_table
from jaxcoder.plan.make import COMPILE, MOST_SHARDS, Plan, make_plan, prepare
from jaxcoder.plan.ranking import layout_of, lines_of_ranking
from jaxcoder.plan.report import as_dict, lines_of
from jaxcoder.plan.topology import Topology
from jaxcoder.train.dry_run import row

logger = logging.getLogger(__name__)

MOST_WINDOWS = 16
"""Of one shard of the batch at a time."""
COMPILED = 3
"""Layouts that are compiled, those that do not fit not counted."""
MARGIN = 1.15
"""Layouts whose estimate is above the memory by no more than this are compiled too: it may be too high."""
SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Search:
    topology: Topology
    candidates: int
    """Layouts that can be built."""
    ranked: list[Plan]
    """Those that should fit, by the model alone, fastest first."""
    compiled: list[Plan]
    """Those that were compiled, in the order of the model."""
    out_of_time: bool
    failures: list[str]
    compile_all: bool = False

    @property
    def best(self) -> Plan | None:
        """The fastest that fits, of the compiled ones where any was compiled."""
        fitting = [plan for plan in self.compiled or self.ranked if plan.fits]
        return min(fitting, key=lambda plan: plan.compilers_time.expected, default=None)


def search(
    config: RunConfig,
    topology: Topology,
    compile_one: COMPILE | None,
    *,
    minutes: float,
    compile_all: bool = False,
) -> Search:
    """Of config the mesh, microbatch and remat are free. compile_one: None ranks without compiling. ConfigError where
    nothing can be built.

    compile_all: not the first that fit but all, those that should not fit last, to judge the ranking.
    """
    plans = [make_plan(candidate, topology, None) for candidate in candidates(config, topology)]
    if not plans:
        prepare(config, topology)  # says what is wrong, if it is not the mesh
        raise ConfigError(
            f"no mesh of powers of two divides the {config.global_batch_size:,} windows and the heads of {config.name} "
            f"over the {topology.devices:,} devices of {topology}: change --global-batch-size."
        )
    likely = [plan for plan in plans if plan.peak_bytes <= MARGIN * plan.memory_of_chip]
    ranked = sorted(likely, key=lambda plan: (plan.time.expected, plan.peak_bytes))
    which = "nothing is compiled" if compile_one is None else "all are compiled" if compile_all else (
        "the best of these are compiled"
    )  # fmt: skip
    logger.info(f"{len(plans):,} layouts, {len(ranked):,} of which should fit; {which}.")
    unlikely = [plan for plan in plans if plan.peak_bytes > MARGIN * plan.memory_of_chip]
    to_compile = ranked + sorted(unlikely, key=lambda plan: plan.peak_bytes) if compile_all else ranked
    compiled: list[Plan] = []
    failures: list[str] = []
    end, out_of_time = time.monotonic() + 60 * minutes, False
    for plan in to_compile if compile_one is not None else []:
        if not compile_all and sum(done.fits for done in compiled) >= COMPILED:
            break
        if time.monotonic() >= end:
            out_of_time = True
            break
        try:
            done = make_plan(plan.config, topology, compile_one(plan.config, topology))
        except JaxcoderError as error:
            failures.append(f"{layout_of(plan)}: {error}")
            if not compile_all and len(failures) >= COMPILED:
                break
            continue
        compiled.append(done)
        how = f"fits, {done.time.expected:.3f} s a step" if done.fits else "does not fit"
        logger.info(f"{layout_of(done)}: {how}")
    return Search(
        topology=topology, candidates=len(plans), ranked=ranked, compiled=compiled, out_of_time=out_of_time,
        failures=failures, compile_all=compile_all,
    )  # fmt: skip


def candidates(config: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    """Every layout of the run that can be built on the topology."""
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
    """Meshes on the topology's devices: powers of two, and the axis that shards weights takes what they leave."""
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
    """The ranking, how far the model was off, and the plan of the best."""
    yield f"{found.candidates:,} layouts on {found.topology}; {len(found.ranked):,} should fit by the model:"
    yield ""
    table = [
        [
            str(place + 1),
            layout_of(plan),
            f"{plan.time.expected:.3f}",
            format_bytes(plan.peak_bytes) + ("" if plan.fits else " (more than there is)"),
        ]
        for place, plan in enumerate(found.ranked[:SHOWN])
    ]
    yield from format_table(["", "layout", "s a step", "memory a chip"], table).splitlines()
    if found.compiled and found.compile_all:
        yield ""
        yield from lines_of_ranking(found.compiled)
    elif found.compiled:
        yield ""
        yield "Compiled:"
        yield ""
        yield from format_table(
            ["layout", "fits", "s a step", "by the model", "its cycles", "memory", "by the model", "compile"],
            [_compared(plan) for plan in found.compiled],
        ).splitlines()
        yield ""
        yield from row("model", accuracy(found))
    for failure in found.failures:
        yield from row("not compiled", failure)
    if found.out_of_time:
        yield from row("stopped", "the time was up before more could be compiled: --minutes allows more")
    yield ""
    if found.best is None:
        yield from row("verdict", f"no layout of this run fits on {found.topology}: take more chips, or larger ones.")
        return
    yield from row("best", layout_of(found.best))
    yield ""
    yield from lines_of(found.best)


def _compared(plan: Plan) -> list[str]:
    estimated = plan.estimate.total * plan.topology.chip.devices_per_chip
    return [
        layout_of(plan),
        "yes" if plan.fits else "no",
        f"{plan.time.expected:.3f}" if plan.fits else "-",
        f"{plan.modelled.expected:.3f}",
        f"{plan.compilers_time.expected:.3f}" if plan.fits else "-",
        "-" if plan.peak_bytes is None else format_bytes(plan.peak_bytes),
        format_bytes(estimated),
        format_duration(plan.compiled.compile_seconds),
    ]


def accuracy(found: Search) -> str:
    """How far the model was from what was compiled, and whether its order held."""
    said = []
    memory = [
        plan.estimate.total * plan.topology.chip.devices_per_chip / plan.peak_bytes
        for plan in found.compiled
        if plan.peak_bytes
    ]
    times = [plan.modelled.expected / plan.time.expected for plan in found.compiled if plan.fits]
    if memory:
        said.append(f"its memory was {min(memory):.2f} to {max(memory):.2f} of the compiler's")
    if times:
        said.append(f"its time {min(times):.2f} to {max(times):.2f} of that with the compiler's FLOPs and transfers")
    fitting = [plan for plan in found.compiled if plan.fits]
    if len(fitting) > 1:
        held = fitting == sorted(fitting, key=lambda plan: plan.compilers_time.expected)
        said.append("the compiled ones keep its order" if held else "the compiled ones are in another order")
    return "; ".join(said) or "nothing that was compiled fits"


def search_json(found: Search) -> str:
    plain = {
        "topology": str(found.topology),
        "candidates": found.candidates,
        "ranked": [
            {"layout": layout_of(plan), "seconds": plan.time.expected, "bytes_per_chip": plan.peak_bytes}
            for plan in found.ranked
        ],
        "compiled": [
            as_dict(plan) | {"layout": layout_of(plan), "compilers_seconds": plan.compilers_time.expected}
            for plan in found.compiled
        ],
        "accuracy": accuracy(found),
        "best": None if found.best is None else layout_of(found.best),
    }
    return json.dumps(plain, indent=1) + "\n"
