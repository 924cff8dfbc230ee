"""Collectives for code under `shard_map`.

The model is written for the shards of one device; only the functions below communicate. Each compiles to one
collective, and so does its transpose in the backward pass: `all_gather` and `sum_over` are transposes of each other.
Without a mesh, or for no axes, they return their argument.
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
    """x with the sharding `spec`; x itself without a mesh (spec None)."""
    return x if spec is None else jax.sharding.reshard(x, spec)


def specs_of(tree: Any) -> Any:
    """The PartitionSpecs of the arrays of a tree, as `shard_map` takes them."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def shard_map(function: Callable, *, in_specs: Any, out_specs: Any) -> Callable:
    """`jax.shard_map` over the mesh in scope; `function` itself without a mesh and inside another `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def shard_index(axes: Axes) -> jax.Array | int:
    """The index of this device's shard of a dim that is sharded over `axes`."""
    index: jax.Array | int = 0
    for axis in axes_of(axes):
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index


def all_gather(x: jax.Array, axes: Axes, *, dim: int) -> jax.Array:
    """The full dim `dim`, which is sharded over `axes`."""
    return jax.lax.all_gather(x, axes_of(axes), axis=dim, tiled=True) if axes_of(axes) else x


def all_gather_weight(kernel: jax.Array, axes: Axes, *, dim: int) -> jax.Array:
    """`all_gather` of a weight.

    Its gradient is reduce-scattered with `dim` as the slowest-varying dim of a matrix: along other dims the TPU
    compiler turns the reduce-scatter into an all-reduce, which moves twice the bytes.
    """
    return _all_gather_weight(axes_of(axes), dim, kernel) if axes_of(axes) else kernel


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_gather_weight(axes: tuple[str, ...], dim: int, kernel: jax.Array) -> jax.Array:
    return all_gather(kernel, axes, dim=dim)


def _all_gather_weight_forward(axes, dim, kernel):
    return all_gather(kernel, axes, dim=dim), None


def _all_gather_weight_backward(axes, dim, _, gradient):
    gradient = jnp.moveaxis(gradient, dim, 0)
    rows = with_layout_constraint(gradient.reshape(len(gradient), -1), Layout(major_to_minor=(0, 1)))
    rows = sum_over(rows, axes, into=axes, dim=0)
    return (jnp.moveaxis(rows.reshape(-1, *gradient.shape[1:]), 0, dim),)


_all_gather_weight.defvjp(_all_gather_weight_forward, _all_gather_weight_backward)


def local_shard(x: jax.Array, axes: Axes, *, dim: int) -> jax.Array:
    """This device's shard over `axes` of the dim `dim`, which is complete in x."""
    if not axes_of(axes):
        return x
    size = x.shape[dim] // prod(jax.lax.axis_size(axis) for axis in axes_of(axes))
    return jax.lax.dynamic_slice_in_dim(x, shard_index(axes) * size, size, dim)


def sum_over(x: jax.Array, axes: Axes, *, into: Axes, dim: int) -> jax.Array:
    """The sum over `axes`, with dim `dim` sharded over `into`.

    A reduce-scatter if `axes` equals `into`, an all-reduce if `into` is None.
    """
    axes, into = axes_of(axes), axes_of(into)
    if axes and axes == into:
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    return local_shard(jax.lax.psum(x, axes) if axes else x, into, dim=dim)


def embedding_lookup(table: jax.Array, ids: jax.Array, axes: Axes) -> jax.Array:
    """table[ids], (..., D), of a table (V, D) whose rows are sharded over `axes`; zeros for rows of another shard.

    The gradient is accumulated in fp32: a newline is looked up thousands of times in a batch.
    """
    index = ids - shard_index(axes) * table.shape[0]
    is_local = (index >= 0) & (index < table.shape[0])
    rows = _take(table.shape[0], table, jnp.where(is_local, index, 0))
    return jnp.where(is_local[..., None], rows, 0) if axes_of(axes) else rows


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(num_rows: int, table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids]


def _take_forward(num_rows, table, ids):
    return table[ids], ids


def _take_backward(num_rows, ids, cotangent):
    zeros = jnp.zeros((num_rows, cotangent.shape[-1]), jnp.float32)
    return zeros.at[ids].add(cotangent.astype(jnp.float32)).astype(cotangent.dtype), None


_take.defvjp(_take_forward, _take_backward)
