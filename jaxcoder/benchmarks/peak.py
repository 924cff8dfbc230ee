"""The peak of this machine, by JAX and by torch: a bare matmul, and reading a matrix in a product with few rows."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcoder.benchmarks import torch_reference


def devices() -> dict[str, Any]:
    """The accelerator of JAX, if any, and the load of the machine."""
    found = {} if jax.default_backend() == "cpu" else {"device": jax.devices()[0].device_kind}
    return found | {"load": round(os.getloadavg()[0], 1)}


def matmuls(size: int, dtype: str, times: int, torch_device: str | None) -> dict[str, Callable[[], object]]:
    """Name -> `times` products of two size x size matrices. torch_device: where torch computes, None without torch."""
    return _products(size, size, dtype, times, torch_device, "matmul")


def matvecs(rows: int, size: int, dtype: str, times: int, torch_device: str | None) -> dict[str, Callable[[], object]]:
    """Name -> `times` products of rows x size with size x size: a decoding step reads its weights in this way."""
    return _products(rows, size, dtype, times, torch_device, "reading a matrix")


def _products(rows, size, dtype, times, torch_device, name) -> dict[str, Callable[[], object]]:
    random = np.random.default_rng(0)
    x, w = (random.standard_normal((n, size), np.float32) for n in (rows, size))
    jax_x, jax_w = jnp.asarray(x, dtype), jnp.asarray(w, dtype)
    product = jax.jit(jnp.matmul)

    def jax_products():
        jax.block_until_ready([product(jax_x, jax_w) for _ in range(times)][-1])

    calls = {f"{name}, JAX": jax_products}
    if torch_device is not None:
        torch, _ = torch_reference.import_torch("this benchmark")
        torch_x, torch_w = (torch.from_numpy(a).to(torch_device, getattr(torch, dtype)) for a in (x, w))
        out = torch.empty_like(torch_x)

        def torch_products():
            for _ in range(times):
                torch.matmul(torch_x, torch_w, out=out)
            torch_reference.wait(torch_device)

        calls[f"{name}, PyTorch"] = torch_products
    return calls
