"""The few operations whose sharded form differs from the plain one. Without a mesh in scope they are the plain one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxcoder.sharding.rules import Axes, ShardingRules, axes_of


def reshard(x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """x laid out as `spec`; x itself where there is no mesh."""
    return x if spec is None else jax.sharding.reshard(x, spec)


def on_each_device(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """`function` applied by each device to its own part of the arguments (`jax.shard_map`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shard_index(entry: Axes) -> jax.Array | int:
    """Inside `shard_map`: which shard this is, along a dim split as one entry of a PartitionSpec."""
    index = 0
    for axis in axes_of(entry):
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index


def lookup(table: jax.Array, ids: jax.Array, rules: ShardingRules, *, rows: str | None) -> jax.Array:
    """table[ids]: rows of (V, D) at ids (B, S), giving (B, S, D).

    `rows` names the dim of the table's rows ("vocab", or None where they are whole). Each shard looks up the ids it
    holds and the parts are summed, so that neither the table nor, in the backward pass, its gradient is ever gathered
    over that axis, as XLA's own partitioning of a gather would do.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return table[ids]
    table_spec = rules.spec(rows, None)
    row_axes = axes_of(table_spec[0])

    def local(table, ids):
        if not row_axes:
            return table[ids]
        index = ids - shard_index(table_spec[0]) * table.shape[0]
        mine = (index >= 0) & (index < table.shape[0])
        found = jnp.where(mine[..., None], table[jnp.where(mine, index, 0)], 0)
        return jax.lax.psum(found, row_axes)

    in_specs = (table_spec, rules.spec("batch", None))
    out_specs = rules.spec("batch", None, None)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)(reshard(table, table_spec), ids)
