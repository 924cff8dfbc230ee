"""A plan: memory and step time of one run on one topology, compiled or modelled; and options that make a run fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from jaxcoder.config import MeshConfig, RunConfig
from jaxcoder.config.mesh import DimRules, resolve_mesh, slice_problem
from jaxcoder.config.validate import validate
from jaxcoder.errors import ConfigError
from jaxcoder.kernels.attention.blocks_tpu import has_kernels
from jaxcoder.models.flops import num_parameters, training_flops_per_token
from jaxcoder.plan.calibration import Calibration, calibration
from jaxcoder.plan.compile import Compiled
from jaxcoder.plan.time_model import LINK, StepTime, axis_bandwidths, step_time
from jaxcoder.plan.topology import Topology
from jaxcoder.plan.workload import DecoderShape, Layout, Work, work_of
from jaxcoder.train.dry_run import num_samples
from jaxcoder.train.memory_estimate import MemoryEstimate, estimate_memory, shards_of

MOST_SHARDS = 16
"""Largest size of a mesh axis that shards heads, MLP or sequence, whose transfers are exposed between matmuls."""

CompileOne = Callable[[RunConfig, Topology], Compiled]
"""`compile_step` with its options set."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a topology. Without `compiled` every figure is modelled."""

    config: RunConfig
    """With a resolved mesh."""
    topology: Topology
    compiled: Compiled | None
    estimate: MemoryEstimate
    work: Work
    """By formula."""
    modelled: StepTime
    """Of `work`."""
    time: StepTime
    """With the matmul FLOPs and transfers of the compiled program, if there is one; else `modelled`."""

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
        """Tokens of the run."""
        return num_samples(self.config) * self.config.model.max_seq_len

    @property
    def chip_memory(self) -> int:
        return self.topology.chip.memory * self.topology.chip.devices_per_chip

    @property
    def estimated_bytes(self) -> int:
        """Memory per chip by formula."""
        return self.estimate.total * self.topology.chip.devices_per_chip

    @property
    def peak_bytes(self) -> int | None:
        """Memory per chip: the compiler's, else the estimate; None if the compiler refuses without a figure."""
        if self.compiled is None:
            return self.estimated_bytes
        device_bytes = self.compiled.peak_bytes
        return None if device_bytes is None else device_bytes * self.topology.chip.devices_per_chip

    @property
    def fits(self) -> bool:
        if self.compiled is not None and not self.compiled.fits:
            return False
        return self.peak_bytes is not None and self.peak_bytes <= self.chip_memory

    @property
    def calibration(self) -> Calibration:
        return calibration(self.topology.platform)

    @property
    def cycle_seconds(self) -> float | None:
        """Seconds per step of matmuls and memory traffic by the TPU compiler's estimated cycles; None without them."""
        cycles = self.compiled.estimated_cycles if self.compiled is not None else None
        clock = self.topology.chip.clock
        return cycles / clock if cycles and clock else None

    @property
    def compiler_time(self) -> StepTime:
        """`time` with `cycle_seconds` for matmuls and memory traffic, if known."""
        return self.time if self.cycle_seconds is None else replace(self.time, matmul=self.cycle_seconds, memory=0.0)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per step: "expected"; on a calibrated platform also "fast" and "slow" (Calibration.range)."""
        expected, factors = self.time.expected, self.calibration.range
        if factors is None:
            return {"expected": expected}
        return {"fast": expected * factors.fastest, "expected": expected, "slow": expected * factors.slowest}

    def tokens_per_second(self, seconds: float) -> float:
        """Tokens/s per chip at so many seconds per step."""
        return self.config.global_batch_size * self.config.model.max_seq_len / seconds / self.topology.chips

    def mfu(self, seconds: float) -> float:
        chip = self.topology.chip
        return self.tokens_per_second(seconds) * self.flops_per_token / (chip.peak_flops * chip.devices_per_chip)

    def days(self, seconds: float) -> float:
        return self.tokens / (self.tokens_per_second(seconds) * self.topology.chips) / 86400

    def chip_hours(self, seconds: float) -> float:
        return self.days(seconds) * 24 * self.topology.chips


def prepare(config: RunConfig, topology: Topology) -> RunConfig:
    """The run with its mesh resolved for the topology. ConfigError if it cannot run there."""
    mesh, devices = config.mesh, topology.devices
    if -1 not in mesh.sizes.values() and mesh.num_devices != devices:
        raise ConfigError(
            f"the mesh {mesh} is {mesh.num_devices:,} devices and {topology} has {devices:,}: make them equal, or set "
            "one axis to -1, as `--mesh.fsdp -1`."
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
    """config: returned by `prepare`. compiled: of `compile_step`, None for modelled figures."""
    work = work_of(DecoderShape.of(config.model), Layout.of(config))
    attention = attention_backend(config, topology)
    modelled = step_time(work, topology, config.mesh, attention, is_jaxcoder=True)
    time = modelled
    if compiled is not None and compiled.fits:
        # Without an attention kernel, the program's matmuls include attention's.
        matmul_flops = compiled.matmul_flops if compiled.kernels else work.matmul_flops
        time = step_time(replace(work, matmul_flops=matmul_flops, transfers={}), topology, config.mesh, attention)
        seconds, overlapped_seconds = _transfer_seconds(compiled, topology, config.mesh)
        time = replace(time, interconnect=seconds, overlapped_seconds=overlapped_seconds)
    return Plan(
        config=config, topology=topology, compiled=compiled, estimate=estimate_memory(config), work=work,
        modelled=modelled, time=time,
    )  # fmt: skip


def _transfer_seconds(compiled: Compiled, topology: Topology, mesh: MeshConfig) -> tuple[dict[str, float], float]:
    """({axis, or several joined by +: seconds of its collectives}, seconds that overlap with computation)."""
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
    """(command line options, run) that need less memory, the fastest first."""
    # Smaller microbatches, down to one window per batch shard or an odd number of them.
    shards, batch = shards_of(config)("batch"), config.microbatch_size or config.global_batch_size
    size = batch
    while size % 2 == 0 and (size // 2) % shards == 0:
        size //= 2
        yield f"--microbatch-size {size}", replace(config, microbatch_size=size)
    smallest = replace(config, microbatch_size=size) if size < batch else config
    # Full rematerialization.
    remat = [] if config.compute.remat == "block" else ["--compute.remat block"]
    if remat:
        smallest = replace(smallest, compute=replace(config.compute, remat="block"))
        yield " ".join([f"--microbatch-size {size}"] * (size < batch) + remat), smallest
    # Devices moved from the axis that shards weights to the one that shards the activations of heads and MLP.
    (source,), (target,) = DimRules().of("embed"), DimRules().of("mlp")
    mesh = config.mesh
    while mesh.sizes[target] < MOST_SHARDS and mesh.sizes[source] % 2 == 0:
        sizes = {source: mesh.sizes[source] // 2, target: mesh.sizes[target] * 2}
        mesh = replace(mesh, **sizes)
        options = [f"--mesh.{axis} {size}" for axis, size in sizes.items()]
        wider = replace(smallest, mesh=mesh)
        if smallest.microbatch_size is not None:
            wider = replace(wider, microbatch_size=shards_of(wider)("batch"))
            options.append(f"--microbatch-size {wider.microbatch_size}")
        try:
            validate(wider, topology.devices)
        except ConfigError:
            continue
        yield " ".join(options + remat), wider


def find_fit(plan: Plan, compile_one: CompileOne, *, tries: int = 4) -> tuple[list[tuple[str, Plan]], bool]:
    """(the attempts to make a run fit, as (options, plan) in order; whether the last one fits).

    Skips options whose estimate, scaled by the compiler's figure for this run, exceeds the memory. Of more than `tries`
    options, tries the first, which costs least, and the last.
    """
    scale = plan.peak_bytes / plan.estimated_bytes if plan.peak_bytes else 1.0
    limit = 1.1 * plan.chip_memory / (scale * plan.topology.chip.devices_per_chip)
    ways = [way for way in ways_to_fit(plan.config, plan.topology) if estimate_memory(way[1]).total <= limit]
    tried: list[tuple[str, Plan]] = []
    for options, config in ways[:1] + ways[1:][1 - tries :]:
        attempt = make_plan(config, plan.topology, compile_one(config, plan.topology) if plan.compiled else None)
        tried.append((options, attempt))
        if attempt.fits:
            return tried, True
    return tried, False
