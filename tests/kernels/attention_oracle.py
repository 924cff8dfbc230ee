"""Attention and its gradients in NumPy's fp64, written down from the definition and sharing no code with the backends
at all; what the tests of this folder draw; the bounds they hold results to.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, K head_dim.
"""

from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxcoder.kernels.attention import flash_tpu
from jaxcoder.kernels.attention.api import BACKENDS, attention
from jaxcoder.kernels.attention.schedule import Blocks

DROPOUT_KEY = np.array([1, 2], np.uint32)
BATCH_OFFSET, HEAD_OFFSET = 3, 5
SMALL = Blocks(block_kv=256, edge_kv=128, span_kv=256, chunk_heads=2)
WIDER = Blocks(block_kv=384, edge_kv=128, span_kv=384, chunk_heads=2)
"""Its spans and those of SMALL are no multiples of each other."""


@dataclass(frozen=True)
class Results:
    """Output, log-sum-exp (0 for rows that see nothing) and the gradients of all three inputs."""

    out: np.ndarray
    log_sum_exp: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


@dataclass(frozen=True)
class Problem:
    """Inputs (B, S or T, H or G, K) and the cotangents of output and log-sum-exp."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    d_out: np.ndarray
    d_lse: np.ndarray
    causal: bool = True
    segments: np.ndarray | None = None
    kv_segments: np.ndarray | None = None
    q_offset: int = 0
    kv_offset: int = 0
    rate: float = 0.0


def hostile_segments(rng: np.random.Generator, length: int) -> np.ndarray:
    """Contiguous documents with ids in any order: of length 1, with a border in every block, pads between and after."""
    kind = rng.integers(5)
    if kind == 0:
        sizes = np.ones(length, int)
    elif kind == 1:
        sizes = np.full(length, 127)
    else:
        sizes = rng.geometric(float(rng.choice([0.3, 0.02, 0.005])), length)
    borders = np.cumsum(sizes)
    of = np.searchsorted(borders, np.arange(length), side="right")
    ids = rng.permutation(np.arange(1, of.max() + 2)) * 7
    ids[rng.random(len(ids)) < rng.choice([0.0, 0.2, 1.0], p=[0.6, 0.35, 0.05])] = 0
    drawn = ids[of]
    if rng.random() < 0.5:
        drawn[length - rng.integers(length + 1) :] = 0
    return drawn.astype(np.int32)


def draw(rng: np.random.Generator, shape, dtype=np.float32, *, segments="hostile", causal=True, rate=0.0) -> Problem:
    """shape is (B, S, T, H, G, K); segments: "hostile", "none", or the length of every document."""
    batch, q_len, kv_len, heads, groups, head_dim = shape
    q_shape, kv_shape = (batch, q_len, heads, head_dim), (batch, kv_len, groups, head_dim)
    arrays = [rng.normal(size=s).astype(dtype) for s in (q_shape, kv_shape, kv_shape, q_shape)]
    d_lse = rng.normal(size=(batch, heads, q_len)).astype(np.float32)
    ids = kv_ids = None
    if segments == "hostile":
        ids = np.stack([hostile_segments(rng, q_len) for _ in range(batch)])
        if q_len != kv_len:
            kv_ids = np.stack([hostile_segments(rng, kv_len) for _ in range(batch)])
            if rng.random() < 0.7:  # The same documents in the same order, of other lengths, else few would meet.
                kv_ids = ids[:, np.sort(rng.integers(0, q_len, kv_len))]
    elif segments != "none":
        ids, kv_ids = (np.tile(np.arange(n, dtype=np.int32) // segments + 1, (batch, 1)) for n in (q_len, kv_len))
        kv_ids = None if q_len == kv_len else kv_ids
    q_offset = int(rng.choice([0, rng.integers(-200, 400)]))
    kv_offset = int(rng.choice([0, 10_000]))
    return Problem(*arrays, d_lse, causal, ids, kv_ids, q_offset, kv_offset, rate)


def exact(problem: Problem, rounded: str | None = None) -> Results:
    """The definition in fp64. rounded="flash_tpu" or "blockwise": with what that backend rounds to bf16 rounded."""

    def bf16(x, *where):
        return x.astype(ml_dtypes.bfloat16).astype(np.float64) if rounded in where else x

    both = ("flash_tpu", "blockwise")
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (problem.q, problem.k, problem.v, problem.d_out))
    (batch, q_len, heads, head_dim), (_, kv_len, groups, _) = q.shape, k.shape
    k, v = (np.repeat(x, heads // groups, axis=2) for x in (k, v))
    scale = head_dim**-0.5
    k_scaled = bf16(k * (scale * np.log2(np.e)), "flash_tpu") * np.log(2)
    scores = np.einsum("bshk,bthk->bhst", q, k_scaled)

    q_positions, k_positions = np.arange(q_len) + problem.q_offset, np.arange(kv_len)
    seen = np.ones((batch, q_len, kv_len), bool)
    if problem.causal:
        seen &= q_positions[:, None] >= k_positions
    if problem.segments is not None:
        ids, kv_ids = problem.segments, problem.segments if problem.kv_segments is None else problem.kv_segments
        seen &= (ids[:, :, None] == kv_ids[:, None]) & (ids[:, :, None] != 0)
    seen = seen[:, None]
    is_empty = ~seen.any(-1)
    largest = np.where(seen, scores, -np.inf).max(-1, initial=-1e300, keepdims=True)
    weights = np.where(seen, np.exp(np.where(seen, scores - largest, 0.0)), 0.0)
    total = np.where(is_empty[..., None], 1.0, weights.sum(-1, keepdims=True))
    probabilities = weights / total
    log_sum_exp = np.where(is_empty, 0.0, (largest + np.log(total))[..., 0])

    factor = 1.0
    if problem.rate:
        factor = kept(problem) / (1.0 - problem.rate)
    # The forward pass rounds the weights before they are divided by their sum.
    out = np.einsum("bhst,bthk->bshk", bf16(weights, *both) * factor / total, v)
    out = bf16(out, *both)
    d_weights = np.einsum("bshk,bthk->bhst", d_out, v) * factor
    delta = np.einsum("bshk,bshk->bhs", d_out, out) - np.where(is_empty, 0.0, problem.d_lse)
    d_scores = probabilities * (d_weights - delta[..., None])
    d_scores = bf16(d_scores, "flash_tpu")
    if rounded == "blockwise":
        d_scores = bf16(d_scores * scale, "blockwise") / scale
    dq = np.einsum("bhst,bthk->bshk", d_scores, k_scaled)
    dk = np.einsum("bhst,bshk->bthk", d_scores, q * scale)
    dv = np.einsum("bhst,bshk->bthk", bf16(probabilities * factor, *both), d_out)
    dk, dv = (x.reshape(batch, kv_len, groups, -1, head_dim).sum(3) for x in (dk, dv))
    return Results(out, log_sum_exp, bf16(dq, *both), bf16(dk, *both), bf16(dv, *both))


def kept(problem: Problem) -> np.ndarray:
    """bool (B, H, S, T): the dropout mask by the hash's definition, in Python's and NumPy's integers."""
    (batch, q_len, heads, _), kv_len = problem.q.shape, problem.k.shape[1]
    samples = np.arange(batch)[:, None, None, None] + BATCH_OFFSET
    all_heads = np.arange(heads)[:, None, None] + HEAD_OFFSET
    positions = (np.arange(q_len)[:, None] + problem.q_offset + problem.kv_offset) % 2**32
    a, b = (np.uint64(word) for word in DROPOUT_KEY)
    for x in (samples, all_heads, positions):
        a = _mixed((a + x.astype(np.uint64) * _GOLDEN) ^ b)
        b = _mixed(b + a)
    keys = (np.arange(kv_len) + problem.kv_offset).astype(np.uint64)
    return _mixed((a + keys * _GOLDEN) ^ b) >= round(problem.rate * 2**32)


