"""Token-level generation: against the model without a cache, alone and in batches, on a mesh, with few compilations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxcoder.config import ComputeConfig, MeshConfig, ModelConfig
from jaxcoder.errors import CheckpointError, ConfigError
from jaxcoder.inference import decode
from jaxcoder.inference.decode import Decoding, generate_tokens, in_compute_dtype, padded, padded_batch
from jaxcoder.inference.sampling import GREEDY, Sampling
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.sharding.mesh import make_mesh

LENGTHS = (5, 12, 1, 16, 9)


@pytest.fixture(scope="module")
def prompts(config):
    rng = np.random.default_rng(0)
    return [rng.integers(0, config.vocab_size, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def greedy(model, prompts):
    return generate_tokens(model, prompts, max_new_tokens=24)


def without_cache(model, prompt, count):
    """Greedy tokens and their log-probabilities by reading everything anew for each token."""

    @jax.jit
    def next_token(model, tokens, length):
        log_probs = jax.nn.log_softmax(model.logits(model(tokens))[0, length - 1])
        return jnp.argmax(log_probs), log_probs.max()

    tokens, log_probs = list(prompt), []
    for _ in range(count):
        row = jnp.asarray([tokens + [0] * (model.config.max_seq_len - len(tokens))], jnp.int32)
        token, log_prob = next_token(model, row, len(tokens))
        tokens.append(int(token))
        log_probs.append(float(log_prob))
    return tokens[len(prompt) :], log_probs


def test_the_cache_changes_nothing(model, prompts, greedy):
    for prompt, new in zip(prompts, greedy):
        tokens, log_probs = without_cache(model, prompt, 24)
        assert new.tokens == tokens
        np.testing.assert_allclose(new.log_probs, log_probs, atol=1e-4)
        assert new.finish_reason == "length"


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_batch(model, prompts, sampling):
    together = generate_tokens(model, prompts, max_new_tokens=20, sampling=sampling)
    alone = [generate_tokens(model, [prompt], max_new_tokens=20, sampling=sampling)[0] for prompt in prompts]
    pairs = generate_tokens(model, prompts, max_new_tokens=20, sampling=sampling, max_batch_size=2)
    assert [new.tokens for new in together] == [new.tokens for new in alone] == [new.tokens for new in pairs]


def test_a_row_does_not_depend_on_the_steps_per_call(model, prompts):
    sampling = Sampling(temperature=1.0, seed=1)
    whole, single = (
        generate_tokens(model, prompts[:1], max_new_tokens=20, sampling=sampling, steps_per_call=steps)[0].tokens
        for steps in (16, 1)
    )
    assert whole == single


def test_samples_differ_and_come_again(model, prompts):
    samplings = [Sampling(temperature=1.0, seed=2**40 + 5, sample=sample) for sample in range(4)]
    first = [new.tokens for new in generate_tokens(model, prompts[:1] * 4, max_new_tokens=20, sampling=samplings)]
    again = [new.tokens for new in generate_tokens(model, prompts[:1] * 2, max_new_tokens=20, sampling=samplings[2:])]
    assert len(set(map(tuple, first))) == 4 and first[2:] == again


def test_rows_end_at_their_own_end_token(model, prompts, greedy):
    # Each row's sixth token ends it; a row that says it earlier ends there.
    ends = {new.tokens[5] for new in greedy}
    ended = generate_tokens(model, prompts, max_new_tokens=24, end_ids=ends)
    for new, full in zip(ended, greedy):
        length = next(place for place, token in enumerate(full.tokens) if token in ends) + 1
        assert new.tokens == full.tokens[:length] and new.finish_reason == "stop"


def test_watch_ends_a_row_and_the_others_go_on(model, prompts, greedy):
    def watch(row, tokens):  # The first token comes alone, then 16 at once.
        return 3 if row == 1 and len(tokens) > 1 else None

    ended = generate_tokens(model, prompts, max_new_tokens=24, on_tokens=watch)
    assert ended[1].finish_reason == "stop" and ended[1].tokens == greedy[1].tokens[:4]
    assert len(ended[1].log_probs) == 4
    assert [new.tokens for row, new in enumerate(ended) if row != 1] == [
        new.tokens for row, new in enumerate(greedy) if row != 1
    ]


def test_ids_that_are_not_valid_are_never_chosen(model, prompts, greedy):
    valid = np.ones(model.config.vocab_size, bool)
    valid[[new.tokens[0] for new in greedy]] = False
    for sampling in (GREEDY, Sampling(temperature=5.0)):
        for new in generate_tokens(model, prompts, max_new_tokens=24, sampling=sampling, valid_ids=valid):
            assert valid[new.tokens].all()


def test_the_context_is_a_limit(model, config):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 300, length).tolist() for length in (config.max_seq_len - 1, config.max_seq_len - 20)]
    assert [len(new.tokens) for new in generate_tokens(model, prompts, max_new_tokens=10**12)] == [1, 20]
    too_long = [0] * config.max_seq_len
    with pytest.raises(ConfigError, match=f"{len(too_long)} tokens, but the model's context is {config.max_seq_len}"):
        generate_tokens(model, [too_long], max_new_tokens=1)


def test_what_cannot_be_generated_is_said(model):
    with pytest.raises(ConfigError, match="no tokens"):
        generate_tokens(model, [[]], max_new_tokens=1)
    with pytest.raises(ConfigError, match="at least 1"):
        generate_tokens(model, [[1]], max_new_tokens=0)
    with pytest.raises(ConfigError, match="1 prompts have 2 samplings"):
        generate_tokens(model, [[1]], max_new_tokens=1, sampling=[GREEDY] * 2)
    assert generate_tokens(model, [], max_new_tokens=1) == []


def test_the_number_of_compilations_is_bounded(monkeypatch):
    """Every prompt length and batch size runs one of a few programs."""
    monkeypatch.setattr(decode, "MIN_CACHE_SLOTS", 16)
    monkeypatch.setattr(decode, "INITIAL_NEW_TOKENS", 4)
    config = ModelConfig(num_layers=1, embed_dim=8, num_heads=1, head_dim=8, mlp_dim=8, vocab_size=32, max_seq_len=40)
    model = GPTBigCode(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
    before = decode.prefill._cache_size(), decode.decode_steps._cache_size()
    for length in (1, 2, 7, 15, 16, 17, 20, 31, 32, 33, 39):
        for new in generate_tokens(model, [[1] * length], max_new_tokens=64):
            assert len(new.tokens) == 40 - length
    prefill, steps = decode.prefill._cache_size() - before[0], decode.decode_steps._cache_size() - before[1]
    assert prefill <= 3 and steps <= 3  # prompts and caches of 16, 32 and 40


def test_padded_sizes():
    assert [padded(size, 16, 100) for size in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
    assert [padded_batch(rows, None, None) for rows in (1, 2, 3, 4, 5, 32)] == [1, 2, 4, 4, 8, 32]


def test_prompts_of_like_length_run_together(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PREFILL_TOKENS", 128)
    assert decode.make_batches([5, 60, 1, 30, 9, 33, 2], 4, 64) == [[2, 6, 0, 4], [3, 5], [1]]


def test_a_step_writes_the_cache_in_place(model, config):
    """No copy of the whole cache in the compiled steps: a step's cost would grow with the room for new tokens."""
    decoding = Decoding(model, [[1, 2, 3]], max_new_tokens=40, sampling=[GREEDY])
    arguments = decoding._state, decoding._live, np.int32(16), decoding._rows, decoding._vocabulary
    program = decode.decode_steps.lower(model, *arguments).compile().as_text()
    shape = re.escape(",".join(map(str, decoding._state.cache.k.shape)))
    assert re.search(rf"f32\[{shape}\]", program)
    assert not re.findall(rf"= f32\[{shape}\]\S* copy\(.*", program)


