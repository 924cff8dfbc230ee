"""Reference attention in fp32 with the full S x T matrix; the tests compare every other backend with it."""

import jax
import jax.numpy as jnp

from jaxcoder.kernels.attention.mask import MASKED_SCORE, AttentionContext, AttentionSpec, dropout_scale, visible


def attention(
    spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array, context: AttentionContext
) -> tuple[jax.Array, jax.Array]:
    """q (B, S, H, K); k, v (B, T, G, K). Returns (B, S, H, K) in q's dtype and the log-sum-exp, fp32 (B, H, S)."""
    batch, q_len, heads, head_dim = q.shape
    kv_len, groups = k.shape[1], k.shape[2]
    q32 = q.astype(jnp.float32).reshape(batch, q_len, groups, heads // groups, head_dim)
    scores = jnp.einsum("bsgnk,btgk->bgnst", q32, k.astype(jnp.float32)) * spec.scale
    scores = scores.reshape(batch, heads, q_len, kv_len)

    q_positions, k_positions = jnp.arange(q_len) + context.q_offset, jnp.arange(kv_len)
    mask = visible(spec, q_positions, k_positions, context.segment_ids, context.kv_segment_ids)[:, None]
    scores = jnp.where(mask, scores, MASKED_SCORE)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - largest), 0.0)
    total = weights.sum(-1, keepdims=True)
    probabilities = weights / jnp.where(total == 0.0, 1.0, total)
    log_sum_exp = jnp.where(total == 0.0, MASKED_SCORE, largest + jnp.log(jnp.where(total == 0.0, 1.0, total)))

    dropped = dropout_scale(spec, context, (batch, heads), q_positions, k_positions)
    probabilities = probabilities if dropped is None else probabilities * dropped
    probabilities = probabilities.reshape(batch, groups, heads // groups, q_len, kv_len)
    out = jnp.einsum("bgnst,btgk->bsgnk", probabilities, v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype), log_sum_exp[..., 0]
