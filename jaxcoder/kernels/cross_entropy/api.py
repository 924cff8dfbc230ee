"""Cross-entropy over a large vocabulary, computed in chunks of tokens on the shards of one device.

Shapes: N tokens, D embed, V vocabulary rows of this device; n tokens of a chunk.
The logits of a chunk exist completely, on the devices that share the vocabulary, so its softmax is known before the
next chunk, and the gradients of a sum of losses are computed in the same pass from the same logits: three matmuls. A
backward pass from the log-sum-exp alone recomputes the logits, a fourth matmul.
Everything after the logits matmul is fp32. Reference for the chunks: Wijmans et al. 2024 (arXiv 2411.09009).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Gradients(NamedTuple):
    """Gradients of the weighted sum of losses: partial sums of this device."""

    losses: jax.Array
    """fp32 (N,), without weights."""
    hidden: jax.Array
    """(N, D) in hidden's dtype: partial sum over this device's vocabulary rows."""
    wte: jax.Array
    """fp32 (V, D): partial sum over this device's tokens."""


def token_losses(
    hidden: jax.Array, wte: jax.Array, targets: jax.Array, *, chunk_size: int, axes: tuple[str, ...] = ()
) -> jax.Array:
    """Negative log-likelihood of each target, fp32 (N,). Its derivative recomputes the logits of each chunk.

    Args:
        hidden: (N, D). wte: (V, D) in any floating dtype; it is cast to hidden's.
        targets: int32 (N,), relative to this device's first row; values outside 0 to V - 1 are rows of other devices.
        chunk_size: number of tokens whose logits exist at a time.
        axes: mesh axes that shard the vocabulary, inside `shard_map`.
    """

    @jax.checkpoint
    def of_chunk(x, ids):
        return _softmax(x, wte.astype(x.dtype), ids, axes)[0]

    chunks = _chunks(chunk_size, hidden, targets)
    _, losses = jax.lax.scan(lambda _, chunk: (None, of_chunk(*chunk)), None, chunks)
    return losses.reshape(-1)[: len(targets)]


def losses_and_gradients(
    hidden: jax.Array,
    wte: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk_size: int,
    axes: tuple[str, ...] = (),
) -> Gradients:
    """`token_losses`, and the gradients of their sum weighted by `weights`, fp32 (N,), in one pass."""
    wte = wte.astype(hidden.dtype)

    def of_chunk(d_wte, chunk):
        x, ids, weight = chunk
        losses, exponentials, total, is_target = _softmax(x, wte, ids, axes)
        d_logits = exponentials * (weight / total)[:, None] - jnp.where(is_target, weight[:, None], 0.0)
        # The barrier makes XLA store d_logits; otherwise it recomputes them in the fusions of both matmuls.
        d_logits = jax.lax.optimization_barrier(d_logits.astype(x.dtype))
        d_x = jnp.einsum("nv,vd->nd", d_logits, wte, preferred_element_type=jnp.float32)
        d_wte = d_wte + jnp.einsum("nv,nd->vd", d_logits, x, preferred_element_type=jnp.float32)
        return d_wte, (losses, d_x.astype(x.dtype))

    chunks = _chunks(chunk_size, hidden, targets, weights)
    d_wte, (losses, d_hidden) = jax.lax.scan(of_chunk, jnp.zeros(wte.shape, jnp.float32), chunks)
    num_tokens = len(targets)
    return Gradients(losses.reshape(-1)[:num_tokens], d_hidden.reshape(-1, hidden.shape[1])[:num_tokens], d_wte)


def _softmax(x, wte, targets, axes):
    """Losses of a chunk (n,); exp(logits - largest) (n, V); its sum over the complete vocabulary (n,); the one-hot mask
    of the targets (n, V)."""
    logits = jnp.einsum("nd,vd->nv", x, wte, preferred_element_type=jnp.float32)
    is_target = jnp.arange(wte.shape[0]) == targets[:, None]
    largest = jax.lax.stop_gradient(logits).max(-1)
    mine = jnp.stack([largest, jnp.exp(logits - largest[:, None]).sum(-1), jnp.where(is_target, logits, 0.0).sum(-1)])
    if axes:  # One all-gather of three values per token.
        all_of_them = jax.lax.all_gather(mine, axes)
        largest = jax.lax.stop_gradient(all_of_them[:, 0]).max(0)
        total = (all_of_them[:, 1] * jnp.exp(jax.lax.stop_gradient(all_of_them[:, 0]) - largest)).sum(0)
        target_logit = all_of_them[:, 2].sum(0)
    else:
        total, target_logit = mine[1], mine[2]
    return largest + jnp.log(total) - target_logit, jnp.exp(logits - largest[:, None]), total, is_target


def _chunks(chunk_size: int, hidden: jax.Array, *of_tokens: jax.Array) -> tuple[jax.Array, ...]:
    """(N, ...) as (N / n, n, ...); the last chunk is padded with zeros, which include the weights."""
    size = min(chunk_size, len(hidden))

    def cut(x):
        missing = -len(x) % size
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
        return x.reshape(-1, size, *x.shape[1:])

    return tuple(map(cut, (hidden, *of_tokens)))