_GOLDEN = np.uint64(0x9E3779B9)


def _mixed(x: np.ndarray) -> np.ndarray:
    """lowbias32 of the low 32 bits."""
    low = np.uint64(2**32 - 1)
    x = x & low
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & low
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & low
    return x ^ (x >> np.uint64(16))


@dataclass(frozen=True)
class Interpreted:
    """flash_tpu as Pallas interprets it on CPUs, in place of a backend's name."""

    forward: Blocks = WIDER
    backward: Blocks = SMALL
    interpret: object = True


def compute(implementation: str | Interpreted, problem: Problem) -> Results:
    """The same from a backend; compiled once for all contents of one shape."""
    p = problem
    traced = (p.q, p.k, p.v, p.d_out, p.d_lse, p.segments, p.kv_segments, np.int32(p.q_offset), np.int32(p.kv_offset))
    values = jax.block_until_ready(_compute(implementation, p.causal, p.rate, *traced))
    return Results(*(np.asarray(x) for x in values))


@contextmanager
def in_place(implementation: str | Interpreted):
    """Gives the name of a backend to ask for; the kernels are interpreted while they are traced in this context."""
    if isinstance(implementation, str):
        yield implementation
        return
    options = dict(forward_blocks=implementation.forward, backward_blocks=implementation.backward)
    interpreted = partial(flash_tpu.attention, **options, interpret=implementation.interpret)
    with mock.patch.dict(BACKENDS, flash_tpu=interpreted):
        yield "flash_tpu"


