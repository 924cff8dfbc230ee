"""Flash attention on TPUs in Pallas (Mosaic), for query heads that share a key/value head: layouts and derivatives.

Shapes: B batch, G key/value heads, H query heads, S queries, T keys, K head_dim. The kernels (flash_tpu_kernels.py)
take q as (B, S, H * K) and k, v as (B, T, G * K): heads are adjacent in lanes, as the model computes them, so that only
K or V of one head is transposed. S and T are padded to multiples of the blocks. The keys of a query are an interval
(schedule.py). Block shapes per chip: blocks_tpu.py.
Reference: Dao 2023 (arXiv 2307.08691) for the recurrences.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxcoder.errors import ConfigError
from jaxcoder.kernels.attention import flash_tpu_kernels as kernels
from jaxcoder.kernels.attention.blocks_tpu import MOST_HEAD_DIM
from jaxcoder.kernels.attention.flash_tpu_kernels import Sizes
from jaxcoder.kernels.attention.mask import AttentionContext, AttentionSpec
from jaxcoder.kernels.attention.schedule import Blocks, Intervals, Visits, intervals, round_up, visits
from jaxcoder.kernels.dropout.api import later, outer_words


def attention(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: AttentionContext,
    *,
    forward_blocks: Blocks,
    backward_blocks: Blocks,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention by the Pallas kernels, differentiable in q, k, v.

    Args:
        q: (B, S, H, K). k, v: (B, T, G, K).
        forward_blocks, backward_blocks: block shapes, reduced to fit the arrays.
        interpret: as in `pallas_call`, to run the kernels on CPUs.
    Returns:
        (B, S, H, K) in q's dtype and the log-sum-exp, fp32 (B, H, S).
    Raises:
        ConfigError for other dtypes, a head_dim without a kernel, and concrete segment ids with an id in two places.
    """
    batch, q_len, heads, head_dim = q.shape
    kv_len, groups = k.shape[1], k.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ConfigError(
            "attention with implementation `flash_tpu` takes q, k and v all bfloat16 or all float32, and got "
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}: convert them, or take `blockwise`."
        )
    if head_dim > MOST_HEAD_DIM:
        raise ConfigError(
            f"attention with implementation `flash_tpu` has kernels for head dimensions to {MOST_HEAD_DIM}, and got q "
            f"{q.shape}: take `blockwise`."
        )
    row_bytes = round_up(head_dim, 128) * q.dtype.itemsize
    both = [
        blocks.fit(q_len, kv_len, heads // groups, batch_groups=batch * groups, row_bytes=row_bytes)
        for blocks in (forward_blocks, backward_blocks)
    ]
    q_pad = round_up(q_len, max(blocks.block_q for blocks in both)) - q_len  # powers of two
    # Each kernel pads T to its own spans; the arrays are padded to the larger of the two.
    kv_lens = [round_up(kv_len, blocks.span_kv) for blocks in both]
    kv_pad = max(kv_lens) - kv_len
    # Heads are adjacent in lanes: a block of heads must be a multiple of 128 lanes, or all heads. If it is not, K is
    # padded to a multiple of 128.
    groups_fit = [groups == 1 or head_dim % 128 == 0]
    heads_fit = [blocks.heads == heads or blocks.heads * head_dim % 128 == 0 for blocks in both]
    dim_pad = 0 if all(groups_fit + heads_fit) and (head_dim < 128 or head_dim % 128 == 0) else -head_dim % 128
    sizes = [
        Sizes(spec, blocks, batch, heads, groups, q_len + q_pad, padded, head_dim + dim_pad, interpret)
        for blocks, padded in zip(both, kv_lens, strict=False)
    ]
    seen = Intervals(*(jnp.pad(x, ((0, 0), (0, q_pad))) for x in intervals(spec, context, batch, q_len, kv_len)))
    words = _dropout_words(context, batch, heads, q_len + q_pad) if spec.dropout_rate else None
    out, log_sum_exp = _flash(
        *sizes, _pack(q, q_pad, dim_pad), _pack(k, kv_pad, dim_pad), _pack(v, kv_pad, dim_pad), seen, words
    )
    out = out.reshape(batch, q_len + q_pad, heads, head_dim + dim_pad)
    return out[:, :q_len, :, :head_dim], log_sum_exp[:, :, :q_len]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(forward_sizes, backward_sizes, q, k, v, seen, words):
    return _forward(forward_sizes, backward_sizes, q, k, v, seen, words)[0]


def _forward(sizes: Sizes, _, q, k, v, seen: Intervals, words):
    """q (B, S, H * K); k, v (B, T, G * K). Returns out (B, S, H * K) and log-sum-exp (B, H, S)."""
    table = _table(visits(seen, sizes.blocks, sizes.grid[4]))
    own_k, own_v = k[:, : sizes.kv_len], v[:, : sizes.kv_len]
    k_transposed = _scaled(sizes, own_k).swapaxes(1, 2)
    out, log_sum_exp = kernels.forward(sizes, table, q, k_transposed, own_v, *_rows(seen), words)
    out, log_sum_exp = checkpoint_name(out, "attention"), checkpoint_name(log_sum_exp[:, :, 0], "attention")
    return (out, log_sum_exp), (q, k, v, seen, words, out, log_sum_exp)


def _backward(_, sizes: Sizes, residuals, cotangents):
    q, k, v, seen, words, out, log_sum_exp = residuals
    d_out, d_lse = cotangents
    kv_pad = k.shape[1] - sizes.kv_len
    k, v = k[:, : sizes.kv_len], v[:, : sizes.kv_len]
    # delta, the row sums of dP * P, equals the row sums of dO * O: no probabilities are stored.
    by_head = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).reshape(*q.shape[:2], sizes.heads, sizes.head_dim)
    delta = by_head.sum(-1).swapaxes(1, 2) - d_lse
    statistics = (log_sum_exp * kernels.LOG2_E)[:, :, None], delta[:, :, None]
    k_scaled = _scaled(sizes, k)
    all_visits, num_spans = visits(seen, sizes.blocks, sizes.grid[4]), sizes.grid[4]

    def one_span(span):
        of_span = Visits(*(jax.lax.dynamic_slice_in_dim(x, span, 1, 1) for x in all_visits))
        table = _table(of_span._replace(span=jnp.full_like(of_span.span, span)))
        return kernels.backward(
            sizes, table, q, k_scaled, k_scaled.swapaxes(1, 2), v, d_out.astype(q.dtype), *statistics, *_rows(seen),
            words,
        )  # fmt: skip

    if num_spans == 1:
        dq, dk, dv = one_span(0)
    else:  # Each span computes dK and dV of its keys and a partial dQ, which are added here in fp32.
        empty = jnp.zeros(q.shape, jnp.float32)
        dq, (dk, dv) = jax.lax.scan(lambda dq, p: _add(dq, *one_span(p)), empty, jnp.arange(num_spans))
        dk, dv = (jnp.moveaxis(x, 0, 1).reshape(k.shape) for x in (dk, dv))
    dk, dv = (jnp.pad(x.astype(k.dtype), ((0, 0), (0, kv_pad), (0, 0))) for x in (dk, dv))
    return dq.astype(q.dtype), dk, dv, None, None


