"""Greedy generations of PyTorch's GPTBigCode, token for token (data outside the repository: skipped without it)."""

from pathlib import Path

import numpy as np
import pytest

from jaxcoder.config import ComputeConfig
from jaxcoder.inference.decode import generate_tokens
from jaxcoder.inference.load import load_model

REFERENCE = Path(__file__).parents[3] / "shared" / "data" / "gpt_bigcode_reference"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the reference generations are not at {REFERENCE}")


def reference(name, dtype="float32"):
    model, _, _ = load_model(REFERENCE / name / "safetensors", compute=ComputeConfig(dtype=dtype))
    return model, np.load(REFERENCE / name / "outputs.npz")


def check(new, tokens, log_probs=None):
    assert [row.tokens for row in new] == tokens.tolist()
    if log_probs is not None:
        np.testing.assert_allclose([row.log_probs for row in new], log_probs, atol=5e-5)


@pytest.mark.parametrize("name", ["mqa", "mha"])
def test_prompts_of_one_length_and_of_several(name):
    model, arrays = reference(name)
    new = generate_tokens(model, arrays["gen_prompt"].tolist(), max_new_tokens=64)
    check(new, arrays["gen_tokens"], arrays["gen_logprob"])
    # Padded on the left there, on the right here.
    lengths = arrays["pad_mask"].sum(1)
    prompts = [row[len(row) - length :].tolist() for row, length in zip(arrays["gen_pad_prompt"], lengths)]
    check(generate_tokens(model, prompts, max_new_tokens=64), arrays["gen_pad_tokens"], arrays["gen_pad_logprob"])


def test_up_to_the_last_position():
    model, arrays = reference("long")
    prompt = arrays["ids"][0, : int(arrays["gen_prompt_len"])].tolist()
    new = generate_tokens(model, [prompt], max_new_tokens=10_000)
    check(new, arrays["gen_tokens"])


def test_bfloat16_agrees_where_the_margin_allows():
    model, arrays = reference("mqa", "bfloat16")
    new = generate_tokens(model, arrays["gen_prompt"].tolist(), max_new_tokens=64)
    for row, tokens, margins in zip(new, arrays["gen_tokens"], arrays["gen_margin"]):
        unsure = np.flatnonzero(margins < 0.5)
        first_unsure = unsure[0] if len(unsure) else len(tokens)
        assert row.tokens[:first_unsure] == tokens[:first_unsure].tolist()
