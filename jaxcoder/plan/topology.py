"""Topologies by name: `v5p:8x8x8` is a torus of 512 TPU chips, `h100:8x8` eight nodes of eight GPUs.

Valid shapes are those of the Google Cloud TPU documentation: a 3-D slice is a fraction of one 4x4x4 cube or a number of
cubes, a 2-D slice one of a list. (libtpu also compiles for shapes that are not offered.)
"""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from jaxcoder.errors import ConfigError
from jaxcoder.formatting import nearest
from jaxcoder.train.devices import Chip, find_chip

_SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def _cubes(most: int) -> tuple[tuple[int, ...], ...]:
    """Shapes made of 4x4x4 cubes, up to `most` chips."""
    shapes = itertools.combinations_with_replacement(range(4, 29, 4), 3)
    return tuple(shape for shape in shapes if math.prod(shape) <= most)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The slices offered of one kind of TPU. kind: JAX's device kind; library_name: libtpu's name."""

    kind: str
    library_name: str
    shapes: tuple[tuple[int, ...], ...]
    chip_config: str | None = None
    """libtpu's, where its default differs from a TPU VM: with `megacore` a v4 chip is one device."""


TPUS = {
    "v4": Generation(kind="TPU v4", library_name="v4", shapes=_BELOW_A_CUBE + _cubes(4096), chip_config="megacore"),
    "v5e": Generation(kind="TPU v5 lite", library_name="v5e", shapes=_SHAPES_2D),
    "v5p": Generation(kind="TPU v5", library_name="v5p", shapes=_BELOW_A_CUBE + _cubes(6144)),
    "v6e": Generation(kind="TPU v6 lite", library_name="v6e", shapes=_SHAPES_2D),
    "tpu7x": Generation(kind="TPU7x", library_name="tpu7x", shapes=_BELOW_A_CUBE + _cubes(9216)),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "7x": "tpu7x", "v7x": "tpu7x", "ironwood": "tpu7x"}
GPUS = {"a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
"""GPUs described in gpu_targets.py -> JAX's device kind."""
MOST_GPUS_OF_A_NODE = 8


@dataclass(frozen=True, kw_only=True)
class PlannedChip(Chip):
    """A chip with every figure that a plan needs. `clock` is None for GPUs, `host_bandwidth` where not measured."""

    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float


@cache
def _planned_chip(kind: str) -> PlannedChip:
    return PlannedChip(**vars(find_chip(kind)))


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips and their network. shape: chips along each dim of a slice's torus, or (nodes, GPUs per node)."""

    name: str
    platform: str
    """`tpu` or `cuda`."""
    kind: str
    shape: tuple[int, ...]
    num_slices: int = 1
    network_bandwidth: float | None = None
    """Bytes/s in one direction of one device's share of the network between slices or nodes; None: the chip's."""

    @property
    def chip(self) -> PlannedChip:
        return _planned_chip(self.kind)

    @property
    def network(self) -> float:
        return self.network_bandwidth or self.chip.network_bandwidth

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def devices(self) -> int:
        """JAX devices, of which a mesh is made."""
        return self.chips * self.chip.devices_per_chip

    def wraps(self, side: int) -> bool:
        """Whether a dim of the torus is closed to a ring: multiples of 4 in 3-D, 16 in 2-D."""
        length = self.shape[side]
        return length % 4 == 0 if len(self.shape) == 3 else length == 16

    def __str__(self) -> str:
        slices = f"{self.num_slices} x " if self.num_slices > 1 else ""
        return f"{slices}{self.name}"


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """`v5p:8x8x8`, `v5e-256` (an accelerator type; v4 and v5p count cores), `h100:8x8` (nodes x GPUs), `h100-64`.

    ConfigError, with the nearest topologies, for an unknown one.
    """
    given = re.fullmatch(r"([a-z0-9]+?)(?:[:](\d+(?:x\d+)*)|-(\d+))", name.strip().lower())
    family = _ALIASES.get(given[1], given[1]) if given else None
    if num_slices < 1:
        raise ConfigError(f"--slices is {num_slices}: give 1 or more.")
    if given and family in TPUS:
        return _tpu(name, family, given[2], given[3], num_slices)
    if given and family in GPUS:
        if num_slices > 1:
            raise ConfigError(f"--slices is for TPUs: write the nodes of {name} into its name, `{family}:NODESx8`.")
        return _gpu(name, family, given[2], given[3])
    known = [*TPUS, *GPUS]
    near = nearest(re.split("[:-]", name.lower())[0], [*known, *_ALIASES], cutoff=0.4)
    hint = f" (did you mean `{_ALIASES.get(near, near)}`?)" if near else ""
    raise ConfigError(
        f"there is no topology `{name}`{hint}: write CHIP:SHAPE, such as v5p:8x8x8, v5e:16x16 or h100:8x8 (8 nodes "
        f"of 8 GPUs), with a CHIP of {', '.join(known)}."
    )


def _tpu(name: str, family: str, sides: str | None, count: str, num_slices: int) -> Topology:
    generation = TPUS[family]
    shape: tuple[int, ...]
    if sides is not None:
        shape = tuple(int(side) for side in sides.split("x"))
        if shape not in generation.shapes and tuple(sorted(shape)) in generation.shapes:
            shape = tuple(sorted(shape))
        wanted = math.prod(shape)
    else:
        wanted = int(count) // (2 if family in ("v4", "v5p") else 1)
        shape = min((s for s in generation.shapes if math.prod(s) == wanted), key=sum, default=())
    if shape not in generation.shapes:
        names = ", ".join(_name(family, near) for near in _nearest(generation.shapes, shape, wanted))
        raise ConfigError(f"there is no topology `{name}`: the nearest are {names}.")
    return Topology(name=_name(family, shape), platform="tpu", kind=generation.kind, shape=shape, num_slices=num_slices)


def _nearest(shapes: Iterable[tuple[int, ...]], shape: tuple[int, ...], wanted: int) -> list[tuple[int, ...]]:
    """The three shapes nearest in the number of chips and, where a shape was given, in its dims."""

    def distance(other: tuple[int, ...]) -> tuple[float, int]:
        sides = sum(abs(math.log(a / max(b, 1))) for a, b in zip(other, sorted(shape), strict=False))
        return abs(math.log(math.prod(other) / max(wanted, 1))) + sides, sum(other)

    return sorted(sorted(shapes, key=distance)[:3], key=math.prod)


def _name(family: str, shape: tuple[int, ...]) -> str:
    return f"{family}:{'x'.join(map(str, shape))}"


def _gpu(name: str, family: str, sides: str | None, count: str | None) -> Topology:
    most = MOST_GPUS_OF_A_NODE
    if sides is not None and len(shape := tuple(int(side) for side in sides.split("x"))) <= 2:
        nodes, of_node = shape if len(shape) == 2 else (1, shape[0])
    elif count is not None:
        nodes, of_node = (-(-int(count) // most), most) if int(count) > most else (1, int(count))
        nodes = 0 if nodes * of_node != int(count) else nodes
    else:
        nodes = of_node = 0
    if nodes < 1 or of_node not in (1, 2, 4, most):
        raise ConfigError(
            f"there is no topology `{name}`: write {family}:NODESxGPUS with 1, 2, 4 or {most} GPUs a node, such as "
            f"{family}:1x{most} or {family}:8x{most}."
        )
    return Topology(name=_name(family, (nodes, of_node)), platform="cuda", kind=GPUS[family], shape=(nodes, of_node))
