"""Which mesh axis each named dimension is split over: one rule per dimension, one place.

A mesh *axis* is one of MESH_AXES; a *dim* is a dimension of an array ("batch", "heads", ...). Model code names dims
and asks for a `PartitionSpec`; it never names an axis. Reference: the JAX guide to explicit sharding.
"""

from dataclasses import dataclass

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

    @classmethod
    def for_model(cls, config: ModelConfig) -> "ShardingRules":
        """The rules of training: several key/value heads are split like the query heads they belong to."""
        return cls(kv_heads=None if config.num_kv_heads == 1 else "tensor")

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
            axes = None if dim is None else getattr(self, dim)
            axes = (axes,) if isinstance(axes, str) else axes or ()
            axes = tuple(axis for axis in axes if axis in mesh.axis_names)
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