_flash.defvjp(_forward, _backward)


def _add(total, dq, dk, dv):
    return total + dq, (dk, dv)


def _scaled(sizes: Sizes, k):
    """K with the scale of the scores and log2(e): the kernels compute exp2(q k) without further factors."""
    return (k.astype(jnp.float32) * (sizes.spec.scale * kernels.LOG2_E)).astype(k.dtype)


def _table(all_visits: Visits) -> jax.Array:
    """One int32 vector, for scalar prefetch."""
    return jnp.stack(all_visits, -1).reshape(-1)


def _rows(seen: Intervals) -> tuple[jax.Array, jax.Array]:
    return seen.start[:, None], seen.end[:, None]


def _dropout_words(context: AttentionContext, batch: int, heads: int, q_len: int) -> jax.Array:
    """uint32 (B, H, 2, S): the part of the dropout hash that does not depend on the key position."""
    assert context.dropout_key is not None
    samples = jnp.arange(batch, dtype=jnp.uint32) + context.batch_offset.astype(jnp.uint32)
    all_heads = jnp.arange(heads, dtype=jnp.uint32) + context.head_offset.astype(jnp.uint32)
    positions = jnp.arange(q_len, dtype=jnp.int32) + context.q_offset + context.kv_offset
    words = outer_words(context.dropout_key, samples[:, None, None], all_heads[:, None], positions)
    return jnp.stack(later(words, context.kv_offset), 2)


def _pack(x, length, head_dim):
    """(B, S, H, K) -> (B, S, H * K), with S and K padded by zeros."""
    if length or head_dim:
        x = jnp.pad(x, ((0, 0), (0, length), (0, 0), (0, head_dim)))
    return x.reshape(*x.shape[:2], -1)
