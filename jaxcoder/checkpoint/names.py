"""Names of arrays on disk: a pytree in memory <-> a flat dictionary of named arrays.

A name is the tree path without the attributes that a library adds: `params/wte`, `optimizer/mu/h/00/ln_1/scale`.
Layers are stacked in memory (one Block whose arrays have a leading dim L) and single arrays on disk:
`params/h/00/attn/q/kernel`. It works for any pytree: a model, its gradients, an optimizer's state. Arrays may be
sharded; nothing is gathered on a host in either direction.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxcoder.errors import CheckpointError

STACKED = "h"
"""The attribute whose arrays have a leading layer dim."""

WRAPPERS = ("value", "inner_state", "inner_states")
"""Attributes of nnx.Param and of optax's states that add nothing to a name."""

Tree = TypeVar("Tree")


class _Leaf(NamedTuple):
    names: tuple[str, ...]
    """One flat name, or one per layer."""
    is_stacked: bool
    array: Any


def flatten_tree(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The tree as flat name -> array, one per layer, in a fixed order; every name begins with `prefix` ("params/").

    Works on jax arrays, numpy arrays and `jax.ShapeDtypeStruct`s; a layer keeps the sharding that its stack has in the
    other dims. Slices of jax arrays are new device buffers: the tree may be donated right after.
    """
    flat: dict[str, Any] = {}
    for names, is_stacked, array in _leaves(tree, prefix):
        layers = _unstack(array) if is_stacked else [array]
        flat.update(zip(names, layers, strict=True))
    return flat


def unflatten_tree(abstract: Tree, arrays: MutableMapping[str, Any], prefix: str = "") -> Tree:
    """The tree whose structure, shapes, dtypes and shardings `abstract` has, out of flat arrays.

    Only names that begin with `prefix` count. They are taken out of `arrays` as they are used, so that at most one
    stack exists twice. `abstract` comes from `jax.eval_shape`, or is a tree of arrays; where it was made under a mesh,
    that mesh has to be in scope (`jax.set_mesh`). An array without a sharding goes to the first device.
    Raises CheckpointError that names the arrays that are missing, unexpected or have another shape.
    """
    found = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    check_arrays(flatten_tree(_abstract(abstract), prefix), found)
    del found
    return assemble_tree(abstract, lambda name, target: arrays.pop(name), prefix)


def assemble_tree(abstract: Tree, fetch: Callable[[str, jax.ShapeDtypeStruct], Any], prefix: str = "") -> Tree:
    """Like `unflatten_tree`, with every array requested when it is needed: `fetch(name, target)`.

    `target` has the shape, dtype and concrete sharding that the array will get; `fetch` may return a numpy array.
    """

    def build(leaf: _Leaf) -> jax.Array:
        target = concrete(leaf.array)
        if not leaf.is_stacked:
            return _put(fetch(leaf.names[0], target), target)
        layer = _layer(target)
        stack = _stack_on_devices([_put(fetch(name, layer), layer) for name in leaf.names])
        return jax.device_put(stack, target.sharding)

    leaves = [build(leaf) for leaf in _leaves(_abstract(abstract), prefix)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), leaves)


def check_arrays(expected: Mapping[str, Any], found: Mapping[str, Any], what: str = "the checkpoint") -> None:
    """Raises CheckpointError unless both have the same names with the same shapes; dtypes may differ."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {_shape(found[name])}, expected {_shape(expected[name])}"
        for name in expected
        if name in found and tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    if problems:
        other = "optimizer" if all(problem.startswith("optimizer/") for problem in problems) else "model"
        raise CheckpointError(
            f"{what} holds another {other}: {listed(problems)}. Give the configuration it was trained with, or another "
            "checkpoint."
        )


def listed(problems: Iterable[str], at_most: int = 4) -> str:
    """The first few problems, and how many more there are."""
    problems = list(problems)
    more = len(problems) - at_most
    return "; ".join(problems[:at_most]) + (f"; and {more} more" if more > 0 else "")


def layer_digits(num_layers: int) -> int:
    """Two digits for a layer's index, three from 100 layers on, so that names sort."""
    return max(2, len(str(num_layers)))


def concrete(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and a sharding on real devices, which `jax.eval_shape` does not give: it has the abstract mesh only,
    and no sharding for scalars."""
    sharding = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
    if sharding is None:
        mesh = jax.sharding.get_mesh()
        on_first = SingleDeviceSharding(jax.local_devices()[0])
        sharding = on_first if mesh.empty else NamedSharding(mesh, PartitionSpec())
    elif isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError("the abstract tree was made under a mesh: restore inside `with jax.set_mesh(mesh):`")
        sharding = NamedSharding(mesh, sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(tree: Any, prefix: str) -> Iterator[_Leaf]:
    seen = set()
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = _keys(path)
        if keys in seen:
            raise ValueError(f"two arrays of the tree would both be called {'/'.join(keys)}: give one another name")
        seen.add(keys)
        if STACKED in keys:
            layer = keys.index(STACKED) + 1
            numbers = (f"{i:0{layer_digits(array.shape[0])}d}" for i in range(array.shape[0]))
            names = tuple(prefix + "/".join((*keys[:layer], number, *keys[layer:])) for number in numbers)
        else:
            names = (prefix + "/".join(keys),)
        yield _Leaf(names, STACKED in keys, array)


def _keys(path: tuple) -> tuple[str, ...]:
    """The attributes and keys of a tree path that make its name; positions in tuples and wrappers are left out."""
    named = (str(getattr(key, "name", getattr(key, "key", ""))) for key in path)
    return tuple(name for name in named if name and name not in WRAPPERS)


def _abstract(tree: Any) -> Any:
    """The tree with shapes for arrays; shapes are kept as they are."""

    def shape_of(leaf):
        sharding = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map(shape_of, tree)


def _unstack(stack: Any) -> list[Any]:
    if isinstance(stack, jax.ShapeDtypeStruct):
        return [_layer(stack)] * stack.shape[0]
    if isinstance(stack, jax.Array):
        _layer_sharding(stack.sharding)  # raises for a sharded layer dim
        return _unstack_on_devices(stack)
    return list(stack)


# The layer dim is not sharded, so each device slices and stacks its own shards.
_unstack_on_devices = jax.jit(lambda stack: [stack[i] for i in range(stack.shape[0])])
_stack_on_devices = jax.jit(lambda layers: jnp.stack(layers))


def _layer(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=_layer_sharding(stack.sharding))


def _layer_sharding(sharding: Sharding | None) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec)
    if spec[:1] not in ((), (None,)):
        raise ValueError(
            f"the layer dim is sharded over {spec[0]!r}: only stacks with an unsharded layer dim can be saved"
        )
    return sharding.update(spec=PartitionSpec(*spec[1:]))


def _put(array: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
    if isinstance(array, jax.Array) and array.dtype == target.dtype and array.sharding == target.sharding:
        return array
    if not isinstance(array, jax.Array):
        array = np.asarray(array).astype(target.dtype, copy=False)
    return jax.device_put(array, target.sharding).astype(target.dtype)


def _shape(array: Any) -> str:
    return f"({', '.join(map(str, array.shape))})"
