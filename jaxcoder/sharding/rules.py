"""PartitionSpecs from named dims: the rules of `config/mesh.py` applied to the mesh in scope.

A mesh *axis* is one of `MESH_AXES`; a *dim* is a dimension of an array ("batch", "heads", ...). Model code names dims
and asks for a `PartitionSpec`; it never names an axis. Reference: the JAX guide to explicit sharding.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Self

import jax
from jax.sharding import PartitionSpec

from jaxcoder.config import ModelConfig
from jaxcoder.config.mesh import DimRules
from jaxcoder.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ShardingRules(DimRules):
    """`DimRules` for the mesh in scope (`jax.set_mesh`); without a mesh nothing is sharded."""

    @classmethod
    def for_model(cls, config: ModelConfig) -> Self:
        """The rules of training."""
        return cls.for_heads(config.num_kv_heads)

    def for_length(self, length: int) -> Self:
        """These rules for sequences of `length`: "seq" is unsharded if its shards do not divide the length.

        Text of any length can then be scored on any mesh. Validation refuses a training run with such a length.
        """
        shards = prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in self.axes("seq"))
        return self if length % shards == 0 else self.unsharded_sequences()

    def unsharded_sequences(self) -> Self:
        """These rules with unsharded sequences, as decoding needs them."""
        return replace(self, seq=None)

    def axes(self, dim: str | None) -> tuple[str, ...]:
        """The axes of the mesh in scope that shard `dim`; () without a mesh."""
        names = jax.sharding.get_abstract_mesh().axis_names
        return () if dim is None else tuple(axis for axis in self.of(dim) if axis in names)

    def spec(self, *dims: str | None) -> PartitionSpec | None:
        """The PartitionSpec of an array with these dims (None: never sharded) on the mesh in scope.

        Axes that the mesh lacks are left out. Without a mesh it is None, which every `out_sharding=` accepts.
        Raises ConfigError if two dims of the array would use the same axis.
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
                        f"the sharding rules shard dims `{used[axis]}` and `{dim}` "
                        f"of one array over mesh axis `{axis}`: "
                        "give one of them another axis or None."
                    )
                used[axis] = dim
            entries.append(axes[0] if len(axes) == 1 else axes or None)
        return PartitionSpec(*entries)
