"""The keys that each query sees, and the key blocks that a query block visits: computed in O(S) outside the kernel.

With every mask of this operation (causal at any offset, documents, padding) a query sees one interval of keys,
[start, end), because documents are contiguous: two int32 per query. A query block visits the key blocks from the
smallest start to the largest end. Key blocks that all its queries see completely are visited in steps of `block_kv`
without a mask, the edges before and after them in steps of `edge_kv` with a mask.

Shapes: B batch, S queries, T keys, Q = S / block_q query blocks, P = T / span_kv spans of keys (a span is in VMEM at
once).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcoder.errors import ConfigError
from jaxcoder.kernels.attention.mask import AttentionContext, AttentionSpec


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block shapes of one kernel; the unit is positions unless stated otherwise."""

    block_q: int = 128
    """Queries of a block, a multiple of 128."""
    heads: int = 16
    """Maximum number of query heads folded into the rows of a block, at most 64."""
    chunk_heads: int = 1
    """Heads of a row chunk, the unit of the software pipeline: chunk_heads * block_q rows."""
    least_rows: int = 0
    """A block with fewer rows than this has 256 queries instead, and chunks of half as many heads."""
    block_kv: int = 512
    """Keys of a step without a mask; a multiple of edge_kv."""
    edge_kv: int = 512
    """Keys of a step with a mask; a multiple of 128."""
    span_kv: int = 8192
    """Maximum number of keys in VMEM at once; longer sequences are processed span by span."""

    sums_by_matmul: bool = False
    """Forward: compute row sums in the matrix unit, for chips where it is wider than head_dim."""

    cores: int = 1
    """Cores of a device; they share the rows of the batch, key/value heads and blocks of heads."""

    vmem_mib: int = 40
    """VMEM limit of the kernel, MiB."""

    def fit(self, q_len: int, kv_len: int, num_heads: int, *, batch_groups: int = 1, row_bytes: int = 256) -> "Blocks":
        """These blocks reduced for q_len queries, kv_len keys and num_heads query heads per key/value head.

        batch_groups: rows of the batch times key/value heads. row_bytes: bytes of one head of one position.
        """
        # VMEM: `heads` and `span_kv` are sized for 256 bytes per head and position (head_dim 128 in bf16).
        times_wider = -(-row_bytes // 256)
        most = max(1, self.heads // times_wider)
        # If the cores cannot share the batch and the key/value heads evenly, they share the blocks of query heads.
        shared = num_heads // self.cores if batch_groups % self.cores and num_heads % self.cores == 0 else num_heads
        heads = largest_divisor(shared, most)
        block_q, chunk_heads = self.block_q, self.chunk_heads
        if heads * block_q < self.least_rows:
            block_q, chunk_heads = 256, max(1, chunk_heads // 2)
        edge_kv = min(self.edge_kv, round_up(kv_len, 128))
        block_kv = edge_kv * max(1, min(self.block_kv, kv_len) // edge_kv)
        num_spans = -(-kv_len // max(self.span_kv // times_wider, block_kv))
        return replace(
            self,
            block_q=block_q,
            heads=heads,
            chunk_heads=largest_divisor(heads, chunk_heads),
            block_kv=block_kv,
            edge_kv=edge_kv,
            span_kv=round_up(-(-kv_len // num_spans), block_kv),
        )


class Intervals(NamedTuple):
    """int32 (B, S) each: query s of row b sees keys start <= t < end; both are 0 if it sees none."""

    start: jax.Array
    end: jax.Array


class Visits(NamedTuple):
    """int32 (B, P, Q) each: the steps of a query block in a span, counted from the span's first key.

    edge, edges_before, edges: first edge step (in units of edge_kv), number of edge steps before the full blocks, total
    number of edge steps. full, fulls: first full block (in units of block_kv), number of full blocks.
    span: the span to load: the nearest one that the query block needs, so that skipped spans are not fetched.
    """

    edge: jax.Array
    edges_before: jax.Array
    edges: jax.Array
    full: jax.Array
    fulls: jax.Array
    span: jax.Array


def intervals(spec: AttentionSpec, context: AttentionContext, batch: int, q_len: int, kv_len: int) -> Intervals:
    """The interval of keys that each query sees.

    Raises ConfigError if segment ids are concrete and the positions of an id are not contiguous.
    """
    positions = jnp.arange(q_len, dtype=jnp.int32)[None]
    start, end = jnp.zeros((batch, q_len), jnp.int32), jnp.full((batch, q_len), kv_len, jnp.int32)
    if context.segment_ids is not None and context.kv_segment_ids is not None:  # both or neither
        check_contiguous("segment_ids", context.segment_ids)
        if context.kv_segment_ids is context.segment_ids:
            start, end = _own_segments(context.segment_ids)
        else:
            check_contiguous("kv_segment_ids", context.kv_segment_ids)
            start, end = jax.vmap(_other_segments)(context.segment_ids, context.kv_segment_ids)
    if spec.causal:
        end = jnp.minimum(end, jnp.clip(positions + context.q_offset + 1, 0, kv_len))
    is_empty = start >= end
    return Intervals(jnp.where(is_empty, 0, start), jnp.where(is_empty, 0, end))


def visits(keys: Intervals, blocks: Blocks, num_spans: int) -> Visits:
    """The steps of every query block; keys: (B, S) with S a multiple of block_q."""
    batch = keys.start.shape[0]
    # (B, P, Q, block_q): each query's interval, clipped to each span and relative to its first key.
    start, end = (x.reshape(batch, 1, -1, blocks.block_q) for x in keys)
    offset = blocks.span_kv * jnp.arange(num_spans, dtype=jnp.int32)[:, None, None]
    start, end = (jnp.clip(x - offset, 0, blocks.span_kv) for x in (start, end))
    is_empty = start >= end
    # The block visits the keys that any of its queries sees: [first, last), rounded outwards to edge steps.
    first, last = jnp.where(is_empty, blocks.span_kv, start).min(-1), jnp.where(is_empty, 0, end).max(-1)
    some = first < last
    edge = jnp.where(some, first // blocks.edge_kv, 0)
    edge_end = jnp.where(some, -(-last // blocks.edge_kv), 0)
    # Full blocks are seen by all its queries: [largest start, smallest end), rounded inwards. A query without keys has
    # end 0, so then there is no full block.
    full = -(-jnp.where(is_empty, 0, start).max(-1) // blocks.block_kv)
    full_end = jnp.where(is_empty, 0, end).min(-1) // blocks.block_kv
    fulls = jnp.maximum(full_end - full, 0)
    per_full = blocks.block_kv // blocks.edge_kv
    edges_before = jnp.where(fulls > 0, full * per_full - edge, edge_end - edge)
    # Clip every span's index to the needed ones: an unchanged index makes Pallas skip the copy.
    span = jnp.arange(num_spans, dtype=jnp.int32)[:, None]
    nearest = jnp.clip(
        span,
        jnp.where(some, span, num_spans - 1).min(1, keepdims=True),
        jnp.where(some, span, 0).max(1, keepdims=True),
    )
    nearest = jnp.where(some.any(1, keepdims=True), nearest, 0)
    return Visits(edge, edges_before, edge_end - edge - fulls * per_full, full, fulls, nearest)


def check_contiguous(name: str, ids: jax.Array) -> None:
    """Raises ConfigError for concrete ids, (B, S), if the positions of an id other than 0 are not contiguous."""
    if isinstance(ids, jax.core.Tracer):
        return
    for row in np.asarray(ids):
        runs = row[np.flatnonzero(np.diff(row, prepend=row[0] - 1))]
        runs = runs[runs != 0]
        if len(np.unique(runs)) != len(runs):
            again = next(int(x) for i, x in enumerate(runs) if x in runs[:i])
            raise ConfigError(
                f"attention with implementation `flash_tpu` takes {name} in which every document is contiguous, and "
                f"got {name} {ids.shape} with id {again} in two runs of a row: renumber them, or take `blockwise`."
            )


def _own_segments(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[start, end) of the run of equal ids around each position, (B, S); empty for padding."""
    length = ids.shape[1]
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    is_border = ids[:, 1:] != ids[:, :-1]
    begins = jnp.pad(is_border, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(is_border, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, positions + 1, length), axis=1, reverse=True)
    return jnp.where(ids == 0, 0, start), jnp.where(ids == 0, 0, end)


def _other_segments(ids: jax.Array, kv_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[start, end) of the keys, (T,), with the id of each query, (S,); empty for padding and ids without keys."""
    order = jnp.argsort(kv_ids, stable=True).astype(jnp.int32)
    of = kv_ids[order]
    first, last = jnp.searchsorted(of, ids, side="left"), jnp.searchsorted(of, ids, side="right") - 1
    is_empty = (ids == 0) | (first > last)
    start, end = order[jnp.minimum(first, len(of) - 1)], order[jnp.maximum(last, 0)] + 1
    return jnp.where(is_empty, 0, start), jnp.where(is_empty, 0, end)


def largest_divisor(number: int, most: int) -> int:
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
