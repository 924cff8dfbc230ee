"""Where versions of JAX differ, one small function each; the rest of the code does not know which it runs on."""

import jax


def approximate_reciprocal(x: jax.Array) -> jax.Array:
    """Inside a Pallas TPU kernel: the hardware's guess at 1 / x. JAX 0.12 moved it to the TPU's own module."""
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    module = tpu if hasattr(tpu, "reciprocal") else pallas
    return module.reciprocal(x, approx=True)
