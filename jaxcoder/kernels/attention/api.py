"""Attention with any number of query heads per key/value head: one operation, several backends.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads (1: multi-query, H: multi-head), K head_dim.
`reference.py` defines the semantics; every backend passes the same tests.
"""

import numbers

import jax
import jax.numpy as jnp
import numpy as np

from jaxcoder.errors import ConfigError
from jaxcoder.kernels.attention import blockwise, cudnn, reference
from jaxcoder.kernels.attention.blocks_tpu import MOST_HEAD_DIM, for_device, has_kernels
from jaxcoder.kernels.attention.mask import AttentionContext, AttentionSpec


def _flash_tpu(spec, q, k, v, context):
    from jaxcoder.kernels.attention import flash_tpu  # imports Pallas

    platform, kind = _device()
    if platform != "tpu":
        raise ConfigError(
            f"attention with implementation `flash_tpu` needs a TPU, and this runs on {kind}: "
            "take `blockwise`, or None."
        )
    forward_blocks, backward_blocks = for_device(kind)
    return flash_tpu.attention(spec, q, k, v, context, forward_blocks=forward_blocks, backward_blocks=backward_blocks)


BACKENDS = {
    "reference": reference.attention,
    "blockwise": blockwise.attention,
    "flash_tpu": _flash_tpu,
    "cudnn": cudnn.attention,
}
GPUS = ("gpu", "cuda", "rocm")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_offset: jax.Array | int = 0,
    batch_offset: jax.Array | int = 0,
    head_offset: jax.Array | int = 0,
    kv_offset: jax.Array | int = 0,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
    return_log_sum_exp: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention; differentiable in q, k and v.

    Args:
        q: (B, S, H, K). k, v: (B, T, G, K) with G a divisor of H; query head h reads key/value head h // (H / G).
        causal: query at position p sees keys at positions <= p.
        segment_ids: int32 (B, S); queries see only keys of their own segment. 0 is padding: it sees no key and its
            output is zero. kv_segment_ids: int32 (B, T), default segment_ids (then S must equal T).
        q_offset: position of the first query minus position of the first key; may be negative or traced.
        batch_offset, head_offset, kv_offset: global indices of the first row, head and key, with which shards draw
            their part of one dropout mask; not used otherwise.
        scale: factor of the scores, default K ** -0.5.
        dropout_rate: of the probabilities; needs dropout_key, uint32 (2,) (see kernels/dropout).
        implementation: a name of BACKENDS, or None for the best one for this device and shape. `flash_tpu` needs
            contiguous segments. `cudnn` (GPUs) supports the causal mask only.
        return_log_sum_exp: also return the log-sum-exp of the scores, fp32 (B, H, S), for merging partial results.
    Returns:
        (B, S, H, K) in q's dtype.
    Raises:
        ConfigError that names the invalid argument, its shape and the accepted values.
    """
    scalars = dict(q_offset=q_offset, batch_offset=batch_offset, head_offset=head_offset, kv_offset=kv_offset)
    _check(q, k, v, segment_ids, kv_segment_ids, scalars, dropout_rate, dropout_key)
    if not isinstance(scale, numbers.Real | None):
        raise ConfigError(f"attention's scale is {scale!r}: give a plain number, or None for head_dim ** -0.5.")
    spec = AttentionSpec(
        causal=causal, scale=float(q.shape[-1] ** -0.5 if scale is None else scale), dropout_rate=float(dropout_rate)
    )
    context = AttentionContext(
        segment_ids=segment_ids,
        kv_segment_ids=segment_ids if kv_segment_ids is None else kv_segment_ids,
        q_offset=jnp.asarray(q_offset, jnp.int32),
        batch_offset=jnp.asarray(batch_offset, jnp.int32),
        head_offset=jnp.asarray(head_offset, jnp.int32),
        kv_offset=jnp.asarray(kv_offset, jnp.int32),
        dropout_key=dropout_key if dropout_rate else None,
    )
    call = cudnn.Call(
        has_segments=segment_ids is not None,
        has_offset=not isinstance(q_offset, int) or q_offset != 0,
        has_dropout=dropout_rate > 0.0,
        wants_log_sum_exp=return_log_sum_exp,
    )
    name = best_implementation(call, q, k, v) if implementation is None else implementation
    if name not in BACKENDS:
        raise ConfigError(f"attention has no implementation `{name}`: choose one of {', '.join(BACKENDS)}.")
    if name == "cudnn":
        _check_cudnn(call, q, k, v)
    out, log_sum_exp = BACKENDS[name](spec, q, k, v, context)
    return (out, log_sum_exp) if return_log_sum_exp else out


def best_implementation(call: cudnn.Call, q: jax.Array, k: jax.Array, v: jax.Array) -> str:
    """`reference` for a single query; else a kernel if device, dtypes, shape and mask allow it; else `blockwise`."""
    if q.shape[1] == 1:
        return "reference"
    platform, kind = _device()
    if platform in GPUS:
        # cuDNN can be queried only if this machine has a GPU; plans are traced for absent ones.
        return "cudnn" if jax.default_backend() == "gpu" and cudnn.refusal(call, q, k, v) is None else "blockwise"
    is_typed = q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float32)
    has_kernel = platform == "tpu" and has_kernels(kind) and is_typed and q.shape[3] <= MOST_HEAD_DIM
    return "flash_tpu" if has_kernel else "blockwise"


def _check_cudnn(call: cudnn.Call, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    platform, kind = _device()
    why = f"a GPU, and this runs on {kind}" if platform not in GPUS else cudnn.refusal(call, q, k, v)
    if why is not None:
        raise ConfigError(f"attention with implementation `cudnn` takes {why}: take `blockwise`, or None.")


def _device() -> tuple[str, str]:
    """Platform and kind of the device that is traced for: of the abstract mesh if it has one, else the default."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.platform or jax.default_backend(), described.device_kind
    device = jax.local_devices()[0]
    return device.platform, device.device_kind


