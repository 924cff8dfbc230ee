"""Which probabilities attention drops, bit for bit: read off what the backends compute, beside the hash in NumPy.

Queries of zeros see all keys alike, with weights of 1 / T. Then three products of inputs of zeros and ones show the
mask: of the forward pass in the output (values are one-hot, so that feature j says whether key j survived), of dP in dQ
(likewise, from keys), and of the probabilities of the backward pass in dV (from one-hot cotangents of the output).
"""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from attention_oracle import Interpreted, Problem, compute, draw, kept

from jaxcoder.kernels.attention.schedule import Blocks

SHAPE = dict(shape=(2, 300, 300, 4, 1, 64), dtype=ml_dtypes.bfloat16, rate=0.1)
"""As in test_flash_tpu.py, where it is compiled."""
OTHER_BLOCKS = Interpreted(Blocks(block_kv=512, edge_kv=512, heads=2), Blocks(block_kv=256, edge_kv=256, span_kv=256))


def uniform(batch_of: Problem, q_offset: int, kv_offset: int) -> Problem:
    """Every query sees every key, all with the same weight; all other inputs are zeros."""
    zeros = {name: np.zeros_like(getattr(batch_of, name)) for name in ("q", "k", "v", "d_out", "d_lse")}
    segments = np.ones_like(batch_of.segments)
    return replace(batch_of, **zeros, segments=segments, q_offset=q_offset, kv_offset=kv_offset)


def one_hot(shape, dtype, first: int) -> np.ndarray:
    """(B, S, N, K): position first + j of every head is the j-th unit vector."""
    x = np.zeros(shape, dtype)
    for j in range(min(shape[3], shape[1] - first)):
        x[:, first + j, :, j] = 1
    return x


def masks(implementation, problem: Problem) -> dict[str, np.ndarray]:
    """bool (B, H, S, T) each."""
    (batch, q_len, heads, width), kv_len = problem.q.shape, problem.k.shape[1]
    found = {name: np.zeros((batch, heads, q_len, kv_len), bool) for name in ("forward", "dP", "dV")}
    first_feature = np.zeros_like(problem.d_out)
    first_feature[..., 0] = 1
    for first in range(0, kv_len, width):
        at = slice(first, min(first + width, kv_len))
        hot = one_hot(problem.k.shape, problem.k.dtype, first)
        out = compute(implementation, replace(problem, v=hot)).out
        found["forward"][..., at] = (out > 0).transpose(0, 2, 1, 3)[..., : at.stop - at.start]
        # dP is 1 or 0, and its mean of about 1 is subtracted: what was kept is above, what was dropped below zero.
        values = np.zeros_like(problem.v)
        values[..., 0] = 1
        dq = compute(implementation, replace(problem, k=hot, v=values, d_out=first_feature)).dq
        found["dP"][..., at] = (dq > 0).transpose(0, 2, 1, 3)[..., : at.stop - at.start]
        assert (dq[..., : at.stop - at.start] != 0).all()
    for head in range(heads):
        for first in range(0, q_len, width):
            at = slice(first, min(first + width, q_len))
            d_out = one_hot(problem.d_out.shape, problem.d_out.dtype, first)
            d_out[:, :, [h for h in range(heads) if h != head]] = 0
            dv = compute(implementation, replace(problem, d_out=d_out)).dv[:, :, 0]
            found["dV"][:, head, at] = (dv > 0).transpose(0, 2, 1)[:, : at.stop - at.start]
    return found


@pytest.mark.parametrize(
    "implementation, q_offset, kv_offset",
    [
        pytest.param(Interpreted(), 299, 0, id="flash_tpu"),
        pytest.param(Interpreted(), 350, 70_000, id="flash_tpu-of_a_shard"),
        pytest.param(OTHER_BLOCKS, 299, 4096, id="flash_tpu-other_blocks", marks=pytest.mark.slow),
        pytest.param("blockwise", 299, 4096, id="blockwise"),
        pytest.param("reference", 350, 70_000, id="reference"),
    ],
)
def test_what_is_dropped(implementation, q_offset, kv_offset):
    problem = uniform(draw(np.random.default_rng(0), **SHAPE), q_offset, kv_offset)
    want = kept(problem)
    assert abs(want.mean() - 0.9) < 0.01
    for name, mask in masks(implementation, problem).items():
        np.testing.assert_array_equal(mask, want, err_msg=name)
