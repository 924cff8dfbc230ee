"""Flash attention on TPUs for query heads that share a key/value head, in Pallas (Mosaic).

Shapes: B batch, G key/value heads, N = H / G query heads of each, S queries, T keys, K head_dim, all padded to whole
blocks; P spans of keys. Scores are kept transposed, (keys, rows): maxima and sums run over sublanes, statistics are
rows of lanes, and the backward pass needs no transpose in its loop.

The schedule, forward. Grid (B, G, N / heads, S / block_q, P). One step has `heads` query heads of a block of queries,
(heads * block_q) rows, and a span of K and V, which stays in VMEM while the grid walks over heads and queries. The step
visits only the keys that its queries see (schedule.py): whole blocks without a mask, edges under one. In a step of
keys, rows are taken in chunks, and the scores of the next chunk are issued before the softmax of this one, so that
matrix unit and vector unit work at the same time.
Reference: Dao 2023 (arXiv 2307.08691) for the recurrences; the layout and the schedule are ours.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcoder.kernels.attention.mask import MASKED_SCORE, AttentionContext, AttentionSpec
from jaxcoder.kernels.attention.schedule import Blocks, Intervals, Visits, intervals, round_up, visits

LOG2_E = math.log2(math.e)
HIDDEN = 2 * MASKED_SCORE
"""Score of a key that a query does not see: below the first maximum, so that its weight is exactly zero."""


@dataclass(frozen=True)
class Static:
    """What is static about one call."""

    spec: AttentionSpec
    blocks: Blocks
    interpret: object
    vmem_limit_bytes: int


def attention(
    spec: AttentionSpec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: AttentionContext,
    *,
    blocks: Blocks = Blocks(),
    interpret: object = False,
    vmem_limit_bytes: int = 40 << 20,
) -> tuple[jax.Array, jax.Array]:
    """q (B, S, H, K); k, v (B, T, G, K). Returns (B, S, H, K) in q's dtype and the log-sum-exp, fp32 (B, H, S)."""
    batch, q_len, heads, _ = q.shape
    kv_len, groups = k.shape[1], k.shape[2]
    blocks = blocks.fit(q_len, kv_len, heads // groups)
    q_pad, kv_pad = round_up(q_len, blocks.block_q) - q_len, round_up(kv_len, blocks.span_kv) - kv_len
    seen = Intervals(*(jnp.pad(x, ((0, 0), (0, q_pad))) for x in intervals(spec, context, batch, q_len, kv_len)))
    out, log_sum_exp = _flash(
        Static(spec, blocks, interpret, vmem_limit_bytes),
        _pad(q.transpose(0, 2, 1, 3), q_pad),
        _pad(k.transpose(0, 2, 1, 3), kv_pad),
        _pad(v.transpose(0, 2, 1, 3), kv_pad),
        seen,
    )
    return out[:, :, :q_len].transpose(0, 2, 1, 3), log_sum_exp[:, :, :q_len]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static, q, k, v, seen):
    return _forward(static, q, k, v, seen)[0]


def _forward(static: Static, q, k, v, seen: Intervals):
    """q (B, H, S, K); k, v (B, G, T, K). Returns out (B, H, S, K) and log-sum-exp (B, H, S)."""
    blocks = static.blocks
    batch, heads, q_len, head_dim = q.shape
    groups, kv_len = k.shape[1], k.shape[2]
    num_spans, num_q = kv_len // blocks.span_kv, q_len // blocks.block_q
    per_group = heads // groups // blocks.heads
    grid = (batch, groups, per_group, num_q, num_spans)
    rows = blocks.chunk_heads * blocks.block_q
    num_chunks = blocks.heads // blocks.chunk_heads

    def of_q(b, g, h, i, p, _):
        return b, g * per_group + h, i, 0

    def of_k(b, g, h, i, p, table):
        return b, g, read_visits(table, grid, b, p, i).span, 0

    def of_v(b, g, h, i, p, table):
        return b, g, 0, read_visits(table, grid, b, p, i).span

    def of_stats(b, g, h, i, p, _):
        return b, g * per_group + h, 0, i

    def of_seen(b, g, h, i, p, _):
        return b, 0, i

    out, log_sum_exp = pl.pallas_call(
        partial(_forward_kernel, static, grid),
        name="flash_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((1, blocks.heads, blocks.block_q, head_dim), of_q),
                pl.BlockSpec((1, 1, blocks.span_kv, head_dim), of_k),
                pl.BlockSpec((1, 1, head_dim, blocks.span_kv), of_v),
                pl.BlockSpec((1, 1, blocks.block_q), of_seen),
                pl.BlockSpec((1, 1, blocks.block_q), of_seen),
            ],
            out_specs=[
                pl.BlockSpec((1, blocks.heads, blocks.block_q, head_dim), of_q),
                pl.BlockSpec((1, blocks.heads, 1, blocks.block_q), of_stats),
            ],
            scratch_shapes=[
                pltpu.VMEM((num_chunks, 1, rows), jnp.float32),
                pltpu.VMEM((num_chunks, 1, rows), jnp.float32),
                pltpu.VMEM((num_chunks, head_dim, rows), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, q_len), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=static.vmem_limit_bytes,
        ),
        interpret=static.interpret,
    )(
        jnp.stack(visits(seen, blocks, num_spans), -1).reshape(-1),
        (q * (static.spec.scale * LOG2_E)).astype(q.dtype),
        k,
        v.swapaxes(2, 3),
        seen.start[:, None],
        seen.end[:, None],
    )
    out, log_sum_exp = checkpoint_name(out, "attention"), checkpoint_name(log_sum_exp[:, :, 0], "attention")
    return (out, log_sum_exp), (q, k, v, seen, out, log_sum_exp)


