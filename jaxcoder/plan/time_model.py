"""The time of a step: a roofline with the efficiencies that matmuls, attention and links reach in practice.

    compute  = matmul FLOPs / (peak x MATMUL) + attention FLOPs / (peak x attention's) + traffic / memory bandwidth
    expected = the largest of compute, `fsdp` transfers and transfers to the host + `tensor` and `data` transfers

Transfers over `tensor` are exposed: the next matmul needs them. So are the sums over `data` after the last gradient.
Transfers over `fsdp` overlap with the layer before. A compiled program shows which of its transfers are exposed. The
bounds: everything overlaps, or nothing does. Each efficiency names its source; calibration.py compares the model with
published runs.
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

MATMUL = {"tpu": 0.90, "cuda": 0.80}
"""Of peak. TPUs: the TPU compiler's own cycles of the matmuls of a step. GPUs: 790 of 989 TFLOP/s of a plain bf16
matmul on an H200."""
ATTENTION = {
    ("TPU v5p", "flash_tpu"): 0.93, ("TPU v6e", "flash_tpu"): 0.47,
    ("TPU v4", "flash_tpu"): 0.93, ("TPU v5e", "flash_tpu"): 0.93, ("TPU7x", "flash_tpu"): 0.47,
    ("TPU v5p", "splash"): 0.58, ("TPU v6e", "splash"): 0.23,
    ("TPU v4", "splash"): 0.58, ("TPU v5e", "splash"): 0.58, ("TPU7x", "splash"): 0.23,
    ("TPU v4", "blockwise"): 0.35, ("TPU v5e", "blockwise"): 0.35, ("TPU v5p", "blockwise"): 0.35,
    ("A100", "flash"): 0.55, ("H100", "flash"): 0.55, ("H200", "flash"): 0.55,
}  # fmt: skip
"""Of peak, forward and backward together, of the causal half, without dropout. v5e, v5p, v6e: static cycles at 8,192
tokens (docs/performance.md, Attention on TPUs); v4 as its 128-wide, TPU7x as its 256-wide sibling. GPUs: what is
published of FlashAttention-2 on A100 and cuDNN on Hopper. `blockwise`, XLA's: assumed, as is what is missing here."""
DROPOUT = {"TPU v6e": (2.02, 1.45), "TPU7x": (2.02, 1.45)}
DROPOUT_ELSEWHERE = (1.45, 1.07)
"""How much longer the flash_tpu kernel takes with dropout, (forward, backward): static cycles on v6e and, elsewhere,
on v5p (docs/performance.md, Attention on TPUs), TPU7x as v6e. Of other kernels it is not known and left at 1."""
ATTENTION_ELSEWHERE = 0.2
OVERLAPPED_GATHERS = ("TPU v4", "TPU v5e")
"""Chips for which libtpu 0.0.52 overlaps the all-gathers of weights over `fsdp` with matmuls. On the others they are
exposed; the reduce-scatters of gradients are exposed on all (docs/performance.md, StarCoderBase on pods). Published
runs had compilers and options that overlapped both."""
WHOLE_TORUS = ("TPU v4", "TPU v5p")
"""Chips for which libtpu 0.0.52 turns all-gathers and reduce-scatters over all three sides of a closed torus into
all-reduces: twice the bytes, and exposed. Over one or two sides it does not."""
LINK = {"tpu": 0.9, "cuda": 0.8}
"""Of the data sheet's bandwidth: 45 of 50 GB/s a link in "How to Scale Your Model"; NCCL's bus bandwidth in a node."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step. matmul, attention, memory, interconnect (by axis): each alone, at what it reaches."""

    matmul: float
    attention: float
    memory: float
    interconnect: dict[str, float]
    overlapped_seconds: float | None = None
    """Seconds of the interconnect that overlap with computation in a compiled program; None: those of `fsdp`."""
    host: float = 0.0
    """Activations to host memory and back, overlapped with everything else."""

    @property
    def _overlapped_interconnect(self) -> float:
        if self.overlapped_seconds is None:
            return self.interconnect.get(WEIGHT_AXIS, 0.0)
        return self.overlapped_seconds

    @property
    def compute(self) -> float:
        return self.matmul + self.attention + self.memory

    @property
    def expected(self) -> float:
        overlapped_seconds = self._overlapped_interconnect
        return max(self.compute, overlapped_seconds, self.host) + sum(self.interconnect.values()) - overlapped_seconds

    @property
    def overlapped(self) -> float:
        """If everything overlaps."""
        return max(self.compute, sum(self.interconnect.values()), self.host)

    @property
    def sequential(self) -> float:
        """If nothing did."""
        return self.compute + sum(self.interconnect.values()) + self.host

    @property
    def bound(self) -> str:
        """What dominates the expected time; overlapped transfers count only if they take longer than computation."""
        overlapped_seconds = self._overlapped_interconnect
        waited = sum(self.interconnect.values()) - overlapped_seconds
        slower = max(overlapped_seconds, self.host) > self.compute
        named = {"matmuls": self.matmul, "attention": self.attention, "memory traffic": self.memory}
        if slower:
            named = (
                {"transfers to the host": self.host}
                if self.host > overlapped_seconds
                else {"transfers between chips": overlapped_seconds}
            )
        longest = max(named, key=named.get)
        return longest if named[longest] >= waited else "exposed transfers"


