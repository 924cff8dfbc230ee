"""cuDNN flash attention through `jax.nn.dot_product_attention`: for GPUs and the causal mask only.

Not supported: documents, whose mask would have to be a dense array; dropout, whose bits would differ from the other
backends; the log-sum-exp, which has no gradient there.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcoder.kernels.attention.mask import AttentionContext, AttentionSpec

IMPLEMENTATION: Literal["cudnn"] = "cudnn"
MOST_HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class Call:
    """Features that an attention call uses."""

    has_segments: bool
    has_offset: bool
    has_dropout: bool
    wants_log_sum_exp: bool


def refusal(call: Call, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why cuDNN cannot run a call, as the end of a sentence "takes ..."; None if it can."""
    if call.has_segments:
        return "no segment_ids"
    if call.has_dropout:
        return "no dropout_rate"
    if call.has_offset:
        return "no q_offset but the number 0"
    if call.wants_log_sum_exp:
        return "no return_log_sum_exp"
    if q.shape[1] != k.shape[1]:
        return f"queries and keys of one length, and got q {q.shape}, k {k.shape}"
    if q.shape[3] > MOST_HEAD_DIM or q.shape[3] % 8:
        return f"head dimensions to {MOST_HEAD_DIM} in steps of 8, and got q {q.shape}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"q, k and v all bfloat16 or all float16, and got q {q.dtype}, k {k.dtype}, v {v.dtype}"
    return None


def attention(
    spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array, context: AttentionContext
) -> tuple[jax.Array, None]:
    """q (B, S, H, K); k, v (B, S, G, K). Returns (B, S, H, K) in q's dtype, and no log-sum-exp."""
    out = jax.nn.dot_product_attention(q, k, v, scale=spec.scale, is_causal=spec.causal, implementation=IMPLEMENTATION)
    return out, None
