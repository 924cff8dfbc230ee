"""Cross-entropy over a large vocabulary in chunks: the logits never exist whole, forward or backward.

Shapes: B batch, S sequence, N = B * S tokens of one device, D embed, V vocabulary rows of one device.
The log-sum-exp is built up chunk by chunk; the backward pass computes each chunk's logits again. Everything after the
matmul is fp32. Reference: the same idea for attention, Dao et al. 2022; for losses, Wijmans et al. 2024.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxcoder.sharding.ops import gather, gather_weight, on_each_device, shard_index
from jaxcoder.sharding.rules import ShardingRules


def token_losses(
    hidden: jax.Array, wte: jax.Array, targets: jax.Array, *, chunk_size: int, rules: ShardingRules
) -> jax.Array:
    """Negative log-likelihood of each target, fp32 (B, S).

    Args:
        hidden: (B, S, D) in the compute dtype. wte: the head (V, D), fp32. targets: int32 (B, S).
        chunk_size: vocabulary rows at a time, per device.
    """
    rules = rules.for_length(targets.shape[1])
    vocab_axes = rules.axes("vocab")

    def local(hidden, wte, targets):
        hidden = gather(hidden, rules.axes("seq"), dim=1)
        wte = gather_weight(wte.astype(hidden.dtype), rules.axes("embed"), dim=1)
        first = shard_index(vocab_axes) * wte.shape[0]
        log_sum_exp, target_logit = _local(hidden, wte, targets - first, chunk_size)
        if vocab_axes:
            largest = jax.lax.pmax(jax.lax.stop_gradient(log_sum_exp), vocab_axes)
            log_sum_exp = largest + jnp.log(jax.lax.psum(jnp.exp(log_sum_exp - largest), vocab_axes))
            target_logit = jax.lax.psum(target_logit, vocab_axes)
        return log_sum_exp - target_logit

    ids = rules.spec("batch", None)
    in_specs = (rules.spec("batch", "seq", None), rules.spec("vocab", "embed"), ids)
    return on_each_device(local, in_specs=in_specs, out_specs=ids)(hidden, wte, targets)


def _local(hidden, wte, targets, chunk_size):
    """Log-sum-exp over the local rows and the target's logit (0 where another shard holds it), both (B, S)."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    stats = _chunked_stats(min(chunk_size, wte.shape[0]), flat, wte, targets.reshape(-1))
    return tuple(x.reshape(targets.shape) for x in stats)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_stats(chunk, x, wte, targets):
    """x (N, D), wte (V, D), targets (N,): log-sum-exp and target logit, fp32 (N,)."""

    def body(index, carry):
        largest, total, target_logit = carry
        _, logits, is_target = _chunk_logits(chunk, index, x, wte, targets)
        new_largest = jnp.maximum(largest, logits.max(-1))
        total = total * jnp.exp(largest - new_largest) + jnp.exp(logits - new_largest[:, None]).sum(-1)
        target_logit = target_logit + jnp.where(is_target, logits, 0.0).sum(-1)
        return new_largest, total, target_logit

    start = (jnp.full(x.shape[0], -jnp.inf), jnp.zeros(x.shape[0]), jnp.zeros(x.shape[0]))
    largest, total, target_logit = jax.lax.fori_loop(0, _num_chunks(chunk, wte), body, start)
    return largest + jnp.log(total), target_logit


def _chunk_logits(chunk, index, x, wte, targets):
    """The chunk's first row, its logits (N, chunk) and where they are a token's target.

    The last chunk is moved back to end with the table; rows that the one before it covered count as minus infinity.
    """
    start = jnp.minimum(index * chunk, wte.shape[0] - chunk)
    rows = jax.lax.dynamic_slice_in_dim(wte, start, chunk)
    logits = jnp.einsum("nd,vd->nv", x, rows, preferred_element_type=jnp.float32)
    ids = start + jnp.arange(chunk)
    is_new = ids >= index * chunk
    return start, jnp.where(is_new, logits, -jnp.inf), is_new & (ids == targets[:, None])


def _forward(chunk, x, wte, targets):
    stats = _chunked_stats(chunk, x, wte, targets)
    return stats, (x, wte, targets, stats[0])


def _backward(chunk, residuals, cotangents):
    x, wte, targets, log_sum_exp = residuals
    d_lse, d_target = cotangents

    def body(index, carry):
        dx, dwte = carry
        start, logits, is_target = _chunk_logits(chunk, index, x, wte, targets)
        d_logits = jnp.exp(logits - log_sum_exp[:, None]) * d_lse[:, None] + is_target * d_target[:, None]
        d_logits = d_logits.astype(x.dtype)
        rows = jax.lax.dynamic_slice_in_dim(wte, start, chunk)
        dx = dx + jnp.einsum("nv,vd->nd", d_logits, rows, preferred_element_type=jnp.float32)
        d_rows = jnp.einsum("nv,nd->vd", d_logits, x, preferred_element_type=jnp.float32)
        old = jax.lax.dynamic_slice_in_dim(dwte, start, chunk)
        return dx, jax.lax.dynamic_update_slice_in_dim(dwte, old + d_rows, start, 0)

    start = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(wte.shape, jnp.float32))
    dx, dwte = jax.lax.fori_loop(0, _num_chunks(chunk, wte), body, start)
    return dx.astype(x.dtype), dwte.astype(wte.dtype), None


_chunked_stats.defvjp(_forward, _backward)


def _num_chunks(chunk, wte):
    return -(-wte.shape[0] // chunk)
