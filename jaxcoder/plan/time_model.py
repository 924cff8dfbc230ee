"""The time of a step: a roofline with the efficiencies that matmuls, attention and links reach in practice.

    compute  = matmul FLOPs / (peak x MATMUL) + attention FLOPs / (peak x ATTENTION) + traffic / memory bandwidth
    expected = max(compute, overlapped transfers, transfers to the host) + exposed transfers

Transfers over `fsdp` overlap with the layer before. Those over `tensor` are exposed, because the next matmul needs
them, and so are the all-reduces over `data` after the last gradient. For a compiled program, the program shows which
are exposed. `calibration.py` compares the model with published runs.
"""

import itertools
import math
from dataclasses import dataclass

from jaxcoder.config import MeshConfig
from jaxcoder.config.mesh import SLICE_AXIS, DimRules
from jaxcoder.plan.topology import Topology
from jaxcoder.plan.workload import Work

(WEIGHT_AXIS,) = DimRules().of("embed")
"""The mesh axis over which weights are all-gathered and gradients reduce-scattered."""

# Efficiencies: shares of the peak FLOP/s or of the data sheet's bandwidth.

# TPUs: the TPU compiler's own cycles of the matmuls of a step. GPUs: 790 of 989 TFLOP/s of a bf16 matmul on an H200.
MATMUL = {"tpu": 0.90, "cuda": 0.80}
# (chip, kernel) -> efficiency of forward and backward together, of the causal half, without dropout. v5e, v5p, v6e:
# static cycles at 8,192 tokens (docs/performance.md, Attention on TPUs); v4 as its 128-wide sibling, TPU7x as its
# 256-wide one. GPUs: published figures of FlashAttention-2 on A100 and cuDNN on Hopper. `blockwise` (XLA): assumed.
ATTENTION = {
    ("TPU v5p", "flash_tpu"): 0.93, ("TPU v6e", "flash_tpu"): 0.47,
    ("TPU v4", "flash_tpu"): 0.93, ("TPU v5e", "flash_tpu"): 0.93, ("TPU7x", "flash_tpu"): 0.47,
    ("TPU v5p", "splash"): 0.58, ("TPU v6e", "splash"): 0.23,
    ("TPU v4", "splash"): 0.58, ("TPU v5e", "splash"): 0.58, ("TPU7x", "splash"): 0.23,
    ("TPU v4", "blockwise"): 0.35, ("TPU v5e", "blockwise"): 0.35, ("TPU v5p", "blockwise"): 0.35,
    ("A100", "flash"): 0.55, ("H100", "flash"): 0.55, ("H200", "flash"): 0.55,
}  # fmt: skip
ATTENTION_ELSEWHERE = 0.2  # assumed
# Time of the flash_tpu kernel with dropout relative to without, (forward, backward): static cycles on v6e and v5p
# (docs/performance.md, Attention on TPUs); TPU7x as v6e, the others as v5p. Not known for other kernels, taken as 1.
DROPOUT = {"TPU v6e": (2.02, 1.45), "TPU7x": (2.02, 1.45)}
DROPOUT_ELSEWHERE = (1.45, 1.07)
# Links: 45 of 50 GB/s in "How to Scale Your Model"; NCCL's bus bandwidth in a node.
LINK = {"tpu": 0.9, "cuda": 0.8}

