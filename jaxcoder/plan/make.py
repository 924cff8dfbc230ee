"""A plan: one run on one topology, sized, compiled and timed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from jaxcoder.config import MeshConfig, RunConfig
from jaxcoder.config.mesh import DimRules, resolve_mesh, slice_problem
from jaxcoder.config.validate import validate
from jaxcoder.errors import ConfigError
from jaxcoder.kernels.attention.blocks_tpu import has_kernels
from jaxcoder.models.flops import num_parameters, training_flops_per_token
from jaxcoder.plan.calibration import Calibration, calibration
from jaxcoder.plan.compile import Compiled, compile_step
from jaxcoder.plan.time_model import LINK, StepTime, axis_bandwidths, step_time
from jaxcoder.plan.topology import Topology
from jaxcoder.plan.workload import DecoderShape, Layout, Work, work_of
from jaxcoder.train.dry_run import num_samples
from jaxcoder.train.memory_estimate import MemoryEstimate, estimate_memory, shards_of

MOST_SHARDS = 16
"""Most devices of a mesh axis that shards heads, MLP or sequence: its transfers lie between matmuls."""

COMPILE = Callable[[RunConfig, Topology], Compiled]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run on a topology. Without `compiled` everything is the model's."""

    config: RunConfig
    """Its mesh is filled in."""
    topology: Topology
    compiled: Compiled | None
    estimate: MemoryEstimate
    work: Work
    """By formula."""
    modelled: StepTime
    """Of `work`."""
    time: StepTime
    """Of what was compiled where it was: matmul FLOPs and transfers; else `modelled`."""

    @property
    def attention(self) -> str:
        if self.compiled is not None and self.compiled.fits:
            return "flash_tpu" if any("flash" in name for name in self.compiled.kernels) else "blockwise"
        return attention_backend(self.config, self.topology)

    @property
    def parameters(self) -> int:
        return num_parameters(self.config.model)

    @property
    def flops_per_token(self) -> float:
        return training_flops_per_token(self.config.model, self.config.model.max_seq_len)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return num_samples(self.config) * self.config.model.max_seq_len

    @property
    def memory_of_chip(self) -> int:
        return self.topology.chip.memory * self.topology.chip.devices_per_chip

    @property
    def peak_bytes(self) -> int | None:
        """Of a chip: the compiler's, else the estimate; None where the compiler refuses without a figure."""
        of_device = self.estimate.total if self.compiled is None else self.compiled.peak_bytes
        return None if of_device is None else of_device * self.topology.chip.devices_per_chip

    @property
    def fits(self) -> bool:
        if self.compiled is not None and not self.compiled.fits:
            return False
        return self.peak_bytes <= self.memory_of_chip

    @property
    def calibration(self) -> Calibration:
        return calibration(self.topology.platform)

    @property
    def compilers_time(self) -> StepTime:
        """`time` with the TPU compiler's own cycles for matmuls and memory traffic where it states them."""
        cycles = self.compiled.estimated_cycles if self.compiled is not None else None
        if not cycles:
            return self.time
        return replace(self.time, matmul=cycles / self.topology.chip.clock, memory=0.0)

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step: "expected"; with a calibration also "fast" and "slow", by the published runs that were the fastest
        and the slowest relative to their predictions."""
        expected, factors = self.time.expected, self.calibration.range
        if factors is None:
            return {"expected": expected}
        return {"fast": expected * factors.fastest, "expected": expected, "slow": expected * factors.slowest}

    def tokens_per_second(self, seconds: float) -> float:
        """Of one chip."""
        return self.config.global_batch_size * self.config.model.max_seq_len / seconds / self.topology.chips

    def mfu(self, seconds: float) -> float:
        chip = self.topology.chip
        return self.tokens_per_second(seconds) * self.flops_per_token / (chip.peak_flops * chip.devices_per_chip)

    def days(self, seconds: float) -> float:
        return self.tokens / (self.tokens_per_second(seconds) * self.topology.chips) / 86400

    def chip_hours(self, seconds: float) -> float:
        return self.days(seconds) * 24 * self.topology.chips


def prepare(config: RunConfig, topology: Topology) -> RunConfig:
    """The run with its mesh filled in for the topology. ConfigError for everything that cannot work on it."""
    mesh, devices = config.mesh, topology.devices
    if -1 not in mesh.sizes.values() and mesh.num_devices != devices:
        raise ConfigError(
            f"the mesh {mesh} is {mesh.num_devices:,} devices and {topology} has {devices:,}: "
            "make them equal, or leave one "
            "axis at -1, as `--mesh.fsdp -1`."
        )
    validate(config, devices)
    mesh = resolve_mesh(mesh, devices)
    problem = slice_problem(mesh, topology.num_slices)
    if problem is not None:
        raise ConfigError(problem)
    return replace(config, mesh=mesh)


def attention_backend(config: RunConfig, topology: Topology) -> str:
    """The backend that `attention` chooses for the topology's device (kernels/attention/api.py)."""
    if config.compute.attention is not None:
        return config.compute.attention
    return "flash_tpu" if has_kernels(topology.kind) else "blockwise"


