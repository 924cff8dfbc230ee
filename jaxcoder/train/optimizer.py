"""The optimizer as one optax chain: clip -> direction (AdamW or Muon) -> weight decay -> learning rate.

To add an optimizer, add its name to `OptimizerConfig.name` and a case to `_direction`. Its state is an opaque pytree
for the training step, the shardings, the memory estimate and the checkpoints, whose names follow from its tree paths.
Reference: Loshchilov & Hutter 2019 (AdamW); Jordan 2024 and Liu et al. 2025, arXiv 2502.16982 (Muon).
"""

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from jaxcoder.config import OptimizerConfig, RunConfig
from jaxcoder.config.schedule import learning_rate

MUON_RMS = 0.2
"""Root mean square of an update before the learning rate: near AdamW's, so that its rates and decay can be kept."""


def make_optimizer(config: RunConfig) -> optax.GradientTransformationExtraArgs:
    """The chain of a run. `update` takes the extra argument `step`: the number of the step that it completes."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.max_grad_norm),
        _direction(config),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decay_mask),
        _scale_by_learning_rate(optimizer, config.num_steps),
    )


def num_updates(state: optax.OptState) -> jax.Array:
    """Number of updates in an optimizer state, int32 scalar: skipped steps are not counted."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def decay_mask(model):
    """True for the arrays with weight decay: matrices and embedding tables, not biases and norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), model)


def is_matrix(path: tuple) -> bool:
    """Whether the array at a tree path is a matrix or an embedding table."""
    return not any(getattr(entry, "name", None) in ("bias", "scale") for entry in path)


def _direction(config: RunConfig) -> optax.GradientTransformation:
    """Maps clipped gradients to an update without weight decay and learning rate."""
    optimizer = config.optimizer
    match optimizer.name:
        case "adamw":
            return optax.scale_by_adam(b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.epsilon)
        case "muon":
            muon = optax.contrib.muon(
                learning_rate=-1.0,  # optax descends; the chain's last link has the sign and the rate
                eps=optimizer.epsilon,
                adam_b1=optimizer.beta1,
                adam_b2=optimizer.beta2,
                muon_weight_dimension_numbers=lambda model: _muon_dimensions(model, config.model.embed_dim),
                consistent_rms=MUON_RMS,
            )
            return _with_automatic_sharding(muon)


def _muon_dimensions(model, embed_dim: int):
    """For each kernel of the stacked layers, the dims of its matrices' rows and columns; None for other arrays.

    One side of every matrix is the embed dim. Layers, and the dim that separates keys from values, are batch dims: each
    matrix is orthogonalized separately.
    """

    def dimensions(path, array) -> MuonDimensionNumbers | None:
        if not any(getattr(entry, "name", None) == "kernel" for entry in path):
            return None
        last = array.ndim - 1
        if array.shape[1] != embed_dim:  # (L, in..., D)
            return MuonDimensionNumbers(reduction_axis=tuple(range(1, last)), output_axis=(last,))
        first_out = 3 if array.ndim == 5 else 2  # (L, D, 2, G, K) or (L, D, out...)
        return MuonDimensionNumbers(reduction_axis=(1,), output_axis=tuple(range(first_out, array.ndim)))

    return jax.tree_util.tree_map_with_path(dimensions, model)


def _with_automatic_sharding(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets XLA choose the shardings inside `transform`: optax's matrix products do not state them."""

    def update(updates, state, params=None):
        if jax.sharding.get_abstract_mesh().empty:
            return transform.update(updates, state, params)
        shardings = jax.tree.map(lambda array: jax.typeof(array).sharding, (updates, state))
        return jax.sharding.auto_axes(transform.update, out_sharding=shardings)(updates, state, params)

    return optax.GradientTransformation(transform.init, update)


def _scale_by_learning_rate(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Like `optax.scale_by_learning_rate`, with the learning rate of `step`, an extra argument of `update`: a skipped
    step does not advance optax's count, but it advances the schedule."""

    def update(updates, state, params=None, *, step, **extra_args):
        rate = learning_rate(config, step, num_steps)
        return jax.tree.map(lambda update: -rate * update, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
