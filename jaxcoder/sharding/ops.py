"""Code for one device, and what it exchanges with the others.

The model is written for the shards that one device holds and run by `on_each_device`; the functions below are all that
crosses devices. Every one is a single collective of the compiled program, and so is its transpose in the backward pass:
`gather` and `sum_shards` are each other's. Without a mesh, or along no axis, they leave their argument as it is.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, PartitionSpec

from jaxcoder.config.mesh import Axes, axes_of


def reshard(x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """x laid out as `spec`; x itself where there is no mesh."""
    return x if spec is None else jax.sharding.reshard(x, spec)


def specs_of(tree: Any) -> Any:
    """How the arrays of a tree are laid out, as PartitionSpecs: what `on_each_device` takes."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def on_each_device(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """`function` applied by each device to its own part of the arguments (`jax.shard_map`).

    Without a mesh, and inside another `on_each_device`, it is `function` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shard_index(axes: Axes) -> jax.Array | int:
    """On one device: which shard it has, along a dim that is split over `axes`."""
    index = 0
    for axis in axes_of(axes):
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index


def gather(x: jax.Array, axes: Axes, *, dim: int) -> jax.Array:
    """The whole of dim `dim`, of which each device along `axes` has a shard: an all-gather."""
    return jax.lax.all_gather(x, axes_of(axes), axis=dim, tiled=True) if axes_of(axes) else x


def gather_weight(kernel: jax.Array, axes: Axes, *, dim: int) -> jax.Array:
    """`gather` of a weight. Its gradient is summed with dim `dim` as the slowest-varying one of a matrix: along others,
    the TPU compiler makes an all-reduce of a reduce-scatter, which moves twice the bytes."""
    return _gather_weight(axes_of(axes), dim, kernel) if axes_of(axes) else kernel


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_weight(axes: tuple[str, ...], dim: int, kernel: jax.Array) -> jax.Array:
    return gather(kernel, axes, dim=dim)


def _gather_weight_forward(axes, dim, kernel):
    return gather(kernel, axes, dim=dim), None


def _gather_weight_backward(axes, dim, _, gradient):
    gradient = jnp.moveaxis(gradient, dim, 0)
    rows = with_layout_constraint(gradient.reshape(len(gradient), -1), Layout(major_to_minor=(0, 1)))
    rows = sum_shards(rows, axes, into=axes, dim=0)
    return (jnp.moveaxis(rows.reshape(-1, *gradient.shape[1:]), 0, dim),)


_gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


def own_part(x: jax.Array, axes: Axes, *, dim: int) -> jax.Array:
    """A device's shard of dim `dim`, which it has whole."""
    if not axes_of(axes):
        return x
    size = x.shape[dim] // prod(jax.lax.axis_size(axis) for axis in axes_of(axes))
    return jax.lax.dynamic_slice_in_dim(x, shard_index(axes) * size, size, dim)


def sum_shards(x: jax.Array, axes: Axes, *, into: Axes, dim: int) -> jax.Array:
    """The sum of what the devices along `axes` have, of which each along `into` keeps its shard of dim `dim`.

    A reduce-scatter where `axes` and `into` are the same, an all-reduce where `into` is None.
    """
    axes, into = axes_of(axes), axes_of(into)
    if axes and axes == into:
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    return own_part(jax.lax.psum(x, axes) if axes else x, into, dim=dim)


def lookup(table: jax.Array, ids: jax.Array, axes: Axes) -> jax.Array:
    """table[ids], (..., D), of a table (V, D) whose rows are split over `axes`: zeros where another device has the row.

    The gradient is summed up in fp32: a line end is looked up thousands of times in a batch.
    """
    index = ids - shard_index(axes) * table.shape[0]
    mine = (index >= 0) & (index < table.shape[0])
    rows = _take(table.shape[0], table, jnp.where(mine, index, 0))
    return jnp.where(mine[..., None], rows, 0) if axes_of(axes) else rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(num_rows: int, table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids]


def _take_forward(num_rows, table, ids):
    return table[ids], ids


def _take_backward(num_rows, ids, cotangent):
    zeros = jnp.zeros((num_rows, cotangent.shape[-1]), jnp.float32)
    return zeros.at[ids].add(cotangent.astype(jnp.float32)).astype(cotangent.dtype), None


_take.defvjp(_take_forward, _take_backward)