def make_plan(config: RunConfig, topology: Topology, compiled: Compiled | None) -> Plan:
    """config: of `prepare`. Nothing is compiled here."""
    work = work_of(DecoderShape.of(config.model), Layout.of(config))
    attention = attention_backend(config, topology)
    modelled = step_time(work, topology, config.mesh, attention, is_ours=True)
    time = modelled
    if compiled is not None and compiled.fits:
        # Without a kernel of its own, attention is part of the compiler's matmuls.
        matmuls = compiled.matmul_flops if compiled.kernels else work.matmul_flops
        measured = replace(work, matmul_flops=matmuls, transfers={})
        time = step_time(measured, topology, config.mesh, attention)
        seconds, overlapped_seconds = transfer_seconds(compiled, topology, config.mesh)
        time = replace(time, interconnect=seconds, overlapped_seconds=overlapped_seconds)
    return Plan(
        config=config, topology=topology, compiled=compiled, estimate=estimate_memory(config), work=work,
        modelled=modelled, time=time,
    )  # fmt: skip


def transfer_seconds(compiled: Compiled, topology: Topology, mesh: MeshConfig) -> tuple[dict[str, float], float]:
    """Axis (or axes, joined by +) -> seconds of its collectives, one after another; and how many of these seconds
    overlap with computation."""
    bandwidths = axis_bandwidths(topology, mesh)
    slowest = topology.chip.link_bandwidth * LINK[topology.platform]
    seconds: dict[str, float] = {}
    overlapped_seconds = 0.0
    for collective in compiled.collectives:
        key = "+".join(collective.axes)
        along = min((bandwidths.get(axis, slowest) for axis in collective.axes), default=slowest)
        seconds[key] = seconds.get(key, 0.0) + collective.bytes / along
        overlapped_seconds += collective.asynchronous * collective.bytes / along
    return seconds, overlapped_seconds


def ways_to_fit(config: RunConfig, topology: Topology) -> Iterator[tuple[str, RunConfig]]:
    """(options, run): what needs less memory, the cheapest first."""
    mesh = config.mesh
    shards, batch = shards_of(config)("batch"), config.microbatch_size or config.global_batch_size
    size = batch
    while size % 2 == 0 and (size // 2) % shards == 0:
        size //= 2
        yield f"--microbatch-size {size}", replace(config, microbatch_size=size)
    smallest = replace(config, microbatch_size=size) if size < batch else config
    said = f"--microbatch-size {size} " if size < batch else ""
    if config.compute.remat != "block":
        smallest = replace(smallest, compute=replace(config.compute, remat="block"))
        said += "--compute.remat block"
        yield said.strip(), smallest
    # Devices move from the axis that shards weights to the one that shards the activations between heads and MLP.
    (source,), (target,) = DimRules().of("embed"), DimRules().of("mlp")
    wider = mesh
    while wider.sizes[target] < MOST_SHARDS and wider.sizes[source] % 2 == 0:
        wider = replace(wider, **{source: wider.sizes[source] // 2, target: wider.sizes[target] * 2})
        on_wider = replace(smallest, mesh=wider)
        if config.microbatch_size is not None or size < batch:
            on_wider = replace(on_wider, microbatch_size=shards_of(on_wider)("batch"))
        try:
            validate(on_wider, topology.devices)
        except ConfigError:
            continue
        sizes = " ".join(f"--mesh.{axis} {wider.sizes[axis]}" for axis in (source, target))
        yield f"{sizes} {said}".strip(), on_wider


def find_fit(plan: Plan, compile_one: COMPILE, *, tries: int = 4) -> tuple[list[tuple[str, Plan]], bool]:
    """The attempts to make a run fit, in order, and whether the last one did.

    Options whose estimate, scaled by the compiler's figure for this run, exceeds the memory are skipped. Of more than
    `tries` options the first, which costs least, and the last ones are tried.
    """
    tried: list[tuple[str, Plan]] = []
    of_chip, scale = plan.topology.chip.devices_per_chip, 1.0
    if plan.peak_bytes:
        scale = plan.peak_bytes / (plan.estimate.total * of_chip)
    ways = [
        (options, config)
        for options, config in ways_to_fit(plan.config, plan.topology)
        if estimate_memory(config).total * of_chip * scale <= 1.1 * plan.memory_of_chip
    ]
    for options, config in ways[:1] + ways[1:][1 - tries :]:
        attempt = make_plan(config, plan.topology, compile_one(config, plan.topology) if plan.compiled else None)
        tried.append((options, attempt))
        if attempt.fits:
            return tried, True
    return tried, False


def compiler(**options) -> COMPILE:
    """`compile_step` with its options set."""
    return lambda config, topology: compile_step(config, topology, **options)
