"""The published sizes, to the unit, without allocating a weight."""

import jax
import pytest
from flax import nnx
from jaxcoder_configs import starcoder

from jaxcoder.models.flops import num_parameters, training_flops_per_token
from jaxcoder.models.gpt_bigcode import GPTBigCode

PUBLISHED = {
    starcoder.starcoderbase: 15_517_456_384,
    starcoder.starcoderbase_7b: 7_327_263_232,
    starcoder.starcoderbase_3b: 3_043_311_104,
    starcoder.starcoderbase_1b: 1_137_207_296,
    starcoder.tiny_starcoder_py: 164_144_128,
    starcoder.santacoder: 1_124_886_528,
}


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.__name__)
def test_parameter_counts(run):
    config = run().model
    abstract = jax.eval_shape(lambda: GPTBigCode(config, rngs=nnx.Rngs(0)))
    counted = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert counted == num_parameters(config) == PUBLISHED[run]


def test_flops_of_starcoderbase():
    """6 * 15.467e9 of matrices and head, plus 12.08e9 of causal attention at 8,192."""
    config = starcoder.starcoderbase().model
    matrices = num_parameters(config) - config.max_seq_len * config.embed_dim
    flops = training_flops_per_token(config, 8192)
    assert flops == pytest.approx(6 * matrices + 6 * 40 * 8192 * 6144, rel=1e-3)
    assert flops == pytest.approx(104.9e9, rel=1e-3)


def test_tokens_of_the_runs():
    for run in PUBLISHED:
        config = run()
        tokens = config.num_steps * config.global_batch_size * config.model.max_seq_len
        expected = {"santacoder": 2.36e11, "tiny_starcoder_py": 1.0486e11}.get(config.name, 1.0486e12)
        assert tokens == pytest.approx(expected, rel=1e-3), config.name
