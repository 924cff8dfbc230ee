"""Every backend of attention against the reference: values, log-sum-exp and gradients."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcoder.errors import ConfigError
from jaxcoder.kernels.attention import api, blockwise, cudnn, flash_tpu
from jaxcoder.kernels.attention.api import BACKENDS, attention
from jaxcoder.kernels.attention.schedule import Blocks

OTHERS = sorted(set(BACKENDS) - {"reference", "cudnn"})
BACKENDS_BUT_OURS = ["blockwise", "reference"]
SMALL = Blocks(block_kv=256, edge_kv=128, span_kv=256, chunk_heads=2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Small blocks, and kernels interpreted; this file's sequences are short, test_flash_tpu.py has longer ones."""
    monkeypatch.setattr(blockwise, "BLOCK_Q", 16)
    monkeypatch.setattr(blockwise, "BLOCK_KV", 32)
    interpreted = partial(flash_tpu.attention, forward_blocks=SMALL, backward_blocks=SMALL, interpret=True)
    monkeypatch.setitem(BACKENDS, "flash_tpu", interpreted)


def draw(batch, q_len, kv_len, heads, groups, head_dim=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, q_len, heads, head_dim), (batch, kv_len, groups, head_dim), (batch, kv_len, groups, head_dim)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def draw_segments(batch, length, seed=0):
    """A few documents per row and a pad at the end."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 5, (batch, length)), axis=1)
    ids[:, length - length // 7 :] = 0
    return jnp.asarray(ids, jnp.int32)


CASES = {
    "multi_query": dict(shape=(2, 48, 48, 4, 1)),
    "multi_head": dict(shape=(2, 48, 48, 4, 4)),
    "grouped": dict(shape=(1, 48, 48, 6, 2)),
    "ragged_blocks": dict(shape=(2, 45, 45, 4, 1)),
    "one_token": dict(shape=(2, 1, 70, 4, 1), q_offset=69),
    "not_causal": dict(shape=(2, 20, 70, 4, 1), causal=False),
    "later_queries": dict(shape=(1, 20, 70, 4, 1), q_offset=50),
    "earlier_queries": dict(shape=(1, 40, 40, 4, 1), q_offset=-13),
    "documents": dict(shape=(2, 48, 48, 4, 1), segments=True),
    "documents_not_causal": dict(shape=(2, 48, 48, 4, 1), segments=True, causal=False),
    "scaled": dict(shape=(1, 48, 48, 4, 1), scale=0.5),
    "dropout": dict(shape=(2, 48, 48, 4, 1), dropout_rate=0.3),
    "dropout_documents": dict(shape=(2, 45, 45, 4, 2), dropout_rate=0.1, segments=True),
}


def run(case, implementation, q, k, v):
    options = {name: value for name, value in case.items() if name not in ("shape", "segments")}
    if case.get("segments"):
        options["segment_ids"] = draw_segments(*q.shape[:2])
    if case.get("dropout_rate"):
        options["dropout_key"] = jnp.array([1, 2], jnp.uint32)
    return attention(q, k, v, implementation=implementation, return_log_sum_exp=True, **options)


IN_TIME = {"dropout_documents"}
"""Cases of interpreted kernels in every run; the others are marked slow, for each takes seconds to compile."""

BACKENDS_AND_CASES = [
    pytest.param(other, name, marks=[pytest.mark.slow] if other == "flash_tpu" and name not in IN_TIME else [])
    for other in OTHERS
    for name in CASES
]


@pytest.mark.parametrize("implementation, name", BACKENDS_AND_CASES)
def test_values_and_gradients_equal_the_reference(name, implementation):
    case = CASES[name]
    inputs = draw(*case["shape"])

    def scalar(implementation):
        def loss(q, k, v):
            out, log_sum_exp = run(case, implementation, q, k, v)
            # The log-sum-exp of rows that see nothing is a marker, not a number.
            log_sum_exp = jnp.where(log_sum_exp > -1e29, log_sum_exp, 0.0)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + (log_sum_exp**2).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))

    expected_out = run(case, "reference", *inputs)
    out = jax.jit(lambda *x: run(case, implementation, *x))(*inputs)
    np.testing.assert_allclose(out[0], expected_out[0], atol=2e-6)
    np.testing.assert_allclose(out[1], expected_out[1], rtol=2e-6, atol=2e-6)
    expected, got = scalar("reference")(*inputs), scalar(implementation)(*inputs)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for want, have in zip(expected[1], got[1]):
        np.testing.assert_allclose(have, want, atol=2e-5)


def test_reference_against_numpy_with_explicit_loops():
    q, k, v = (np.asarray(x, np.float64) for x in draw(1, 5, 7, 2, 1))
    segments_q, segments_k = np.array([1, 1, 2, 0, 2]), np.array([1, 2, 1, 2, 0, 2, 1])
    expected = np.zeros_like(q)
    for head in range(2):
        for s in range(5):
            seen = [t for t in range(7) if t <= s + 2 and segments_q[s] == segments_k[t] != 0]
            if seen:
                scores = np.array([q[0, s, head] @ k[0, t, 0] * 8**-0.5 for t in seen])
                weights = np.exp(scores - scores.max())
                expected[0, s, head] = (weights / weights.sum()) @ v[0, seen, 0]
    got = attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        segment_ids=jnp.asarray(segments_q)[None],
        kv_segment_ids=jnp.asarray(segments_k)[None],
        q_offset=2,
        implementation="reference",
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", *OTHERS])
def test_pads_are_zero_and_nothing_leaks_into_gradients(implementation):
    q, k, v = draw(2, 40, 40, 4, 1)
    segments = draw_segments(2, 40)
    out, pullback = jax.vjp(lambda *x: attention(*x, segment_ids=segments, implementation=implementation), q, k, v)
    assert np.all(np.asarray(out)[np.asarray(segments) == 0] == 0.0)
    for gradient in pullback(jnp.ones_like(out)):
        assert np.all(np.isfinite(gradient))
        assert np.all(np.asarray(gradient)[np.asarray(segments) == 0] == 0.0)


@pytest.mark.parametrize("implementation", [*BACKENDS_BUT_OURS, pytest.param("flash_tpu", marks=pytest.mark.slow)])
def test_shards_draw_their_part_of_one_dropout_mask(implementation):
    q, k, v = draw(4, 40, 40, 4, 1)
    key = jnp.array([3, 4], jnp.uint32)
    options = dict(dropout_rate=0.5, dropout_key=key, implementation=implementation)
    whole = attention(q, k, v, **options)
    part = attention(q[2:, :, 1:3], k[2:], v[2:], batch_offset=2, head_offset=1, **options)
    np.testing.assert_allclose(part, whole[2:, :, 1:3], atol=1e-6)


def test_blockwise_never_makes_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_Q", 256)
    monkeypatch.setattr(blockwise, "BLOCK_KV", 256)
    length, heads = 4096, 2
    shapes = [jax.ShapeDtypeStruct((1, length, n, 8), jnp.float32) for n in (heads, 1, 1)]

    def temporaries(implementation):
        grad = jax.grad(lambda q, k, v: attention(q, k, v, implementation=implementation).sum(), argnums=(0, 1, 2))
        return jax.jit(grad).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    matrix = length * length * heads * 4
    assert temporaries("blockwise") < matrix / 8
    assert temporaries("reference") > matrix


Q, KV, ones = (1, 4, 4, 8), (1, 4, 1, 8), partial(np.ones, dtype=np.int32)
BAD = {
    "an unknown implementation": (Q, KV, dict(implementation="flesh"), "no implementation `flesh`: choose one of refe"),
    "heads that do not divide": (Q, (1, 4, 3, 8), {}, r"heads G that divides q's H, and got 3 of 4 in q \(1, 4"),
    "other head dimensions": (Q, (1, 4, 1, 16), {}, r"k, v \(B, T, G, K\), and got q .*, k \(1, 4, 1, 16\)"),
    "too few dimensions": ((4, 4, 8), KV, {}, r"takes q \(B, S, H, K\) and .* got q \(4, 4, 8\)"),
    "no keys": (Q, (1, 0, 1, 8), {}, r"sizes of 1 or more, and got .* k \(1, 0, 1, 8\)"),
    "segments of another shape": (Q, KV, dict(segment_ids=ones((1, 5))), r"int32 \(1, 4\), and got int32 \(1, 5\)"),
    "segments of one row": (Q, KV, dict(segment_ids=ones(4)), r"segment_ids int32 \(1, 4\), and got int32 \(4,\)"),
    "segments of floats": (Q, KV, dict(segment_ids=np.ones((1, 4), np.float32)), "int32 .* got float32"),
    "segments in a list": (Q, KV, dict(segment_ids=[[1] * 4]), "segment_ids as an array, and got list"),
    "segments of keys alone": (Q, KV, dict(kv_segment_ids=ones((1, 4))), r"takes segment_ids \(1, 4\) too"),
    "segments of queries alone": (
        Q, (1, 6, 1, 8), dict(segment_ids=ones((1, 4))), r"takes kv_segment_ids \(1, 6\) too, and got q"
    ),
    "an offset for each row": (Q, KV, dict(q_offset=ones(1)), r"q_offset as one integer, and got int32 \(1,\)"),
    "half an offset": (Q, KV, dict(kv_offset=0.5), "kv_offset as one integer, and got float32"),
    "a rate above 1": (Q, KV, dict(dropout_rate=10), r"dropout_rate in \[0, 1\), and got 10"),
    "a rate in words": (Q, KV, dict(dropout_rate="0.1"), r"dropout_rate in \[0, 1\), and got '0.1'"),
    "a scale in words": (Q, KV, dict(scale="half"), "scale is 'half': give a plain number"),
    "dropout without a key": (Q, KV, dict(dropout_rate=0.1), r"dropout_key uint32 \(2,\) .* got None"),
    "a key of JAX's": (Q, KV, dict(dropout_rate=0.1, dropout_key=jax.random.key(0)), r"uint32 \(2,\) .* key<"),
    "a document in two runs": (
        Q, KV, dict(segment_ids=np.array([[1, 2, 0, 1]], np.int32), implementation="flash_tpu"),
        r"every document is contiguous, and got segment_ids \(1, 4\) with id 1 in two runs .* `blockwise`",
    ),
    "a head dimension without a kernel": (
        (1, 4, 4, 512), (1, 4, 1, 512), dict(implementation="flash_tpu"),
        r"`flash_tpu` has kernels for head dimensions to 256, and got q \(1, 4, 4, 512\): take `blockwise`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_sentence(name):
    q_shape, kv_shape, options, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as error:
        attention(jnp.zeros(q_shape), jnp.zeros(kv_shape), jnp.zeros(kv_shape), **options)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_bad_dtypes_are_named():
    q, k, v = draw(1, 4, 4, 4, 1)
    with pytest.raises(ConfigError, match=r"floating point q, k and v, and got int32, float32 and float32 in q \(1, 4"):
        attention(q.astype(jnp.int32), k, v)
    with pytest.raises(ConfigError, match="all bfloat16 or all float32, and got q float32, k bfloat16, v bfloat16"):
        attention(q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), implementation="flash_tpu")
    with pytest.raises(ConfigError, match="all bfloat16 or all float32, and got q float16, .* or take `blockwise`"):
        attention(*(x.astype(jnp.float16) for x in (q, k, v)), implementation="flash_tpu")


def test_kernels_are_refused_where_they_cannot_run(monkeypatch):
    monkeypatch.undo()
    q, k, v = draw(1, 4, 4, 4, 1)
    with pytest.raises(ConfigError, match="`flash_tpu` needs a TPU, and this runs on cpu"):
        attention(q, k, v, implementation="flash_tpu")


PLAIN = cudnn.Call(has_segments=False, has_offset=False, has_dropout=False, wants_log_sum_exp=False)


def test_the_kernels_are_chosen_where_they_compile(monkeypatch):
    q = jnp.zeros((1, 128, 4, 64), jnp.bfloat16)
    for device, expected in (
        (("tpu", "TPU v5"), "flash_tpu"),
        (("tpu", "TPU v5 lite"), "flash_tpu"),
        (("tpu", "TPU v6 lite"), "flash_tpu"),
        (("tpu", "TPU v4"), "flash_tpu"),
        (("gpu", "NVIDIA H200"), "blockwise"),
        (("cpu", "cpu"), "blockwise"),
    ):
        monkeypatch.setattr(api, "_device", lambda device=device: device)
        assert api.best_implementation(PLAIN, q, q, q) == expected, device
        assert api.best_implementation(PLAIN, q[:, :1], q, q) == "reference"
        assert api.best_implementation(PLAIN, q, q.astype(jnp.float32), q) == "blockwise"
        wide = jnp.zeros((1, 128, 1, 512), jnp.bfloat16)
        assert api.best_implementation(PLAIN, wide, wide, wide) == "blockwise"


def test_cudnn_is_chosen_where_a_gpu_is_at_hand_and_it_masks_as_asked(monkeypatch):
    monkeypatch.setattr(api, "_device", lambda: ("gpu", "NVIDIA H200"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k = jnp.zeros((1, 128, 4, 64), jnp.bfloat16), jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    assert api.best_implementation(PLAIN, q, k, k) == "cudnn"
    for name in vars(PLAIN):
        assert api.best_implementation(replace(PLAIN, **{name: True}), q, k, k) == "blockwise"
    assert api.best_implementation(PLAIN, q, k[:, 1:], k[:, 1:]) == "blockwise"
    segments, key = jnp.ones((1, 128), jnp.int32), jnp.zeros(2, jnp.uint32)
    for options, why in (
        (dict(segment_ids=segments), "no segment_ids"),
        (dict(q_offset=1), "no q_offset but the number 0"),
        (dict(dropout_rate=0.1, dropout_key=key), "no dropout_rate"),
        (dict(return_log_sum_exp=True), "no return_log_sum_exp"),
    ):
        with pytest.raises(ConfigError, match=why + ": take `blockwise`"):
            attention(q, k, k, implementation="cudnn", **options)
    with pytest.raises(ConfigError, match=r"all bfloat16 or all float16, and got q float32"):
        attention(q.astype(jnp.float32), k, k, implementation="cudnn")


@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_is_asked_for_the_same_operation(causal, monkeypatch):
    """JAX's own XLA path stands in for cuDNN behind the same function."""
    monkeypatch.setattr(api, "_device", lambda: ("gpu", "NVIDIA H200"))
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(2, 40, 40, 4, 2))
    out, want = (attention(q, k, v, causal=causal, scale=0.3, implementation=name) for name in ("cudnn", "reference"))
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), atol=2e-2)
    with pytest.raises(ConfigError, match="`cudnn` takes a GPU, and this runs on cpu"):
        monkeypatch.undo()
        attention(q, k, v, implementation="cudnn")
