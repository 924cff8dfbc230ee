"""Attention in blocks of queries and keys, in plain XLA: memory O(S) instead of O(S * T), on any device.

Online softmax in the forward pass (Milakov & Gimelshein 2018), recomputed probabilities in the backward pass (Dao et
al. 2022). Key blocks that are masked for all queries of a block by causality are skipped.
Shapes inside: q (B, G, N, S, K) with N = H / G query heads per key/value head; k, v (B, G, T, K); S and T are padded to
multiples of the block sizes. Scores, sums and accumulators are fp32.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxcoder.kernels.attention.mask import MASKED_SCORE, AttentionContext, AttentionSpec, dropout_scale, visible

BLOCK_Q = 256
BLOCK_KV = 256


def attention(
    spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array, context: AttentionContext
) -> tuple[jax.Array, jax.Array]:
    """q (B, S, H, K); k, v (B, T, G, K). Returns (B, S, H, K) in q's dtype and the log-sum-exp, fp32 (B, H, S)."""
    q_len, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    block_q, block_kv = min(BLOCK_Q, q_len), min(BLOCK_KV, k.shape[1])
    folded = q.reshape(*q.shape[:2], groups, heads // groups, q.shape[3]).transpose(0, 2, 3, 1, 4)
    tiles = _Tiles(spec, k.shape[1], block_q, block_kv)
    out, log_sum_exp = _blockwise(
        tiles,
        _pad(folded, 3, block_q),
        _pad(k.transpose(0, 2, 1, 3), 2, block_kv),
        _pad(v.transpose(0, 2, 1, 3), 2, block_kv),
        _pad_segments(context, block_q, block_kv),
    )
    out = out[:, :, :, :q_len].transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return out, log_sum_exp.reshape(q.shape[0], heads, -1)[:, :, :q_len]


@dataclass(frozen=True)
class _Tiles:
    """Static values: the specification, the number of keys without padding, the block sizes."""

    spec: AttentionSpec
    kv_len: int
    block_q: int
    block_kv: int

    def kv_blocks(self, q_block: jax.Array, num_kv_blocks: int, q_offset: jax.Array) -> jax.Array:
        """Number of key blocks that the queries of a block may see."""
        if not self.spec.causal:
            return jnp.int32(num_kv_blocks)
        last_position = (q_block + 1) * self.block_q - 1 + q_offset
        return jnp.clip(last_position // self.block_kv + 1, 0, num_kv_blocks)

    def tile(self, q, k, context: AttentionContext, q_block, kv_block):
        """Scaled scores of one tile, fp32 (B, G, N, block_q, block_kv), its mask, and its dropout factors or None."""
        scores = jnp.einsum("bgnsk,bgtk->bgnst", q, k, preferred_element_type=jnp.float32) * self.spec.scale
        q_index = q_block * self.block_q + jnp.arange(self.block_q)
        k_positions = kv_block * self.block_kv + jnp.arange(self.block_kv)
        q_positions = q_index + context.q_offset
        q_segments = _slice(context.segment_ids, q_block, self.block_q, 1)
        k_segments = _slice(context.kv_segment_ids, kv_block, self.block_kv, 1)
        mask = visible(self.spec, q_positions, k_positions, q_segments, k_segments) & (k_positions < self.kv_len)
        batch, groups, per_group = q.shape[:3]
        dropped = dropout_scale(self.spec, context, (batch, groups * per_group), q_positions, k_positions)
        return scores, mask[:, None, None], None if dropped is None else dropped.reshape(scores.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(tiles, q, k, v, context):
    return _forward(tiles, q, k, v, context)[0]


def _forward(tiles, q, k, v, context):
    num_q_blocks, num_kv_blocks = q.shape[3] // tiles.block_q, k.shape[2] // tiles.block_kv

    def one_q_block(q_block):
        q_tile = _slice(q, q_block, tiles.block_q, 3)

        def one_kv_block(kv_block, carry):
            largest, total, acc = carry
            k_tile, v_tile = _slice(k, kv_block, tiles.block_kv, 2), _slice(v, kv_block, tiles.block_kv, 2)
            scores, mask, dropped = tiles.tile(q_tile, k_tile, context, q_block, kv_block)
            new_largest = jnp.maximum(largest, jnp.where(mask, scores, MASKED_SCORE).max(-1))
            # The second mask is needed where all scores so far are masked: exp(score - MASKED_SCORE) is not 0 there.
            weights = jnp.where(mask, jnp.exp(scores - new_largest[..., None]), 0.0)
            # Rescales what was summed relative to the old maximum.
            shrink = jnp.exp(largest - new_largest)
            total = total * shrink + weights.sum(-1)
            # Dropout applies to the probabilities, so it does not change their sum.
            weights = weights if dropped is None else weights * dropped
            update = jnp.einsum(
                "bgnst,bgtk->bgnsk", weights.astype(v.dtype), v_tile, preferred_element_type=jnp.float32
            )
            return new_largest, total, acc * shrink[..., None] + update

        empty = jnp.zeros(q_tile.shape[:-1], jnp.float32)
        start = (empty + MASKED_SCORE, empty, jnp.zeros(q_tile.shape, jnp.float32))
        count = tiles.kv_blocks(q_block, num_kv_blocks, context.q_offset)
        largest, total, acc = jax.lax.fori_loop(0, count, one_kv_block, start)
        # A query without visible keys has a total of 0: its output is 0 and its log-sum-exp MASKED_SCORE.
        safe_total = jnp.where(total == 0.0, 1.0, total)
        out = (acc / safe_total[..., None]).astype(q.dtype)
        return out, jnp.where(total == 0.0, MASKED_SCORE, largest + jnp.log(safe_total))

    out, log_sum_exp = jax.lax.map(one_q_block, jnp.arange(num_q_blocks))
    out = checkpoint_name(jnp.moveaxis(out, 0, 3).reshape(q.shape), "attention")
    log_sum_exp = checkpoint_name(jnp.moveaxis(log_sum_exp, 0, 3).reshape(q.shape[:-1]), "attention")
    return (out, log_sum_exp), (q, k, v, context, out, log_sum_exp)


def _backward(tiles, residuals, cotangents):
    q, k, v, context, out, log_sum_exp = residuals
    d_out, d_lse = cotangents
    num_q_blocks, num_kv_blocks = q.shape[3] // tiles.block_q, k.shape[2] // tiles.block_kv
    # dS = P * (dP - delta) with delta the row sums of dP * P, which equal those of dO * O: computed here once, without
    # probabilities. The cotangent of the log-sum-exp adds P * d_lse to dS.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse

    def one_q_block(carry, q_block):
        q_tile, do_tile = _slice(q, q_block, tiles.block_q, 3), _slice(d_out, q_block, tiles.block_q, 3)
        lse_tile, delta_tile = _slice(log_sum_exp, q_block, tiles.block_q, 3), _slice(delta, q_block, tiles.block_q, 3)

        def one_kv_block(kv_block, carry):
            dq, dk, dv = carry
            k_tile, v_tile = _slice(k, kv_block, tiles.block_kv, 2), _slice(v, kv_block, tiles.block_kv, 2)
            scores, mask, dropped = tiles.tile(q_tile, k_tile, context, q_block, kv_block)
            probabilities = jnp.where(mask, jnp.exp(scores - lse_tile[..., None]), 0.0)
            after_dropout = probabilities if dropped is None else probabilities * dropped
            # All N query heads of a key/value head add to its dV and dK.
            dv_tile = jnp.einsum(
                "bgnst,bgnsk->bgtk", after_dropout.astype(do_tile.dtype), do_tile, preferred_element_type=jnp.float32
            )
            dp = jnp.einsum("bgnsk,bgtk->bgnst", do_tile, v_tile, preferred_element_type=jnp.float32)
            dp = dp if dropped is None else dp * dropped
            ds = (probabilities * (dp - delta_tile[..., None]) * tiles.spec.scale).astype(q.dtype)
            dq = dq + jnp.einsum("bgnst,bgtk->bgnsk", ds, k_tile, preferred_element_type=jnp.float32)
            dk_tile = jnp.einsum("bgnst,bgnsk->bgtk", ds, q_tile, preferred_element_type=jnp.float32)
            return dq, _add_slice(dk, dk_tile, kv_block), _add_slice(dv, dv_tile, kv_block)

        count = tiles.kv_blocks(q_block, num_kv_blocks, context.q_offset)
        start = (jnp.zeros(q_tile.shape, jnp.float32), *carry)
        dq, dk, dv = jax.lax.fori_loop(0, count, one_kv_block, start)
        return (dk, dv), dq.astype(q.dtype)

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(one_q_block, start, jnp.arange(num_q_blocks))
    return jnp.moveaxis(dq, 0, 3).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_forward, _backward)


def _slice(x, block, size, axis):
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _add_slice(total, tile, block):
    start = block * tile.shape[2]
    old = jax.lax.dynamic_slice_in_dim(total, start, tile.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + tile, start, 2)


def _pad(x, axis, block):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths)


def _pad_segments(context: AttentionContext, block_q: int, block_kv: int) -> AttentionContext:
    if context.segment_ids is None:
        return context
    return replace(
        context,
        segment_ids=_pad(context.segment_ids, 1, block_q),
        kv_segment_ids=_pad(context.kv_segment_ids, 1, block_kv),
    )