def test_bfloat16_stays_near_float32(model, prompts, greedy):
    low = in_compute_dtype(GPTBigCode(model.config, ComputeConfig(dtype="bfloat16"), rngs=nnx.Rngs(0)))
    assert low.h.attn.q.kernel[...].dtype == jnp.bfloat16 and low.h.ln_1.scale[...].dtype == jnp.float32
    for low_new, high_new in zip(generate_tokens(low, prompts, max_new_tokens=24), greedy):
        assert len(low_new.tokens) == 24
        assert abs(low_new.log_probs[0] - high_new.log_probs[0]) < 0.3


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_a_mesh_changes_nothing(num_kv_heads, prompts):
    config = ModelConfig(
        num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64, vocab_size=304, max_seq_len=64,
        num_kv_heads=num_kv_heads, init_std=0.3,
    )  # fmt: skip
    model = GPTBigCode(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
    sampling = [Sampling(temperature=row % 2, seed=row) for row in range(len(prompts))]
    expected = generate_tokens(model, prompts, max_new_tokens=12, sampling=sampling)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda: GPTBigCode(config, model.compute, rngs=nnx.Rngs(0)))

    def place(weight, shape):
        return jax.device_put(np.asarray(weight), NamedSharding(mesh, shape.sharding.spec))

    sharded = jax.tree.map(place, model, shapes)
    new = generate_tokens(sharded, prompts, max_new_tokens=12, sampling=sampling)
    assert [row.tokens for row in new] == [row.tokens for row in expected]


def test_scores_that_are_not_finite_are_an_error(model):
    broken = jax.tree.map(lambda weight: weight * jnp.nan, model)
    with pytest.raises(CheckpointError, match="scores are NaN or infinite: its weights are damaged"):
        generate_tokens(broken, [[1, 2, 3]], max_new_tokens=4)
