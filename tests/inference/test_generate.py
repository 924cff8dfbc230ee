"""Text in, text out: how answers end, streaming, and models and tokenizers that do not fit."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxcoder.config import ComputeConfig
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.inference.generate import TextGenerator
from jaxcoder.inference.prompts import Prompt
from jaxcoder.inference.sampling import Sampling
from jaxcoder.models.gpt_bigcode import GPTBigCode

PROMPTS = ["def area(", "return", "# a"]


@pytest.fixture(scope="module")
def generator(model, tokenizer):
    return TextGenerator(model, tokenizer)


@pytest.fixture(scope="module")
def wordy(config, tokenizer):
    """A generator whose model prefers ASCII to everything else."""
    model = GPTBigCode(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
    is_text = [
        not tokenizer.is_special(token) and tokenizer.decode_bytes([token]).isascii()
        for token in range(tokenizer.vocab_size)
    ]
    padding = [False] * (config.vocab_size - tokenizer.vocab_size)
    model.wte[...] = model.wte[...].at[:, 0].set(jnp.where(jnp.array(is_text + padding), 1.0, -1.0))
    model.ln_f.scale[...] = model.ln_f.scale[...].at[0].set(0.0)
    model.ln_f.bias[...] = model.ln_f.bias[...].at[0].set(10.0)
    return TextGenerator(model, tokenizer)


@pytest.fixture(scope="module")
def ordinary(wordy):
    """Answers of ordinary text, each with its sampling."""
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(4)]
    answers = wordy.generate([Prompt(PROMPTS[0])] * 4, max_new_tokens=24, sampling=samplings)
    assert all(len(answer.text) >= 24 and answer.finish_reason == "length" for answer in answers)
    return list(zip(samplings, answers))


def test_text_is_what_the_tokens_spell(generator, tokenizer):
    for completion in generator.generate([Prompt(prompt) for prompt in PROMPTS], max_new_tokens=12):
        ordinary = [token for token in completion.tokens if not tokenizer.is_special(token)]
        expected = tokenizer.decode(ordinary)
        assert completion.text == expected or (expected.startswith(completion.text) and expected[-1] == "\ufffd")
        assert len(completion.tokens) == len(completion.log_probs) <= 12


def test_answers_end_before_a_stop_string(wordy, ordinary):
    for sampling, answer in ordinary:
        stop = answer.text[5:8]
        settings = dict(max_new_tokens=24, sampling=sampling, stop=["no such text", stop])
        stopped = wordy.generate([Prompt(PROMPTS[0])], **settings)[0]
        assert stopped.text == answer.text[: answer.text.find(stop)]
        assert stopped.finish_reason == "stop" and len(stopped.tokens) <= len(answer.tokens)


@pytest.mark.parametrize("stop", [[], ["e", "\n"]])
def test_streaming_gives_the_same_answer(wordy, ordinary, stop):
    for sampling, _ in ordinary[:3]:
        settings = dict(max_new_tokens=24, sampling=sampling, stop=stop)
        whole = wordy.generate([Prompt(PROMPTS[0])], **settings)[0]
        *pieces, last = wordy.stream(Prompt(PROMPTS[0]), **settings)
        assert "".join(piece.text for piece in [*pieces, last]) == whole.text
        assert last.completion.tokens == whole.tokens and last.completion.text == whole.text
        assert all(piece.text and piece.completion is None for piece in pieces)


def test_any_special_token_ends_an_answer(always, tokenizer):
    for name in ("<|endoftext|>", "<fim_middle>", "<filename>"):
        special = TextGenerator(always(tokenizer.special_id(name)), tokenizer)
        completion = special.generate([Prompt("a")], max_new_tokens=12)[0]
        assert (completion.text, completion.finish_reason, len(completion.tokens)) == ("", "stop", 1)
        assert special.infill([("a", "b")], max_new_tokens=12) == [""]


def test_rows_that_no_token_uses_are_never_answers(always, tokenizer, config):
    padding = TextGenerator(always(config.vocab_size - 1), tokenizer)
    for sampling in (Sampling(), Sampling(temperature=3.0)):
        tokens = padding.generate([Prompt("a")], max_new_tokens=12, sampling=sampling)[0].tokens
        assert max(tokens) < tokenizer.vocab_size < config.vocab_size


def test_a_prompt_that_is_too_long(generator, model, tokenizer):
    prompt = "x = 1\n" * 40
    with pytest.raises(ConfigError, match=r"\d+ tokens, but the model's context is 64"):
        generator.complete([prompt], max_new_tokens=4)
    with pytest.raises(ConfigError, match="context is 64"):
        generator.stream(Prompt(prompt), max_new_tokens=4)
    cutting = TextGenerator(model, tokenizer, truncate=True)
    completion = cutting.generate([Prompt(prompt)], max_new_tokens=16)[0]
    assert 30 < completion.num_prompt_tokens <= 48
    assert cutting.generate([Prompt(prompt, prompt)], max_new_tokens=1000)[0].num_prompt_tokens <= 32


def test_orders_of_infilling_reach_the_model(model, tokenizer):
    gap = [("def area(radius):\n", "return x")]
    answers = [TextGenerator(model, tokenizer, spm=spm).infill(gap, max_new_tokens=12) for spm in (False, True)]
    assert answers[0] != answers[1]


def test_a_model_without_a_tokenizer(model):
    with pytest.raises(DataError, match="no tokenizer"):
        TextGenerator(model, None)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows(config, tokenizer):
    small = GPTBigCode(replace(config, vocab_size=280), rngs=nnx.Rngs(0))
    with pytest.raises(DataError, match=f"{tokenizer.vocab_size} ids but the model only 280 rows"):
        TextGenerator(small, tokenizer)
