"""The attention mask as a specification, evaluated per tile from positions and segment ids.

Shapes: S queries, T keys of a tile. Only `reference` makes a tile of the whole sequence.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxcoder.kernels.dropout.api import keep_mask

MASKED_SCORE = -1e30
"""Finite, so that a row without visible keys has no NaN; its log-sum-exp is this value."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Static arguments of an attention call."""

    causal: bool
    scale: float
    dropout_rate: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class AttentionContext:
    """Traced arguments of an attention call, besides q, k and v.

    segment_ids (B, S), kv_segment_ids (B, T): int32 or None; 0 sees nothing and is seen by nothing.
    q_offset: position of the first query minus position of the first key.
    batch_offset, head_offset, kv_offset: global indices of the first row, head and key, for dropout;
    dropout_key: uint32 (2,) or None.
    """

    segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    q_offset: jax.Array
    batch_offset: jax.Array
    head_offset: jax.Array
    dropout_key: jax.Array | None
    kv_offset: jax.Array | int = 0


def visible(
    spec: AttentionSpec,
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
) -> jax.Array:
    """bool (B or 1, S, T): query s sees key t. Positions count from the first key; segments are (B, S) and (B, T)."""
    allowed = jnp.ones((1, q_positions.shape[0], k_positions.shape[0]), bool)
    if spec.causal:
        allowed &= q_positions[:, None] >= k_positions[None, :]
    if q_segments is not None and k_segments is not None:  # both or neither
        allowed = allowed & (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    return allowed


def dropout_scale(
    spec: AttentionSpec,
    context: AttentionContext,
    batch_heads: tuple[int, int],
    q_positions: jax.Array,
    k_positions: jax.Array,
) -> jax.Array | None:
    """fp32 (B, H, S, T): 0 where a probability is dropped, 1 / (1 - rate) elsewhere; None without dropout."""
    if spec.dropout_rate == 0.0:
        return None
    assert context.dropout_key is not None
    rows = jnp.arange(batch_heads[0], dtype=jnp.uint32) + context.batch_offset.astype(jnp.uint32)
    heads = jnp.arange(batch_heads[1], dtype=jnp.uint32) + context.head_offset.astype(jnp.uint32)
    keep = keep_mask(
        context.dropout_key,
        spec.dropout_rate,
        rows[:, None, None, None],
        heads[:, None, None],
        q_positions[:, None] + context.kv_offset,
        k_positions + context.kv_offset,
    )
    return jnp.where(keep, jnp.float32(1.0 / (1.0 - spec.dropout_rate)), 0.0)
