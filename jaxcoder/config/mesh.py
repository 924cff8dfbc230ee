"""The device mesh as data: its axes and sizes, which axes shard each logical dim, and the checks of both.

An *axis* is an axis of the mesh, a *dim* is a named dimension of arrays ("batch", "heads", ...). A new axis is a field
of `MeshConfig` and an entry in the rules of the dims that it shards; everything else iterates over `MESH_AXES`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from jaxcoder.config.fields import mesh_axis, positive, walk
from jaxcoder.errors import ConfigError
from jaxcoder.formatting import plural

Axes = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes. At most one may be -1: the remaining devices."""

    data: int = mesh_axis(1)
    """Replicas of the weights; a multiple of num_slices, because only this axis crosses the slow network."""
    fsdp: int = mesh_axis(-1)
    """Data parallelism with sharded weights, gradients and optimizer state."""
    tensor: int = mesh_axis(1)
    """Shards heads, MLP and vocabulary, and the sequence between them; a single key/value head is replicated."""
    num_slices: int | None = positive(None)
    """Groups of devices with a slow network between them: the axis `data` runs across them. None means the number that
    a TPU reports, and 1 elsewhere; on a GPU cluster, give the number of nodes to shard weights only within a node."""

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> size, in the order of `MESH_AXES`."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def num_devices(self) -> int:
        """The product of the sizes, without an axis that is -1."""
        return math.prod(size for size in self.sizes.values() if size != -1)

    def __str__(self) -> str:
        """ "data 2 x fsdp 4 x tensor 1"."""
        return " x ".join(f"{axis} {size}" for axis, size in self.sizes.items())


MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig) if field.metadata.get("is_axis"))
"""The axes in the order of the device array: the slowest network first."""

SLICE_AXIS = MESH_AXES[0]
"""The only axis that crosses slices."""


@dataclass(frozen=True, kw_only=True)
class DimRules:
    """Mesh axes that shard each dim; None leaves it unsharded. A dim of activations and one of weights may share an
    axis, two dims of one array may not."""

    batch: Axes = ("data", "fsdp")
    vocab: Axes = "tensor"
    embed: Axes = "fsdp"
    """Of weights only: the embed dim of activations is unsharded."""
    heads: Axes = "tensor"
    kv_heads: Axes = None
    """The single key/value head of multi-query attention is replicated."""
    mlp: Axes = "tensor"
    seq: Axes = "tensor"
    """Of norms and residuals: sequence parallelism (Korthikanti et al. 2022)."""

    @classmethod
    def for_heads(cls, num_kv_heads: int) -> Self:
        """Several key/value heads are sharded like the query heads that use them."""
        return cls() if num_kv_heads == 1 else cls(kv_heads=cls.heads)

    def of(self, dim: str) -> tuple[str, ...]:
        """The axes of a dim as a tuple."""
        return axes_of(getattr(self, dim))

    def shards(self, dim: str, mesh: MeshConfig) -> int:
        """Into how many shards `dim` is divided on a mesh whose sizes are known."""
        return math.prod(mesh.sizes[axis] for axis in self.of(dim))


def axes_of(axes: Axes) -> tuple[str, ...]:
    """One axis, several or none, as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """The mesh with its -1 replaced by the number of devices that the other axes leave. ConfigError if that fails."""
    problems = list(size_problems(mesh, num_devices))
    if problems:
        raise ConfigError(" ".join(problems))
    filled = {axis: num_devices // mesh.num_devices for axis, size in mesh.sizes.items() if size == -1}
    return dataclasses.replace(mesh, **filled)


def size_problems(mesh: MeshConfig, num_devices: int) -> Iterator[str]:
    """Sizes that do not give `num_devices`, one sentence for each problem."""
    for axis, size in mesh.sizes.items():
        if size < 1 and size != -1:
            yield f"mesh.{axis} is {size}: use 1 or more, or -1 for all the devices that the other axes leave."
            return
    free = [f"mesh.{axis}" for axis, size in mesh.sizes.items() if size == -1]
    given = mesh.num_devices
    if len(free) > 1:
        yield f"{' and '.join(free)} are both -1: at most one mesh axis can take the devices that are left."
    elif free and num_devices % given:
        yield (
            f"the mesh {mesh} does not fit {plural(num_devices, 'device')}: {num_devices} is not a multiple of "
            f"{given}, the product of the axes other than {free[0]}; change one of them to a divisor."
        )
    elif not free and given != num_devices:
        yield (
            f"the mesh {mesh} is {plural(given, 'device')}, but there {'is' if num_devices == 1 else 'are'} "
            f"{num_devices:,}: set one axis to -1 to take what is left, or change the sizes."
        )


def slice_problem(mesh: MeshConfig, num_slices: int | None) -> str | None:
    """Why the mesh cannot run across `num_slices` slices, or None if it can."""
    size = mesh.sizes[SLICE_AXIS]
    if not num_slices or num_slices < 1 or size % num_slices == 0:
        return None
    nearest = max(1, round(size / num_slices)) * num_slices
    return (
        f"mesh.{SLICE_AXIS} {size} is not a multiple of {plural(num_slices, 'slice')}: the other axes do not cross "
        f"slices, so use --mesh.{SLICE_AXIS} {nearest} with the others smaller."
    )


def shard_problems(config: Any, mesh: MeshConfig, rules: DimRules) -> Iterator[str]:
    """Fields of a config that name the size of a dim (metadata "dim") and are not divisible by its shards on `mesh`."""
    problem = slice_problem(mesh, mesh.num_slices)
    if problem is not None:
        yield problem
    for leaf in walk(config):
        dim = leaf.field.metadata.get("dim")
        if dim is None or leaf.value is None or leaf.value <= 0:
            continue
        shards = rules.shards(dim, mesh)
        if leaf.value % shards:
            nearest = max(1, round(leaf.value / shards)) * shards
            axes = " x ".join(f"mesh.{axis}" for axis in rules.of(dim))
            devices = plural(shards, "device")
            yield f"{leaf.name} {leaf.value} is not a multiple of {axes} ({devices}): use {nearest}, or another mesh."