# Chips on which libtpu 0.0.52 overlaps the all-gathers of weights over `fsdp` with matmuls. On the others they are
# exposed; the reduce-scatters of gradients are exposed on all (docs/performance.md, StarCoderBase on pods). Published
# runs had compilers and options that overlapped both.
OVERLAPPED_GATHERS = ("TPU v4", "TPU v5e")
# Chips on which libtpu 0.0.52 turns all-gathers and reduce-scatters over all three dims of a closed torus into
# all-reduces: twice the bytes, and exposed. Over one or two dims it does not.
ALL_REDUCE_ON_3D = ("TPU v4", "TPU v5p")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step. matmul, attention, memory, interconnect (by axis) are not overlapped yet."""

    matmul: float
    attention: float
    memory: float
    interconnect: dict[str, float]
    overlapped_seconds: float | None = None
    """Seconds of the interconnect that overlap with computation in a compiled program; None: those of `fsdp`."""
    host: float = 0.0
    """Activations to host memory and back, overlapped with everything else."""

    @property
    def compute(self) -> float:
        return self.matmul + self.attention + self.memory

    @property
    def overlapped_transfers(self) -> float:
        if self.overlapped_seconds is None:
            return self.interconnect.get(WEIGHT_AXIS, 0.0)
        return self.overlapped_seconds

    @property
    def exposed_transfers(self) -> float:
        return sum(self.interconnect.values()) - self.overlapped_transfers

    @property
    def expected(self) -> float:
        return max(self.compute, self.overlapped_transfers, self.host) + self.exposed_transfers

    @property
    def overlapped(self) -> float:
        """Lower bound: everything overlaps."""
        return max(self.compute, sum(self.interconnect.values()), self.host)

    @property
    def sequential(self) -> float:
        """Upper bound: nothing overlaps."""
        return self.compute + sum(self.interconnect.values()) + self.host

    @property
    def bound(self) -> str:
        """The dominant term of the expected time; overlapped transfers count only if longer than computation."""
        transfers = {"transfers between chips": self.overlapped_transfers, "transfers to the host": self.host}
        if max(transfers.values()) > self.compute:
            terms = transfers
        else:
            terms = {"matmuls": self.matmul, "attention": self.attention, "memory traffic": self.memory}
        longest = max(terms, key=lambda name: terms[name])
        return longest if terms[longest] >= self.exposed_transfers else "exposed transfers"


def step_time(
    work: Work, topology: Topology, mesh: MeshConfig, attention: str, *, is_jaxcoder: bool = False
) -> StepTime:
    """attention: the kernel, as in ATTENTION.

    is_jaxcoder: transfers as libtpu 0.0.52 compiles them in jaxcoder's step; otherwise those over `fsdp` overlap.
    """
    chip = topology.chip
    links = axis_bandwidths(topology, mesh)
    seconds = {axis: sent / links[axis] for axis, sent in work.transfers.items()}
    overlapped_seconds = None
    if WEIGHT_AXIS in seconds:
        scatters = work.scattered / links[WEIGHT_AXIS]
        is_closed = all(map(topology.wraps, range(len(topology.shape))))
        is_3d = chip.name in ALL_REDUCE_ON_3D and _links(topology, mesh)[WEIGHT_AXIS][1] > 2
        if is_3d and is_closed:
            seconds[WEIGHT_AXIS], overlapped_seconds = 2 * seconds[WEIGHT_AXIS], 0.0
        elif is_jaxcoder and topology.platform == "tpu":
            overlapped_seconds = seconds[WEIGHT_AXIS] - scatters if chip.name in OVERLAPPED_GATHERS else 0.0
            # Reduce-scatters become all-reduces on an open 3-D torus too, and for shards that do not fill tiles.
            seconds[WEIGHT_AXIS] += scatters if is_3d or not work.scatters_evenly else 0.0
    efficiency = ATTENTION.get((chip.name, attention), ATTENTION_ELSEWHERE)
    if topology.platform == "tpu":  # a smaller head leaves rows or columns of the matrix unit idle
        efficiency *= min(1.0, work.head_dim / 128)
    has_hash = work.attention_dropout and attention == "flash_tpu"
    slowdowns = DROPOUT.get(chip.name, DROPOUT_ELSEWHERE) if has_hash else (1.0, 1.0)
    attention_flops = sum(flops * factor for flops, factor in zip(work.attention_flops, slowdowns, strict=True))
    return StepTime(
        matmul=work.matmul_flops / chip.peak_flops / MATMUL[topology.platform],
        attention=attention_flops / chip.peak_flops / efficiency,
        memory=work.memory_bytes / chip.memory_bandwidth,
        interconnect=seconds,
        overlapped_seconds=overlapped_seconds,
        host=work.host_bytes / chip.host_bandwidth if work.host_bytes and chip.host_bandwidth else 0.0,
    )


def axis_bandwidths(topology: Topology, mesh: MeshConfig) -> dict[str, float]:
    """Bytes/s that one device can send along each mesh axis of more than one device, if each is used alone."""
    return {axis: bandwidth * LINK[topology.platform] for axis, (bandwidth, _) in _links(topology, mesh).items()}


def _links(topology: Topology, mesh: MeshConfig) -> dict[str, tuple[float, int]]:
    """Axis -> (bytes/s of the data sheet, torus dims used; 0 for GPUs)."""
    # Neighbouring devices differ in the last axis.
    sizes = {axis: size for axis, size in reversed(mesh.sizes.items()) if size > 1}
    return _in_nodes(topology, sizes) if topology.platform == "cuda" else _in_torus(topology, sizes)


def _in_nodes(topology: Topology, sizes: dict[str, int]) -> dict[str, tuple[float, int]]:
    """An axis that crosses nodes uses the network cards of all its members in a node."""
    link, free, found = topology.chip.link_bandwidth, topology.shape[1], {}
    for axis, size in sizes.items():
        inside = math.gcd(size, free)
        found[axis] = (link if size == inside else min(link, inside * topology.network)), 0
        free //= inside
    return found


def _in_torus(topology: Topology, sizes: dict[str, int]) -> dict[str, tuple[float, int]]:
    """The axis between slices is limited by the network."""
    chip, found = topology.chip, {}
    # (devices, is a ring) of each torus dim. The devices of one chip extend the first.
    lengths = (topology.shape[0] * chip.devices_per_chip, *topology.shape[1:])
    free = [(length, topology.wraps(i)) for i, length in enumerate(lengths) if length > 1]
    for axis, size in sizes.items():
        across = topology.num_slices if axis == SLICE_AXIS else 1
        links, used, free = _assign(free, size // across)
        bandwidth = links * chip.link_bandwidth if links else math.inf
        if across > 1:
            bandwidth = min(bandwidth, topology.network * max(size // across, 1))
        found[axis] = bandwidth, used
    return found


def _assign(free: list[tuple[int, bool]], size: int) -> tuple[int, int, list[tuple[int, bool]]]:
    """(links for an axis of this size, torus dims used, dims left). A ring has two links, one in each direction."""
    if size <= 1:
        return 0, 0, free
    # Complete dims whose product is the size, as many as possible.
    for count in range(len(free), 0, -1):
        for chosen in itertools.combinations(range(len(free)), count):
            if math.prod(free[i][0] for i in chosen) == size:
                links = sum(2 if free[i][1] else 1 for i in chosen)
                return links, count, [dim for i, dim in enumerate(free) if i not in chosen]
    # Else divisors of the longest dims, which are then no rings.
    links, used, rest = 0, 0, list(free)
    for i in sorted(range(len(rest)), key=lambda i: -rest[i][0]):
        divisor = math.gcd(size, rest[i][0])
        if divisor > 1:
            used += 1
            links += 2 if divisor == rest[i][0] and rest[i][1] else 1
            rest[i] = (rest[i][0] // divisor, False)
            size //= divisor
    return max(links, 1), used, [dim for dim in rest if dim[0] > 1]
