"""Which mesh axis each named dimension is split over: one rule per dimension, one place.

A mesh *axis* is one of MESH_AXES; a *dim* is a dimension of an array ("batch", "heads", ...). Model code names dims
and asks for a `PartitionSpec`; it never names an axis. Reference: the JAX guide to explicit sharding.
"""

from dataclasses import dataclass, replace
from math import prod

import jax
from jax.sharding import PartitionSpec

from jaxcoder.config import ModelConfig
from jaxcoder.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")

Axes = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Mesh axes of each dim; None keeps a dim whole. A dim of activations and one of weights may share an axis, two
    dims of one array may not."""

    batch: Axes = ("data", "fsdp")
    vocab: Axes = "tensor"
    embed: Axes = "fsdp"
    """Of weights only: the embed dim of activations stays whole."""
    heads: Axes = "tensor"
    kv_heads: Axes = None
    """The one key/value head of multi-query attention is replicated over `tensor`."""
    mlp: Axes = "tensor"
    seq: Axes = "tensor"
    """Of norms and residuals: between its matmuls a device has a part of each sequence (Korthikanti et al. 2022)."""

    @classmethod
    def for_model(cls, config: ModelConfig) -> "ShardingRules":
        """The rules of training: several key/value heads are split like the query heads they belong to."""
        return cls(kv_heads=None if config.num_kv_heads == 1 else "tensor")

    def for_length(self, length: int) -> "ShardingRules":
        """These rules for sequences of `length`, which stay whole where they cannot be split evenly.

        Text of any length can then be scored on any mesh; a training run with such a length is refused beforehand.
        """
        shards = prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in self.axes("seq"))
        return self if length % shards == 0 else self.whole_sequences()

    def whole_sequences(self) -> "ShardingRules":
        """These rules with the activations of a sequence whole on each of its devices, as decoding needs them."""
        return replace(self, seq=None)

    def axes(self, dim: str | None) -> tuple[str, ...]:
        """The axes of the mesh in scope that `dim` is split over; () without a mesh."""
        names = jax.sharding.get_abstract_mesh().axis_names
        return tuple(axis for axis in axes_of(None if dim is None else getattr(self, dim)) if axis in names)

    def spec(self, *dims: str | None) -> PartitionSpec | None:
        """The PartitionSpec of an array with these dims (None: never split) on the mesh in scope.

        Axes that the mesh lacks are left out; without a mesh the answer is None, which every `out_sharding=` takes.
        Raises ConfigError when two dims of the array would use one axis.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return None
        used: dict[str, str | None] = {}
        entries = []
        for dim in dims:
            axes = self.axes(dim)
            for axis in axes:
                if axis in used:
                    raise ConfigError(
                        f"the sharding rules split dims `{used[axis]}` and `{dim}` of one array over mesh axis `{axis}`: "
                        "give one of them another axis or None."
                    )
                used[axis] = dim
            entries.append(axes[0] if len(axes) == 1 else axes or None)
        return PartitionSpec(*entries)


def axes_of(entry: Axes) -> tuple[str, ...]:
    """One entry of a PartitionSpec as a tuple of mesh axes."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
