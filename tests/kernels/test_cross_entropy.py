"""The chunked cross-entropy of one device against NumPy's fp64: tokens that do not fill chunks, rows held elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcoder.kernels.cross_entropy.api import losses_and_gradients, token_losses

TOKENS, EMBED, ROWS = 23, 16, 40


def draw(dtype):
    """hidden, wte, targets (some are rows of other devices), weights."""
    rng = np.random.default_rng(0)
    hidden, wte = (jnp.asarray(rng.normal(size=(n, EMBED)), dtype) for n in (TOKENS, ROWS))
    targets = rng.integers(-ROWS, 2 * ROWS, TOKENS).astype(np.int32)
    targets[:3] = 0, ROWS - 1, ROWS
    return hidden, wte, targets, rng.random(TOKENS).astype(np.float32)


def exact(hidden, wte, targets, weights):
    """Losses and gradients; a target elsewhere has a logit of 0 here."""
    x, table = np.asarray(hidden, np.float64), np.asarray(wte, np.float64)
    logits = x @ table.T
    is_target = np.arange(ROWS) == targets[:, None]
    log_sum_exp = np.log(np.exp(logits).sum(-1))
    d_logits = weights[:, None] * (np.exp(logits - log_sum_exp[:, None]) - is_target)
    return log_sum_exp - (logits * is_target).sum(-1), d_logits @ table, d_logits.T @ x


@pytest.mark.parametrize("dtype, digits", [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
@pytest.mark.parametrize("chunk_size", [1, 5, 23, 4096])
def test_losses_and_gradients(chunk_size, dtype, digits):
    arrays = draw(dtype)
    found = jax.jit(lambda *x: losses_and_gradients(*x, chunk_size=chunk_size))(*arrays)
    assert (found.losses.dtype, found.hidden.dtype, found.wte.dtype) == (jnp.float32, dtype, jnp.float32)
    for got, want in zip(found, exact(*arrays), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - want) < digits * np.linalg.norm(want)
    np.testing.assert_allclose(token_losses(*arrays[:3], chunk_size=chunk_size), found.losses, rtol=1e-6)


def test_large_logits_do_not_overflow():
    hidden, wte, targets, weights = draw(jnp.float32)
    found = losses_and_gradients(1e4 * hidden, wte, np.zeros(TOKENS, np.int32), weights, chunk_size=7)
    assert all(np.isfinite(x).all() for x in found)