def read_visits(table, grid, row, span, q_block) -> Visits:
    """The steps of one block of queries in one span, from the prefetched table."""
    at = ((row * grid[4] + span) * grid[3] + q_block) * len(Visits._fields)
    return Visits(*(table[at + i] for i in range(len(Visits._fields))))


def _forward_kernel(
    static, grid, table, q_ref, k_ref, v_ref, start_ref, end_ref, out_ref, lse_ref, max_ref, sum_ref, acc_ref
):
    blocks, dtype = static.blocks, v_ref.dtype
    num_chunks = blocks.heads // blocks.chunk_heads
    span = pl.program_id(4)
    todo = read_visits(table, grid, pl.program_id(0), span, pl.program_id(3))

    @pl.when(span == 0)
    def _():
        max_ref[...] = jnp.full(max_ref.shape, MASKED_SCORE, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def visit(first_key, size, masked):
        k = k_ref[0, 0, pl.ds(first_key, size), :]
        v = v_ref[0, 0, :, pl.ds(first_key, size)]
        mask = _mask(blocks, start_ref, end_ref, span * blocks.span_kv + first_key, size) if masked else None
        next_scores = _scores(k, _chunk(q_ref, 0, blocks), mask)
        for c in range(num_chunks):
            scores = next_scores
            if c + 1 < num_chunks:
                next_scores = _scores(k, _chunk(q_ref, c + 1, blocks), mask)
            largest = jnp.maximum(max_ref[c], scores.max(0, keepdims=True))
            shrink = jnp.exp2(max_ref[c] - largest)
            weights = jnp.exp2(scores - largest)
            max_ref[c] = largest
            sum_ref[c] = sum_ref[c] * shrink + weights.sum(0, keepdims=True)
            acc_ref[c] = acc_ref[c] * shrink + _dot(v, weights.astype(dtype))

    _walk(todo, blocks, visit)

    @pl.when(span == grid[4] - 1)
    def _():
        for c in range(num_chunks):
            total = sum_ref[c]
            is_empty = total == 0.0
            safe = jnp.where(is_empty, 1.0, total)
            log_sum_exp = jnp.where(is_empty, MASKED_SCORE, (max_ref[c] + jnp.log2(safe)) / LOG2_E)
            out = (acc_ref[c] / safe).astype(dtype).T
            for h in range(blocks.chunk_heads):
                rows = slice(h * blocks.block_q, (h + 1) * blocks.block_q)
                head = c * blocks.chunk_heads + h
                out_ref[0, head] = out[rows]
                lse_ref[0, head] = log_sum_exp[:, rows]


def _walk(todo: Visits, blocks: Blocks, visit) -> None:
    """Calls visit(first key, number of keys, masked) for every step."""
    per_full = blocks.block_kv // blocks.edge_kv

    def edge(i, _):
        skipped = jnp.where(i >= todo.edges_before, todo.fulls * per_full, 0)
        visit(pl.multiple_of((todo.edge + i + skipped) * blocks.edge_kv, blocks.edge_kv), blocks.edge_kv, True)

    def full(i, _):
        visit(pl.multiple_of((todo.full + i) * blocks.block_kv, blocks.block_kv), blocks.block_kv, False)

    jax.lax.fori_loop(0, todo.fulls, full, None)
    jax.lax.fori_loop(0, todo.edges, edge, None)


def _chunk(ref, c: int, blocks: Blocks):
    """Rows of chunk c, (chunk_heads * block_q, K)."""
    x = ref[0, c * blocks.chunk_heads : (c + 1) * blocks.chunk_heads]
    return x.reshape(-1, x.shape[-1])


def _scores(k, q, mask):
    """(keys, rows), base 2."""
    scores = _dot_nt(k, q)
    return scores if mask is None else jnp.where(mask, scores, HIDDEN)


def _mask(blocks: Blocks, start_ref, end_ref, first_key, size):
    """bool (size, rows of a chunk): does the row see the key? Both bounds in one unsigned comparison."""
    start, end = start_ref[0], end_ref[0]
    keys = first_key + jax.lax.broadcasted_iota(jnp.int32, (size, blocks.block_q), 0)
    mask = (keys >= start) & (keys < end)
    return mask if blocks.chunk_heads == 1 else jnp.concatenate([mask] * blocks.chunk_heads, axis=1)


def _dot(a, b):
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=_precision(a), preferred_element_type=jnp.float32)


def _dot_nt(a, b):
    """a @ b.T"""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=_precision(a), preferred_element_type=jnp.float32)


def _precision(a):
    return jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _pad(x, length):
    return jnp.pad(x, ((0, 0), (0, 0), (0, length), (0, 0))) if length else x


_flash.defvjp(_forward, lambda *x: None)
