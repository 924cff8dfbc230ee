"""Where versions of JAX differ, one small function each; the rest of the code does not know which it runs on."""

from typing import Any

import jax


def coordination_client() -> Any:
    """JAX's client of the service that the processes of a run share, which has no public name; None in a single one."""
    from jax._src import distributed

    return distributed.global_state.client


def detect_tpu_pod(seconds: int) -> tuple[str, int, int]:
    """(coordinator, processes, index of this one) as the TPU's metadata say, by JAX's own reading of them."""
    from jax._src.clusters import ClusterEnv

    detected = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, seconds)
    coordinator, count, index, _ = detected
    if coordinator is None or count is None or index is None:
        raise RuntimeError("no metadata of a TPU are here")
    return coordinator, count, index


def approximate_reciprocal(x: jax.Array) -> jax.Array:
    """Inside a Pallas TPU kernel: the hardware's guess at 1 / x. JAX 0.12 moved it to the TPU's own module."""
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    module = tpu if hasattr(tpu, "reciprocal") else pallas
    return module.reciprocal(x, approx=True)
