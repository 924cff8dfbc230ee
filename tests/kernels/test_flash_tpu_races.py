"""The kernels as on two cores that race, with memory that is NaN until it is written, and reads that must be inside."""

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from attention_oracle import SMALL, Interpreted, assert_right, compute, draw
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from jaxcoder.kernels.attention.schedule import Blocks

TWO_CORES = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
)
BF16, FP32 = ml_dtypes.bfloat16, np.float32
WIDE = Blocks(block_kv=512, edge_kv=256, span_kv=512, heads=4)
CASES = {
    "multi_query": ((1, 200, 200, 4, 1, 64), BF16, 0.1, replace(SMALL, heads=2, cores=2)),
    "grouped_three_spans": ((1, 130, 520, 4, 2, 128), FP32, 0.0, SMALL),
    "one_token": ((1, 1, 1, 1, 1, 64), BF16, 0.0, SMALL),
    "one_query": ((1, 1, 300, 3, 1, 128), BF16, 0.5, SMALL),
    "one_key": ((1, 257, 1, 2, 1, 64), FP32, 0.1, SMALL),
    "multi_head": ((1, 140, 140, 3, 3, 128), BF16, 0.0, SMALL),
    "padded_dim": ((1, 140, 140, 4, 2, 64), BF16, 0.1, SMALL),
    "forty_eight_heads": ((1, 129, 129, 48, 1, 128), BF16, 0.0, Blocks(block_kv=256, edge_kv=128)),
    "prime_heads": ((1, 100, 100, 17, 1, 64), FP32, 0.0, SMALL),
    "tall": ((1, 300, 300, 2, 1, 64), BF16, 0.1, Blocks(block_q=256, block_kv=256, edge_kv=256, span_kv=256)),
    "wide": ((2, 513, 513, 2, 1, 128), FP32, 0.0, WIDE),
    "not_causal": ((1, 150, 270, 4, 1, 64), BF16, 0.1, WIDE),
}
"""Mostly of one row and one key/value head: the cores of the interpreter take halves of the first parallel dimension
that has any, and two rows could not race."""
IN_TIME = {"multi_query", "grouped_three_spans"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in IN_TIME else pytest.mark.slow) for n in CASES])
def test_no_race_and_nothing_read_before_it_is_written(name):
    shape, dtype, rate, blocks = CASES[name]
    problem = draw(np.random.default_rng(3), shape, dtype, rate=rate, causal=name != "not_causal")
    if name in IN_TIME:
        problem = replace(problem, q_offset=shape[2] - shape[1])
    got = compute(Interpreted(blocks, blocks, TWO_CORES), problem)
    assert not races_found()
    jax.clear_caches()
    assert_right(got, problem)


@pytest.mark.slow
def test_a_race_would_be_found(monkeypatch):
    """Blocks of queries that add to the same dK on two cores, were they allowed to."""
    make = pltpu.CompilerParams

    def reckless(dimension_semantics, **options):
        return make(dimension_semantics=("parallel",) * len(dimension_semantics), **options)

    monkeypatch.setattr(pltpu, "CompilerParams", reckless)
    problem = draw(np.random.default_rng(3), (1, 200, 200, 2, 1, 64), BF16, segments="none")
    try:
        compute(Interpreted(SMALL, SMALL, TWO_CORES), problem)
        found = races_found()
    except jax.errors.JaxRuntimeError as error:  # so JAX 0.12; 0.10 only notes it
        found = "RACE DETECTED" in str(error)
    jax.clear_caches()
    assert found


def races_found() -> bool:
    races = interpreter.races if hasattr(interpreter, "races") else interpreter.get_races()
    return races.races_found
