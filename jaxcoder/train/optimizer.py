"""AdamW as StarCoder trained with it: warm-up, cosine to a floor, clipping, decay on matrices only.

The moments come from optax; the update is written out because it is short and the order matters:
clip -> moments -> decay -> learning rate (Loshchilov & Hutter 2019).
"""

import jax
import jax.numpy as jnp
import optax

from jaxcoder.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: jax.Array, num_steps: int) -> jax.Array:
    """fp32 scalar: the rate of the update that completes `step` (1 is the first).

    Linear from 0 to the peak at warmup_steps, then a cosine to the floor at decay_steps, then the floor.
    """
    step, warmup = step.astype(jnp.float32), config.warmup_steps
    decay_steps = num_steps if config.decay_steps is None else config.decay_steps
    span = config.peak_learning_rate - config.final_learning_rate
    progress = jnp.clip((step - warmup) / max(decay_steps - warmup, 1), 0.0, 1.0)
    cosine = config.final_learning_rate + 0.5 * span * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup, config.peak_learning_rate * step / max(warmup, 1), cosine)


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """The moment estimates; their state is `optax.ScaleByAdamState(count, mu, nu)`."""
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)


def apply_adamw(config: OptimizerConfig, model, gradients, state: optax.ScaleByAdamState, rate: jax.Array):
    """One update. Returns (model, state, global norm of the gradients before clipping, fp32 scalar)."""
    norm = optax.tree.norm(gradients)
    shrink = jnp.minimum(1.0, config.max_grad_norm / jnp.maximum(norm, 1e-30))
    updates, state = adam(config).update(jax.tree.map(lambda g: g * shrink, gradients), state, model)

    def update(path, weight, delta):
        decay = config.weight_decay if is_matrix(path) else 0.0
        return weight - rate * (delta + decay * weight)

    return jax.tree_util.tree_map_with_path(update, model, updates), state, norm


def is_matrix(path: tuple) -> bool:
    """Whether the weight at a tree path is a matrix or an embedding table, which decay; biases and norms do not."""
    return not any(getattr(entry, "name", None) in ("bias", "scale") for entry in path)
