"""The schedule of blocks against the mask as it is defined: nothing seen is skipped, nothing skipped is masked."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from attention_oracle import hostile_segments
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcoder.kernels.attention.mask import AttentionContext, AttentionSpec, visible
from jaxcoder.kernels.attention.schedule import Blocks, Intervals, intervals, visits

LENGTHS = ((700, 700), (300, 610), (130, 1))
"""Few, for every one is compiled; the segments, the offset and so the mask are drawn."""
SPANS = 512


@partial(jax.jit, static_argnums=(0, 1, 2))
def schedule(lengths, causal, block_kv, segments, kv_segments, q_offset):
    q_len, kv_len = lengths
    spec = AttentionSpec(causal=causal, scale=1.0, dropout_rate=0.0)
    zero = jnp.int32(0)
    context = AttentionContext(
        segment_ids=segments,
        kv_segment_ids=segments if kv_segments is None else kv_segments,
        q_offset=q_offset,
        batch_offset=zero,
        head_offset=zero,
        dropout_key=None,
    )
    positions, keys = jnp.arange(q_len) + q_offset, jnp.arange(kv_len)
    mask = visible(spec, positions, keys, context.segment_ids, context.kv_segment_ids)[0]
    seen = intervals(spec, context, 1, q_len, kv_len)
    blocks = Blocks(block_kv=block_kv, edge_kv=128, span_kv=SPANS).fit(q_len, kv_len, 1)
    padded = Intervals(*(jnp.pad(x, ((0, 0), (0, -q_len % blocks.block_q))) for x in seen))
    return mask, seen, visits(padded, blocks, -(-kv_len // blocks.span_kv))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(LENGTHS), st.booleans(), st.sampled_from([128, 256]))
def test_visited_blocks_are_what_the_mask_needs(seed, lengths, causal, block_kv):
    rng = np.random.default_rng(seed)
    q_len, kv_len = lengths
    segments = jnp.asarray(hostile_segments(rng, q_len))[None]
    kv_segments = None if q_len == kv_len else jnp.asarray(hostile_segments(rng, kv_len))[None]
    q_offset = jnp.int32(rng.choice([0, rng.integers(-300, 500)]))
    mask, seen, todo = jax.tree.map(np.asarray, schedule(lengths, causal, block_kv, segments, kv_segments, q_offset))
    keys = np.arange(kv_len)
    np.testing.assert_array_equal((keys >= seen.start[0][:, None]) & (keys < seen.end[0][:, None]), mask)

    blocks = Blocks(block_kv=block_kv, edge_kv=128, span_kv=SPANS).fit(q_len, kv_len, 1)
    q_pad, spans = -q_len % blocks.block_q, -(-kv_len // blocks.span_kv)
    mask = np.pad(mask, ((0, q_pad), (0, spans * blocks.span_kv - kv_len)))
    todo = [x[0] for x in todo]
    for i in range(mask.shape[0] // blocks.block_q):
        rows = mask[i * blocks.block_q : (i + 1) * blocks.block_q]
        needed = [p for p in range(spans) if rows[:, p * blocks.span_kv : (p + 1) * blocks.span_kv].any()]
        for p in range(spans):
            edge, before, edges, full, fulls, span = (int(x[p, i]) for x in todo)
            here = rows[:, p * blocks.span_kv : (p + 1) * blocks.span_kv]
            visited = np.zeros(blocks.span_kv, int)
            for j in range(full, full + fulls):
                at = slice(j * blocks.block_kv, (j + 1) * blocks.block_kv)
                assert here[:, at].all()
                visited[at] += 1
            for j in range(edges):
                at = edge + j + (fulls * blocks.block_kv // blocks.edge_kv if j >= before else 0)
                at = slice(at * blocks.edge_kv, (at + 1) * blocks.edge_kv)
                visited[at] += 1
                assert here.any()
            assert visited.max() <= 1
            assert not here[:, visited == 0].any()
            if len(steps := np.flatnonzero(visited)):  # The first and the last 128 keys of what is visited are needed.
                assert here[:, steps[0] : steps[0] + 128].any() and here[:, steps[-1] - 127 : steps[-1] + 1].any()
            assert span in needed if needed else span == 0
            assert p not in needed or span == p
