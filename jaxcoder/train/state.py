"""The training state: weights, optimizer state, number of completed steps; and its flat form on disk."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxcoder.checkpoint.names import flatten_tree, unflatten_tree
from jaxcoder.config import RunConfig
from jaxcoder.models.protocol import Model, make_model
from jaxcoder.train.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """step: int32 scalar, completed optimizer steps. model: fp32. optimizer_state: an opaque pytree whose arrays have
    the shapes and shardings of the model's arrays."""

    step: jax.Array
    model: Model
    optimizer_state: optax.OptState


def initial_state(config: RunConfig) -> TrainState:
    """Random weights from `config.seed`, the same on every mesh. Call under jit and a mesh."""
    return state_of(make_model(config.model, config.compute, seed=config.seed), config)


def state_of(model: Model, config: RunConfig) -> TrainState:
    """Step 0 with these weights and a new optimizer state. Call under jit and the mesh of the weights."""
    return TrainState(step=jnp.int32(0), model=model, optimizer_state=make_optimizer(config).init(model))


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing."""
    with jax.set_mesh(mesh):
        return jax.eval_shape(lambda: initial_state(config))


def flatten_state(state: TrainState) -> dict[str, jax.Array]:
    """The arrays of a checkpoint under their names on disk (checkpoint/names.py), as new buffers; of shapes, shapes."""
    return (
        flatten_tree(state.model, "params/") | flatten_tree(state.optimizer_state, "optimizer/") | {"step": state.step}
    )


def unflatten_state(abstract: TrainState, arrays: dict[str, jax.Array]) -> TrainState:
    """The inverse of `flatten_state`, in the shardings of `abstract`; empties `arrays`."""
    return TrainState(
        step=arrays.pop("step"),
        model=unflatten_tree(abstract.model, arrays, "params/"),
        optimizer_state=unflatten_tree(abstract.optimizer_state, arrays, "optimizer/"),
    )
