"""Our TPU kernels, interpreted on CPUs, against NumPy's fp64: drawn contents, finite differences, determinism.

Each shape takes seconds to compile, so that the default run has two and draws their contents; others are marked slow.
"""

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from attention_oracle import SMALL, Interpreted, Problem, assert_right, compute, draw, exact
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcoder.kernels.attention.schedule import Blocks

KERNELS = Interpreted()
SHAPES = {
    "multi_query": dict(shape=(2, 300, 300, 4, 1, 64), dtype=ml_dtypes.bfloat16, rate=0.1),
    "grouped_two_spans": dict(shape=(1, 257, 450, 6, 2, 128), dtype=np.float32, rate=0.0),
}


@pytest.mark.parametrize("name", SHAPES)
def test_drawn_contents(name):
    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.integers(0, 2**31))
    def check(seed):
        problem = draw(np.random.default_rng(seed), **SHAPES[name])
        assert_right(compute(KERNELS, problem), problem)
        assert_right(compute("reference", in_fp32(problem)), in_fp32(problem))

    check()


def test_two_cores_share_the_heads_and_the_matrix_unit_sums():
    blocks = replace(SMALL, cores=2, sums_by_matmul=True, chunk_heads=1)
    assert [blocks.fit(9, 9, 6, batch_groups=n).heads for n in (1, 2)] == [3, 6]
    kernels = Interpreted(blocks, blocks)
    for seed, head_dim in ((0, 128), (1, 128), (2, 64)):
        problem = draw(np.random.default_rng(seed), (1, 300, 300, 6, 1, head_dim), ml_dtypes.bfloat16)
        assert_right(compute(kernels, problem), problem)


def test_few_heads_make_taller_blocks_and_the_two_kernels_may_differ():
    tall = replace(SMALL, least_rows=1024, chunk_heads=2)
    fitted = [tall.fit(999, 999, heads) for heads in (8, 4, 2)]
    assert [(blocks.block_q, blocks.chunk_heads) for blocks in fitted] == [(128, 2), (256, 1), (256, 1)]
    problem = draw(np.random.default_rng(3), (1, 300, 300, 2, 1, 64), ml_dtypes.bfloat16, rate=0.1)
    assert_right(compute(Interpreted(SMALL, tall), problem), problem)


@pytest.mark.parametrize("length", [1, 2, 3, 127])
def test_short_documents(length):
    problem = draw(np.random.default_rng(length), **SHAPES["multi_query"], segments=length)
    assert_right(compute(KERNELS, problem), problem)


def test_the_output_and_its_gradients_are_the_same_in_every_run():
    problem = draw(np.random.default_rng(0), **SHAPES["multi_query"])
    first = [x.tobytes() for x in vars(compute(KERNELS, problem)).values()]
    for _ in range(3):
        assert [x.tobytes() for x in vars(compute(KERNELS, problem)).values()] == first


def slope(implementation, problem: Problem, along: dict[str, np.ndarray], step: float) -> float:
    """Central difference, of fourth order, of the sum over outputs times their cotangents."""

    def value(distance):
        moved = {name: getattr(problem, name) + distance * u for name, u in along.items()}
        moved = replace(problem, **{name: x.astype(problem.q.dtype) for name, x in moved.items()})
        got = exact(moved) if implementation == "exact" else compute(implementation, moved)
        out, log_sum_exp = got.out.astype(np.float64), got.log_sum_exp.astype(np.float64)
        return (out * problem.d_out).sum() + (log_sum_exp * problem.d_lse).sum()

    return (8 * (value(step) - value(-step)) - (value(2 * step) - value(-2 * step))) / (12 * step)


@pytest.mark.parametrize("inputs", ["q", "k", "v", "qkv"])
def test_gradients_are_finite_differences(inputs):
    """Of fp64, where it is exact to nine digits; and of the interpreted kernels themselves."""
    rng = np.random.default_rng(7)
    problem = replace(draw(rng, **SHAPES["grouped_two_spans"], segments=60), q_offset=30)
    assert (exact(problem).out != 0).any(-1).all()
    in_fp64 = {name: np.asarray(getattr(problem, name), np.float64) for name in ("q", "k", "v", "d_out", "d_lse")}
    along = {name: rng.normal(size=getattr(problem, name).shape) for name in inputs}
    for implementation, of, step, digits in (
        ("exact", replace(problem, **in_fp64), 1e-3, 1e-10),
        (KERNELS, problem, 3e-2, 2e-5),
    ):
        gradients = exact(of) if implementation == "exact" else compute(implementation, of)
        terms = [(getattr(gradients, f"d{name}") * u).ravel() for name, u in along.items()]
        size = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in terms))
        found = slope(implementation, of, along, step)
        assert abs(found - sum(x.sum(dtype=np.float64) for x in terms)) < digits * size, (found, size)


BLOCKS = {
    "small": SMALL,
    "one_step": Blocks(block_kv=512, edge_kv=512),
    "wide_edges": Blocks(block_kv=512, edge_kv=256, span_kv=512, chunk_heads=4, heads=4),
    "tall": Blocks(block_q=256, block_kv=256, edge_kv=128, span_kv=512, cores=2, sums_by_matmul=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(32))
def test_drawn_shapes(seed):
    rng = np.random.default_rng(1000 + seed)
    groups = int(rng.choice([1, 1, 2, 3]))
    heads = groups * int(rng.choice([1, 2, 5, 16, 17, 48 // groups]))
    most = 700 if heads <= 12 else 300
    q_len = int(rng.choice([1, 2, 127, 128, 129, 256, rng.integers(1, most)]))
    kv_len = q_len if rng.random() < 0.5 else int(rng.choice([1, 130, 256, rng.integers(1, most)]))
    head_dim, dtype = int(rng.choice([64, 128])), [ml_dtypes.bfloat16, np.float32][rng.integers(2)]
    rate, causal = float(rng.choice([0.0, 0.1, 0.5])), bool(rng.random() < 0.8)
    forward, backward = (BLOCKS[rng.choice(["small", "one_step", "wide_edges"])] for _ in range(2))
    if rng.random() < 0.2:
        forward = backward = BLOCKS["tall"]
    shape = (int(rng.choice([1, 2])), q_len, kv_len, heads, groups, head_dim)
    segments = "none" if rng.random() < 0.2 else "hostile"
    print(shape, dtype.__name__, rate, causal, segments, forward, backward)
    for _ in range(3):
        problem = draw(rng, shape, dtype, rate=rate, causal=causal, segments=segments)
        got = compute(Interpreted(forward, backward), problem)
        assert_right(got, problem)
        assert_right(compute("blockwise", in_fp32(problem)), in_fp32(problem))
    jax.clear_caches()


def in_fp32(problem: Problem) -> Problem:
    return replace(problem, **{name: getattr(problem, name).astype(np.float32) for name in ("q", "k", "v", "d_out")})