def _check(q, k, v, segment_ids, kv_segment_ids, scalars, dropout_rate, dropout_key) -> None:
    arrays = dict(q=q, k=k, v=v, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, dropout_key=dropout_key)
    for name, array in arrays.items():
        is_absent = array is None and name not in ("q", "k", "v")
        if not is_absent and not isinstance(array, (jax.Array, np.ndarray)):
            raise ConfigError(f"attention takes {name} as an array, and got {type(array).__name__}.")
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ConfigError(f"attention takes q (B, S, H, K) and k, v (B, T, G, K), and got {shapes}.")
    if 0 in q.shape + k.shape:
        raise ConfigError(f"attention takes q, k and v with sizes of 1 or more, and got {shapes}.")
    if q.shape[2] % k.shape[2]:
        raise ConfigError(
            f"attention takes k and v with a number of heads G that divides q's H, and got {k.shape[2]} of "
            f"{q.shape[2]} in {shapes}."
        )
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k, v)):
        raise ConfigError(
            f"attention takes floating point q, k and v, and got {q.dtype}, {k.dtype} and {v.dtype} in {shapes}."
        )
    if segment_ids is None and kv_segment_ids is not None:
        raise ConfigError(f"attention with kv_segment_ids {kv_segment_ids.shape} takes segment_ids {q.shape[:2]} too.")
    for name, ids, like in (("segment_ids", segment_ids, q), ("kv_segment_ids", kv_segment_ids, k)):
        if ids is not None and (ids.shape != like.shape[:2] or not jnp.issubdtype(ids.dtype, jnp.integer)):
            raise ConfigError(f"attention takes {name} int32 {like.shape[:2]}, and got {ids.dtype} {ids.shape}.")
    if segment_ids is not None and kv_segment_ids is None and q.shape[1] != k.shape[1]:
        raise ConfigError(
            f"attention with segment_ids and unequal lengths S and T takes kv_segment_ids {k.shape[:2]} too, and got "
            f"{shapes}."
        )
    for name, value in scalars.items():
        dtype, shape = jnp.result_type(value), jnp.shape(value)
        if shape or not jnp.issubdtype(dtype, jnp.integer):
            raise ConfigError(f"attention takes {name} as one integer, and got {dtype} {shape}.")
    if not isinstance(dropout_rate, numbers.Real) or not 0.0 <= float(dropout_rate) < 1.0:
        raise ConfigError(f"attention takes a dropout_rate in [0, 1), and got {dropout_rate!r}.")
    if dropout_rate and (dropout_key is None or dropout_key.shape != (2,) or dropout_key.dtype != jnp.uint32):
        got = "None" if dropout_key is None else f"{dropout_key.dtype} {dropout_key.shape}"
        raise ConfigError(
            f"attention with a dropout_rate takes a dropout_key uint32 (2,) of kernels/dropout, and got {got}."
        )