def step_time(work: Work, topology: Topology, mesh: MeshConfig, attention: str, *, is_ours: bool = False) -> StepTime:
    """attention: the kernel, a key of ATTENTION. is_ours: transfers as libtpu 0.0.52 makes them of our step, which sums
    gradients in place of scattering them over three sides of an open torus too, and where parts do not fill tiles."""
    chip = topology.chip
    links = axis_bandwidths(topology, mesh)
    seconds = {axis: sent / links[axis] for axis, sent in work.transfers.items()}
    overlapped_seconds = None
    if WEIGHT_AXIS in seconds:
        scatters = work.scattered / links[WEIGHT_AXIS]
        closed = all(map(topology.wraps, range(len(topology.shape))))
        on_three = chip.name in WHOLE_TORUS and _sides(topology, mesh)[WEIGHT_AXIS] > 2
        if on_three and closed:
            seconds[WEIGHT_AXIS], overlapped_seconds = 2 * seconds[WEIGHT_AXIS], 0.0
        elif is_ours and topology.platform == "tpu":
            overlapped_seconds = seconds[WEIGHT_AXIS] - scatters if chip.name in OVERLAPPED_GATHERS else 0.0
            seconds[WEIGHT_AXIS] += scatters if on_three or not work.scatters_evenly else 0.0  # all-reduces instead
    reached = ATTENTION.get((chip.name, attention), ATTENTION_ELSEWHERE)
    has_hash = work.attention_dropout and attention == "flash_tpu"
    longer = DROPOUT.get(chip.name, DROPOUT_ELSEWHERE) if has_hash else (1.0, 1.0)
    if topology.platform == "tpu":  # a smaller head leaves rows or columns of the matrix unit idle
        reached *= min(1.0, work.head_dim / 128)
    attention_flops = sum(flops * factor for flops, factor in zip(work.attention_flops, longer, strict=True))
    return StepTime(
        matmul=work.matmul_flops / chip.peak_flops / MATMUL[topology.platform],
        attention=attention_flops / chip.peak_flops / reached,
        memory=work.memory_bytes / chip.memory_bandwidth,
        interconnect=seconds,
        overlapped_seconds=overlapped_seconds,
        host=work.host_bytes / chip.host_bandwidth if work.host_bytes and chip.host_bandwidth else 0.0,
    )


def axis_bandwidths(topology: Topology, mesh: MeshConfig) -> dict[str, float]:
    """Bytes/s that one device can send along each mesh axis of more than one device, if each is used alone."""
    reached = LINK[topology.platform]
    if topology.platform == "cuda":
        found = _in_nodes(topology, _sizes(mesh))
    else:
        found = {axis: bandwidth for axis, (bandwidth, _) in _in_torus(topology, _sizes(mesh)).items()}
    return {axis: bandwidth * reached for axis, bandwidth in found.items()}


def _sizes(mesh: MeshConfig) -> dict[str, int]:
    """Axes of more than one device, those of neighbours first."""
    return {axis: size for axis, size in reversed(mesh.sizes.items()) if size > 1}


def _sides(topology: Topology, mesh: MeshConfig) -> dict[str, int]:
    """Axis -> over how many sides of the torus it runs."""
    return {axis: sides for axis, (_, sides) in _in_torus(topology, _sizes(mesh)).items()}


def _in_nodes(topology: Topology, sizes: dict[str, int]) -> dict[str, float]:
    """Neighbours in the mesh share a node; an axis that leaves it uses the network cards of all its members there."""
    chip, left, found = topology.chip, topology.shape[1], {}
    for axis, size in sizes.items():
        inside = math.gcd(size, left)
        if size == inside:
            found[axis] = chip.link_bandwidth
        else:
            found[axis] = min(chip.link_bandwidth, inside * topology.network)
        left //= inside
    return found


def _in_torus(topology: Topology, sizes: dict[str, int]) -> dict[str, tuple[float, int]]:
    """Axis -> (bytes/s, sides): an axis takes whole sides where their product is its size (closed ones carry both
    ways), else pieces of some; `data` between slices takes the slow network."""
    chip, found = topology.chip, {}
    sides = [(length * (chip.devices_per_chip if i == 0 else 1), topology.wraps(i))
             for i, length in enumerate(topology.shape)]  # fmt: skip
    sides = [side for side in sides if side[0] > 1]
    for axis, size in sizes.items():
        across = topology.num_slices if axis == SLICE_AXIS else 1
        links, used, sides = _take(sides, size // across)
        bandwidth = links * chip.link_bandwidth if links else math.inf
        if across > 1:
            bandwidth = min(bandwidth, topology.network * max(size // across, 1))
        found[axis] = bandwidth, used
    return found


def _take(sides: list[tuple[int, bool]], size: int) -> tuple[int, int, list[tuple[int, bool]]]:
    """(links that carry an axis of this size, sides that it runs over, the sides that are left)."""
    if size <= 1:
        return 0, 0, sides
    for count in range(len(sides), 0, -1):
        for chosen in itertools.combinations(range(len(sides)), count):
            if math.prod(sides[i][0] for i in chosen) == size:
                links = sum(2 if sides[i][1] else 1 for i in chosen)
                return links, count, [side for i, side in enumerate(sides) if i not in chosen]
    links, used, rest = 0, 0, list(sides)
    for i in sorted(range(len(rest)), key=lambda i: -rest[i][0]):
        part = math.gcd(size, rest[i][0])
        if part > 1:
            used += 1
            links += 2 if part == rest[i][0] and rest[i][1] else 1
            rest[i] = (rest[i][0] // part, False)
            size //= part
    return max(links, 1), used, [side for side in rest if side[0] > 1]