@partial(jax.jit, static_argnums=(0, 1, 2))
def _compute(implementation, causal, rate, q, k, v, d_out, d_lse, segments, kv_segments, q_offset, kv_offset):
    def run(q, k, v):
        with in_place(implementation) as name:
            out, log_sum_exp = attention(
                q,
                k,
                v,
                causal=causal,
                segment_ids=segments,
                kv_segment_ids=kv_segments,
                q_offset=q_offset,
                kv_offset=kv_offset,
                batch_offset=BATCH_OFFSET,
                head_offset=HEAD_OFFSET,
                dropout_rate=rate,
                dropout_key=jnp.asarray(DROPOUT_KEY) if rate else None,
                implementation=name,
                return_log_sum_exp=True,
            )
        return out, jnp.where(log_sum_exp > -1e29, log_sum_exp, 0.0)

    (out, log_sum_exp), pullback = jax.vjp(run, q, k, v)
    return out, log_sum_exp, *pullback((d_out.astype(out.dtype), d_lse))


def assert_right(got: Results, problem: Problem) -> None:
    """In fp32 and where bf16 rounds: not worse than fp64 that is rounded at the same points.

    fp32: a few units of its last place, of results and of the K terms of size one that were added up for them.
    bf16: documents of one token show why no fixed bound would do. The gradient of their scores is dP - dP = 0; with
    dropout, one dP comes from the output v / (1 - rate), which bf16 does not hold, and the rest of 1e-2 is all there is
    (in `blockwise` more, for it rounds the dropped weights as well).
    """
    want = exact(problem)
    dtype = np.asarray(problem.q).dtype
    rounding = None if dtype == np.float32 else exact(problem, "flash_tpu")
    for f in fields(Results):
        a, b = (np.asarray(getattr(x, f.name), np.float64) for x in (got, want))
        assert a.shape == b.shape and np.isfinite(a).all(), f.name
        allowed = 2e-6 * (np.linalg.norm(b) + np.sqrt(b.size))
        if rounding is not None:
            lost = getattr(rounding, f.name) - b
            rows = np.count_nonzero(lost.any(-1) if lost.ndim == 4 else lost)
            # Roundings in another order are others, of the same size on average: the fewer rows, the less that says.
            allowed += (1.25 + 4 / np.sqrt(max(rows, 1))) * np.linalg.norm(lost)
        error = np.linalg.norm(a - b)
        assert error <= allowed, (f.name, error, allowed, np.linalg.norm(b), b.size)
