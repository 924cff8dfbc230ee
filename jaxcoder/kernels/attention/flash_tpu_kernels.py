"""The two Pallas (Mosaic) kernels of flash_tpu.py, forward and backward.

Shapes: B batch, G key/value heads, H query heads, S queries, T keys, K head_dim; P spans of keys. A block has `heads`
query heads of `block_q` queries; folded one below the other they are rows, and a chunk is the rows of `chunk_heads`.

Schedule of both kernels. Grid (B, G, H / G / heads, S / block_q, P); the backward kernel is called for one span at a
time, so its P is 1. A span of K and V stays in VMEM while the grid iterates over heads and queries. A grid step visits
only the keys that its queries attend to (schedule.py): full blocks without a mask, then the edge steps with one. The
heads of a block share every load of K and V.

Forward: scores (rows, keys) = Q K^T, online softmax, accumulator (rows, K). Backward: scores transposed, (keys, rows),
so that nothing is transposed in the loop. The kernels' own-line comments give the reasons. Reference: Dao 2023 (arXiv
2307.08691).
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxcoder.compat import approximate_reciprocal
from jaxcoder.kernels.attention.mask import MASKED_SCORE, AttentionSpec
from jaxcoder.kernels.attention.schedule import Blocks, Visits
from jaxcoder.kernels.dropout.api import survives

LOG2_E = math.log2(math.e)
HIDDEN = 2 * MASKED_SCORE
"""Score of a masked key: below the initial maximum, so that its weight is exactly zero."""
LANES = 128


@dataclass(frozen=True)
class Sizes:
    """The static arguments of a kernel: the specification and the padded sizes."""

    spec: AttentionSpec
    blocks: Blocks
    batch: int
    heads: int
    groups: int
    q_len: int
    kv_len: int
    head_dim: int
    interpret: object

    @property
    def grid(self) -> tuple[int, int, int, int, int]:
        """Batch rows, key/value heads, blocks of query heads per key/value head, blocks of queries, spans of keys."""
        blocks, per_group = self.blocks, self.heads // self.groups
        spans = self.kv_len // blocks.span_kv
        return self.batch, self.groups, per_group // blocks.heads, self.q_len // blocks.block_q, spans

    @property
    def parts(self) -> int:
        """Into how many groups the query heads of a key/value head are divided, one per core, with separate dK and
        dV."""
        cores = self.blocks.cores
        return cores if self.batch * self.groups % cores and self.grid[2] % cores == 0 else 1

    @property
    def num_chunks(self) -> int:
        return self.blocks.heads // self.blocks.chunk_heads

    @property
    def sums_by_matmul(self) -> bool:
        """Whether the matrix unit computes the sums. Not with dropout: the sum is of all weights, the product of kept
        ones."""
        return self.blocks.sums_by_matmul and self.head_dim % LANES == 0 and not self.spec.dropout_rate

    @property
    def rows(self) -> int:
        """Rows of a chunk."""
        return self.blocks.chunk_heads * self.blocks.block_q


class Specs:
    """BlockSpecs: the blocks of a grid step in the arrays.

    The second grid dim counts key/value heads, or `parts` of each.
    """

    def __init__(self, sizes: Sizes, grid: tuple[int, ...], parts: int = 1):
        blocks, head_dim = sizes.blocks, sizes.head_dim

        def spec(shape, index):
            return pl.BlockSpec(shape, lambda b, g, h, i, p, table: index(b, g, g * grid[2] + h, i, table, p))

        def span(table, b, p, i):
            return read_visits(table, grid, b, p, i).span

        self.q = spec((1, blocks.block_q, blocks.heads * head_dim), lambda b, g, h, i, t, p: (b, i, h))
        self.kv = spec((1, blocks.span_kv, head_dim), lambda b, g, h, i, t, p: (b, span(t, b, p, i), g // parts))
        self.kv_transposed = spec(
            (1, head_dim, blocks.span_kv), lambda b, g, h, i, t, p: (b, g // parts, span(t, b, p, i))
        )
        self.d_kv = spec((1, 1, blocks.span_kv, head_dim), lambda b, g, h, i, t, p: (g % parts, b, 0, g // parts))
        self.seen = spec((1, 1, blocks.block_q), lambda b, g, h, i, t, p: (b, 0, i))
        self.statistics = spec((1, blocks.heads, 1, blocks.block_q), lambda b, g, h, i, t, p: (b, h, 0, i))
        self.words = spec((1, blocks.heads, 2, blocks.block_q), lambda b, g, h, i, t, p: (b, h, 0, i))


def read_visits(table, grid, row, span, q_block) -> Visits:
    """The visits of one block of queries in one span, from the prefetched table."""
    at = ((row * grid[4] + span) * grid[3] + q_block) * len(Visits._fields)
    return Visits(*(table[at + i] for i in range(len(Visits._fields))))


def forward(sizes: Sizes, table, q, k_transposed, v, start, end, words):
    """q (B, S, H * K); k (B, G * K, T), scaled; v (B, T, G * K); start, end (B, 1, S); words (B, H, 2, S) or None.

    Returns out (B, S, H * K) and log-sum-exp (B, H, 1, S).
    """
    specs, blocks, chunks = Specs(sizes, sizes.grid), sizes.blocks, sizes.num_chunks
    statistics = pltpu.VMEM((chunks, sizes.rows, LANES), jnp.float32)
    acc_width = sizes.head_dim + LANES * sizes.sums_by_matmul
    return pl.pallas_call(
        partial(_forward_kernel, sizes),
        name="flash_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=sizes.grid,
            in_specs=[
                specs.q, specs.kv_transposed, specs.kv, specs.seen, specs.seen,
                None if words is None else specs.words,
            ],
            out_specs=[specs.q, specs.statistics],
            scratch_shapes=[
                pltpu.VMEM((chunks, sizes.rows, acc_width), jnp.float32),
                statistics,
                None if sizes.sums_by_matmul else statistics,
                pltpu.VMEM((2, blocks.block_q, LANES), jnp.int32),
                pltpu.VMEM((blocks.block_q, blocks.edge_kv), jnp.float32),
                None if words is None else pltpu.VMEM((2, chunks, sizes.rows, LANES), jnp.uint32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((sizes.batch, sizes.heads, 1, sizes.q_len), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_mib << 20,
        ),
        interpret=sizes.interpret,
    )(table, q, k_transposed, v, start, end, words)  # fmt: skip


def _forward_kernel(
    sizes, table, q_ref, k_ref, v_ref, start_ref, end_ref, words_ref, out_ref, lse_ref,
    acc_ref, max_ref, sum_ref, seen_ref, bias_ref, row_words_ref,
):  # fmt: skip
    blocks, dtype, rate, head_dim = sizes.blocks, v_ref.dtype, sizes.spec.dropout_rate, sizes.head_dim
    span = pl.program_id(4)

    # Only the maximum is reset for each block of queries. The accumulator and the sum keep the values of the block
    # before: when a row attends to its first key they are multiplied by exp2(-1e30) = 0. They only have to be finite
    # at the start. (A NaN in Q therefore spreads over its sequence and head.)
    @pl.when((pl.program_id(3) == 0) & (span == 0))
    def _():
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        if not sizes.sums_by_matmul:
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    @pl.when(span == 0)
    def _():
        max_ref[...] = jnp.full(max_ref.shape, MASKED_SCORE, jnp.float32)
        seen_ref[0], seen_ref[1] = _column(start_ref[0]), _column(end_ref[0])
        for c, head, rows, _ in _heads(sizes) if rate else ():
            for word in range(2):
                row_words_ref[word, c, rows] = _column(words_ref[0, head, word : word + 1])

    def visit(first_key, size, masked):
        # Scores are in base 2: K is scaled by scale * log2(e) outside the kernel, once per key/value head instead of
        # once per query head.
        k, v = k_ref[0, :, pl.ds(first_key, size)], v_ref[0, pl.ds(first_key, size), :]
        keys = span * blocks.span_kv + first_key + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        if masked:  # once for all heads of the block
            start, end = _wide(seen_ref[0], size), _wide(seen_ref[1], size)
            bias_ref[...] = jnp.where((keys >= start) & (keys < end), 0.0, HIDDEN)
        # If the matrix unit is wider than head_dim, columns of ones appended to V compute the sums at no cost.
        if sizes.sums_by_matmul:
            v = jnp.concatenate([v, jnp.ones((size, LANES), dtype)], axis=1)
        # The scores of the next chunk are issued before the softmax of this one, so that the matrix unit and the vector
        # unit work at the same time.
        next_scores = _dot(_rows(q_ref, 0, sizes), k)
        for c in range(sizes.num_chunks):
            scores = next_scores
            if c + 1 < sizes.num_chunks:
                next_scores = _dot(_rows(q_ref, c + 1, sizes), k)
            scores = scores + jnp.concatenate([bias_ref[...]] * blocks.chunk_heads) if masked else scores
            # Online softmax. The maximum is the same in every lane; the sum stays one partial sum per lane until the
            # end.
            largest = jnp.maximum(max_ref[c], scores.max(1, keepdims=True))
            shrink = jnp.exp2(max_ref[c] - largest)
            weights = jnp.exp2(scores - _wide(largest, size))
            max_ref[c] = largest
            if not sizes.sums_by_matmul:
                sum_ref[c] = sum_ref[c] * shrink + sum(weights[:, i : i + LANES] for i in range(0, size, LANES))
            if rate:
                words = _wide(row_words_ref[0, c], size), _wide(row_words_ref[1, c], size)
                weights = jnp.where(survives(words, keys, rate), weights, 0.0)
            acc_ref[c] = acc_ref[c] * _wide(shrink, acc_ref.shape[2]) + _dot(weights.astype(dtype), v)

    _walk(read_visits(table, sizes.grid, pl.program_id(0), span, pl.program_id(3)), blocks, visit)

    @pl.when(span == sizes.grid[4] - 1)
    def _():
        # Lane h of `columns` collects the maxima of head h, lane 64 + h its sums, so that one transpose serves all
        # heads.
        lane = jax.lax.broadcasted_iota(jnp.int32, (blocks.block_q, LANES), 1)
        columns = jnp.zeros((blocks.block_q, LANES), jnp.float32)
        for c, head, rows, lanes in _heads(sizes):
            if sizes.sums_by_matmul:
                total = acc_ref[c, rows, head_dim:]
            else:
                total = jnp.broadcast_to(sum_ref[c, rows].sum(1, keepdims=True), (blocks.block_q, LANES))
            largest = max_ref[c, rows]
            columns = jnp.where(lane == head, largest, columns)
            columns = jnp.where(lane == LANES // 2 + head, total, columns)
            inverse = _reciprocal(total * (1.0 - rate) if rate else total, dtype)
            # A row without any key (padding) has output 0 and log-sum-exp MASKED_SCORE.
            inverse = jnp.where(largest == MASKED_SCORE, 0.0, inverse)
            out_ref[0, :, lanes] = (acc_ref[c, rows, :head_dim] * _wide(inverse, head_dim)).astype(dtype)
        columns = columns.T
        largest, total = columns[: blocks.heads], columns[LANES // 2 : LANES // 2 + blocks.heads]
        log_sum_exp = (largest + jnp.log2(total)) / LOG2_E
        lse_ref[0, :, 0] = jnp.where(largest == MASKED_SCORE, MASKED_SCORE, log_sum_exp)


def backward(sizes: Sizes, table, q, k, k_transposed, v, d_out, log2_sum_exp, delta, start, end, words):
    """As `forward` takes them, of one span; k and k_transposed (B, G * K, T) are scaled.

    d_out (B, S, H * K); log2_sum_exp and delta (B, H, 1, S).
    Returns dq (B, S, H * K), in q's dtype where there is one span, else fp32; dk, dv fp32 (B, span_kv, G * K).
    """
    parts = sizes.parts
    grid = (sizes.batch, sizes.groups * parts, sizes.grid[2] // parts, sizes.grid[3], 1)
    specs, columns = Specs(sizes, grid, parts), (sizes.num_chunks, sizes.head_dim, sizes.rows)
    d_kv = jax.ShapeDtypeStruct((parts, sizes.batch, sizes.blocks.span_kv, k.shape[2]), jnp.float32)
    dq, dk, dv = pl.pallas_call(
        partial(_backward_kernel, sizes, grid),
        name="flash_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                specs.q, specs.kv, specs.kv_transposed, specs.kv, specs.q, specs.statistics, specs.statistics,
                specs.seen, specs.seen, None if words is None else specs.words,
            ],
            out_specs=[specs.q, specs.d_kv, specs.d_kv],
            scratch_shapes=[
                pltpu.VMEM(columns, q.dtype), pltpu.VMEM(columns, q.dtype), pltpu.VMEM(columns, jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype if sizes.grid[4] == 1 else jnp.float32), d_kv, d_kv],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=sizes.blocks.vmem_mib << 20,
        ),
        interpret=sizes.interpret,
    )(table, q, k, k_transposed, v, d_out, log2_sum_exp, delta, start, end, words)  # fmt: skip
    return dq, dk.sum(0), dv.sum(0)


def _backward_kernel(
    sizes, grid, table, q_ref, k_ref, kt_ref, v_ref, do_ref, lse_ref, delta_ref, start_ref, end_ref, words_ref,
    dq_ref, dk_ref, dv_ref, q_columns_ref, do_columns_ref, acc_ref,
):  # fmt: skip
    blocks, dtype, rate = sizes.blocks, v_ref.dtype, sizes.spec.dropout_rate
    todo = read_visits(table, grid, pl.program_id(0), 0, pl.program_id(3))

    # dK and dV of the span are accumulated in fp32 over all heads and queries of the group and written once: a copy per
    # query head is never made.
    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        dk_ref[...] = jnp.zeros(dk_ref.shape, jnp.float32)
        dv_ref[...] = jnp.zeros(dv_ref.shape, jnp.float32)

    # Q and dO are transposed once per block of queries, not in the loop over keys.
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
    for c, _, rows, lanes in _heads(sizes):
        q_columns_ref[c, :, rows] = _transpose(q_ref[0, :, lanes])
        do_columns_ref[c, :, rows] = _transpose(do_ref[0, :, lanes])

    def of_chunk(ref, c, word=0):
        """A row of every head of the chunk, (1, rows)."""
        heads = range(c * blocks.chunk_heads, (c + 1) * blocks.chunk_heads)
        return jnp.concatenate([ref[0, head, word : word + 1] for head in heads], axis=1)

    def visit(first_key, size, masked):
        at = pl.ds(first_key, size)
        k, k_transposed, v = k_ref[0, at, :], kt_ref[0, :, at], v_ref[0, at, :]
        keys = todo.span * blocks.span_kv + first_key + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        mask = _mask(blocks, start_ref[0], end_ref[0], keys, 1) if masked else None

        def products(c):
            return _dot(k, q_columns_ref[c]), _dot(v, do_columns_ref[c])

        following = products(0)
        for c in range(sizes.num_chunks):
            scores, d_weights = following
            if c + 1 < sizes.num_chunks:
                following = products(c + 1)
            scores = scores if mask is None else jnp.where(mask, scores, HIDDEN)
            # P = exp2(scores - log-sum-exp); dV += P^T dO; dS = P * (dP - delta); dK += dS^T Q; dQ += dS K. With
            # dropout the mask of the forward pass is computed again from the same coordinates.
            weights = jnp.exp2(scores - of_chunk(lse_ref, c))
            kept = weights
            if rate:
                keep = survives((of_chunk(words_ref, c, 0), of_chunk(words_ref, c, 1)), keys, rate)
                kept = jnp.where(keep, weights * (1.0 / (1.0 - rate)), 0.0)
                d_weights = jnp.where(keep, d_weights * (1.0 / (1.0 - rate)), 0.0)
            d_scores = (weights * (d_weights - of_chunk(delta_ref, c))).astype(dtype)
            dv_ref[0, 0, at, :] += _dot(kept.astype(dtype), _rows(do_ref, c, sizes))
            dk_ref[0, 0, at, :] += _dot(d_scores, _rows(q_ref, c, sizes))
            acc_ref[c] += _dot(k_transposed, d_scores)

    _walk(todo, blocks, visit)

    # K carries scale * log2(e): dividing by log2(e) leaves dQ with the factor `scale`.
    for c, _, rows, lanes in _heads(sizes):
        dq_ref[0, :, lanes] = (acc_ref[c, :, rows] / LOG2_E).T.astype(dq_ref.dtype)

    # Q is not scaled, so dK gets its factor here.
    @pl.when((pl.program_id(2) == grid[2] - 1) & (pl.program_id(3) == grid[3] - 1))
    def _():
        dk_ref[...] = dk_ref[...] * sizes.spec.scale


def _walk(todo: Visits, blocks: Blocks, visit) -> None:
    """Calls visit(first key, number of keys, masked) for every visit; keys count from the first of the span."""
    per_full = blocks.block_kv // blocks.edge_kv

    # The edges before and after the full blocks are one loop, so that its body is compiled once.
    def edge(i, _):
        skipped = jnp.where(i >= todo.edges_before, todo.fulls * per_full, 0)
        visit(pl.multiple_of((todo.edge + i + skipped) * blocks.edge_kv, blocks.edge_kv), blocks.edge_kv, True)

    def full(i, _):
        visit(pl.multiple_of((todo.full + i) * blocks.block_kv, blocks.block_kv), blocks.block_kv, False)

    jax.lax.fori_loop(0, todo.fulls, full, None)
    jax.lax.fori_loop(0, todo.edges, edge, None)


def _heads(sizes: Sizes):
    """For each head of a block: its chunk, its index, its rows in the chunk, its lanes in the arrays."""
    for head in range(sizes.blocks.heads):
        chunk, i = divmod(head, sizes.blocks.chunk_heads)
        rows = slice(i * sizes.blocks.block_q, (i + 1) * sizes.blocks.block_q)
        yield chunk, head, rows, slice(head * sizes.head_dim, (head + 1) * sizes.head_dim)


def _rows(ref, chunk: int, sizes: Sizes):
    """The rows of a chunk, (rows, K), from a block (1, block_q, heads * K)."""
    first = chunk * sizes.blocks.chunk_heads
    heads = range(first, first + sizes.blocks.chunk_heads)
    return jnp.concatenate([ref[0, :, h * sizes.head_dim : (h + 1) * sizes.head_dim] for h in heads])


def _transpose(x):
    """Through fp32: libtpu's cycle estimator aborts on transposes of packed dtypes."""
    return x.astype(jnp.float32).T.astype(x.dtype)


def _mask(blocks: Blocks, start, end, keys, rows_axis: int):
    """bool over keys and the rows of a chunk: whether the row attends to the key."""
    mask = (keys >= start) & (keys < end)
    return mask if blocks.chunk_heads == 1 else jnp.concatenate([mask] * blocks.chunk_heads, axis=rows_axis)


def _column(row):
    """(1, n) to (n, LANES), the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _wide(x, size: int):
    """(rows, LANES), the same in every lane, to (rows, size)."""
    return x[:, :size] if size <= LANES else jnp.concatenate([x] * (size // LANES), axis=1)


def _reciprocal(x, dtype):
    """As accurate as an output of this dtype needs: for bf16 the hardware's approximation and one Newton step."""
    if dtype == jnp.float32:
        return 1.0 / x
    guess = approximate_reciprocal(x)
    return guess * (2.0 - x * guess)


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
