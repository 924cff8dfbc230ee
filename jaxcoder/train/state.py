"""What training changes: weights, Adam's moments, the number of completed steps; and its flat form on disk."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxcoder.checkpoint.names import flatten_model, unflatten_model
from jaxcoder.config import RunConfig
from jaxcoder.models.protocol import Model, make_model
from jaxcoder.train.optimizer import adam


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """step: int32 scalar, completed optimizer steps; model: fp32; moments: fp32, shaped and sharded like the model."""

    step: jax.Array
    model: Model
    moments: optax.ScaleByAdamState


def initial_state(config: RunConfig) -> TrainState:
    """Fresh weights from `config.seed`, the same on every mesh. Call under jit and a mesh."""
    model = make_model(config.model, config.compute, seed=config.seed)
    return TrainState(step=jnp.int32(0), model=model, moments=adam(config.optimizer).init(model))


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing."""
    with jax.set_mesh(mesh):
        return jax.eval_shape(lambda: initial_state(config))


def flatten_state(state: TrainState) -> dict[str, jax.Array]:
    """The arrays of a checkpoint under our own names (checkpoint/names.py), as new buffers; of shapes, shapes."""
    arrays: dict[str, jax.Array] = {}
    for prefix, tree in _trees(state).items():
        arrays |= flatten_model(tree, prefix)
    return arrays | {"optimizer/count": state.moments.count, "step": state.step}


def unflatten_state(abstract: TrainState, arrays: dict[str, jax.Array]) -> TrainState:
    """The inverse of `flatten_state`, in the shardings of `abstract`; empties `arrays`."""
    count, step = arrays.pop("optimizer/count"), arrays.pop("step")
    model, mu, nu = (unflatten_model(tree, arrays, prefix) for prefix, tree in _trees(abstract).items())
    return TrainState(step=step, model=model, moments=optax.ScaleByAdamState(count=count, mu=mu, nu=nu))


def _trees(state: TrainState) -> dict[str, Model]:
    return {"params/": state.model, "optimizer/mu/": state.moments.mu, "optimizer/nu/": state.moments.nu}
