"""The learning rate of a step: linear warm-up, then a cosine to a floor."""

import math
from typing import Any

from jaxcoder.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: Any, num_steps: int) -> Any:
    """The rate of the update that completes `step` (1 is the first), fp32, of the shape of `step`.

    Linear from 0 to the peak at warmup_steps, a cosine to the floor at decay_steps (default num_steps), then the floor.
    `step` is a number, a numpy array or a jax array, traced or not; numpy is imported for the first two.
    """
    if hasattr(step, "__array_namespace__"):
        xp = step.__array_namespace__()
    else:
        import numpy as xp
    step, warmup = xp.asarray(step, dtype=xp.float32), config.warmup_steps
    decay_steps = num_steps if config.decay_steps is None else config.decay_steps
    drop = config.peak_learning_rate - config.final_learning_rate
    progress = xp.clip((step - warmup) / max(decay_steps - warmup, 1), 0.0, 1.0)
    cosine = config.final_learning_rate + 0.5 * drop * (1.0 + xp.cos(math.pi * progress))
    return xp.where(step < warmup, config.peak_learning_rate * step / max(warmup, 1), cosine)
