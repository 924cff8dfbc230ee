"""The one place that knows how the module tree in memory and the arrays on disk are called.

In memory the layers are one Block whose arrays have a leading L; on disk every layer has arrays of its own, under flat
names that no module system leaks into: `params/wte`, `params/h/00/attn/q/kernel`, `optimizer/mu/h/00/ln_1/scale`.
Names come from the tree's own paths, so any tree with GPTBigCode's structure (moments, gradients) goes through here.
Arrays may be sharded: nothing is gathered on a host, neither way.
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

Model = TypeVar("Model")


class _Leaf(NamedTuple):
    names: tuple[str, ...]
    """One flat name, or one per layer."""
    is_stacked: bool
    array: Any


def flatten_model(model: Any, prefix: str = "") -> dict[str, Any]:
    """The tree as flat name -> array, layers apart, in a fixed order; every name begins with `prefix` ("params/").

    Works on jax arrays, numpy arrays and `jax.ShapeDtypeStruct`s; a layer keeps the sharding that its stack has in the
    other dims. Slices of jax arrays are new device buffers: the tree may be donated right after.
    """
    flat = {}
    for names, is_stacked, array in _leaves(model, prefix):
        layers = _unstack(array) if is_stacked else [array]
        flat.update(zip(names, layers, strict=True))
    return flat


def unflatten_model(abstract_model: Model, arrays: MutableMapping[str, Any], prefix: str = "") -> Model:
    """The model whose structure, shapes, dtypes and shardings `abstract_model` has, out of flat arrays.

    Only names that begin with `prefix` count. They are taken out of `arrays` as they are used, so that never more than
    one stack exists twice. `abstract_model` comes from `jax.eval_shape`, or is a model; where it was made under a mesh,
    that mesh has to be in scope (`jax.set_mesh`). An array without a sharding goes to the first device.
    Raises CheckpointError that names the arrays that are missing, left over or have another shape.
    """
    found = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    check_arrays(flatten_model(_abstract(abstract_model), prefix), found)
    del found
    return assemble_model(abstract_model, lambda name, target: arrays.pop(name), prefix)


def assemble_model(abstract_model: Model, fetch: Callable[[str, jax.ShapeDtypeStruct], Any], prefix: str = "") -> Model:
    """Like `unflatten_model`, with every array asked for when it is needed: `fetch(name, target)`.

    `target` has the shape, dtype and concrete sharding that the array will get; what is fetched may be a numpy array.
    """

    def build(leaf: _Leaf) -> jax.Array:
        target = concrete(leaf.array)
        if not leaf.is_stacked:
            return _put(fetch(leaf.names[0], target), target)
        layer = _layer(target)
        stack = _stack_on_devices([_put(fetch(name, layer), layer) for name in leaf.names])
        return jax.device_put(stack, target.sharding)

    leaves = [build(leaf) for leaf in _leaves(_abstract(abstract_model), prefix)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract_model), leaves)


def check_arrays(expected: Mapping[str, Any], found: Mapping[str, Any], what: str = "the checkpoint") -> None:
    """Raises CheckpointError unless both have the same names with the same shapes; dtypes may differ."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is left over" for name in found if name not in expected]
    problems += [
        f"{name} is {_shape(found[name])} where the model has {_shape(expected[name])}"
        for name in expected
        if name in found and tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    if problems:
        raise CheckpointError(
            f"{what} holds another model: {listed(problems)}. Give the configuration it was trained with, or another "
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
    """Shape, dtype and a sharding on real devices: `jax.eval_shape` knows only the abstract mesh, and of scalars none."""
    sharding = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
    if sharding is None:
        mesh = jax.sharding.get_mesh()
        on_first = SingleDeviceSharding(jax.local_devices()[0])
        sharding = on_first if mesh.empty else NamedSharding(mesh, PartitionSpec())
    elif isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError("the abstract model was made under a mesh: restore inside `with jax.set_mesh(mesh):`")
        sharding = NamedSharding(mesh, sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _leaves(model: Any, prefix: str) -> Iterator[_Leaf]:
    for path, array in jax.tree_util.tree_flatten_with_path(model)[0]:
        # The last key is the attribute of nnx.Param that holds the array; the name stays free of it.
        keys = [key.name for key in path if key.name != "value"]
        if keys[0] == STACKED:
            digits, rest = layer_digits(array.shape[0]), "/".join(keys[1:])
            names = tuple(f"{prefix}{STACKED}/{i:0{digits}d}/{rest}" for i in range(array.shape[0]))
        else:
            names = (prefix + "/".join(keys),)
        yield _Leaf(names, keys[0] == STACKED, array)


def _abstract(model: Any) -> Any:
    """The tree with shapes for arrays; shapes are kept as they are."""

    def shape_of(leaf):
        sharding = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map(shape_of, model)


def _unstack(stack: Any) -> list[Any]:
    if isinstance(stack, jax.ShapeDtypeStruct):
        return [_layer(stack)] * stack.shape[0]
    if isinstance(stack, jax.Array):
        _layer_sharding(stack.sharding)  # refuses a split layer dim
        return _unstack_on_devices(stack)
    return list(stack)


# The layer dim is whole on every device, so each device slices and stacks what it holds.
_unstack_on_devices = jax.jit(lambda stack: [stack[i] for i in range(stack.shape[0])])
_stack_on_devices = jax.jit(lambda layers: jnp.stack(layers))


def _layer(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=_layer_sharding(stack.sharding))


def _layer_sharding(sharding: Sharding | None) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec)
    if spec[:1] not in ((), (None,)):
        raise ValueError(f"the layer dim is split over {spec[0]!r}: only stacks whose layers are whole can be saved")
    return sharding.update(spec=PartitionSpec(*spec[1:]))


def _put(array: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
    if isinstance(array, jax.Array) and array.dtype == target.dtype and array.sharding == target.sharding:
        return array
    if not isinstance(array, jax.Array):
        array = np.asarray(array).astype(target.dtype, copy=False)
    return jax.device_put(array, target.sharding).astype(target.dtype)


def _shape(array: Any) -> str:
    return f"({', '.join(map(str, array.shape))})"
