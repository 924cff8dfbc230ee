"""Prompts: orders of infilling, exactness, cuts at line starts."""

import json

import pytest

from jaxcoder.errors import DataError
from jaxcoder.inference.prompts import Prompt, encode_prompt
from jaxcoder.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def santacoder(tokenizer, tmp_path_factory) -> Tokenizer:
    """The same tokenizer with SantaCoder's spelling, at other ids."""
    directory = tmp_path_factory.mktemp("santacoder")
    tokenizer.save(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        del spec["model"]["vocab"][token["content"]]
    largest = max(spec["model"]["vocab"].values())
    for number, token in enumerate(spec["added_tokens"], 1):
        token["content"], token["id"] = token["content"].replace("_", "-"), largest + number
        spec["model"]["vocab"][token["content"]] = token["id"]
    return Tokenizer(json.dumps(spec).encode())


@pytest.fixture(scope="module")
def without_fim(tokenizer, tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("without_fim")
    tokenizer.save(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    for token in [token for token in spec["added_tokens"] if "fim" in token["content"]]:
        spec["added_tokens"].remove(token)
        del spec["model"]["vocab"][token["content"]]
    return Tokenizer(json.dumps(spec).encode())


def test_orders(tokenizer):
    prefix, suffix = tokenizer.encode("def f( "), tokenizer.encode("  \n  return x")
    prompt, fim = Prompt("def f( ", "  \n  return x"), tokenizer.fim
    assert encode_prompt(tokenizer, prompt) == [fim.prefix, *prefix, fim.suffix, *suffix, fim.middle]
    assert encode_prompt(tokenizer, prompt, spm=True) == [fim.prefix, fim.suffix, *suffix, fim.middle, *prefix]
    assert encode_prompt(tokenizer, Prompt("", "")) == [fim.prefix, fim.suffix, fim.middle]
    assert encode_prompt(tokenizer, Prompt("def f( ")) == prefix


def test_an_empty_completion_begins_a_document(tokenizer):
    assert encode_prompt(tokenizer, Prompt("")) == [tokenizer.eos_id]


def test_sentinels_spelled_in_text_stay_text(tokenizer):
    ids = encode_prompt(tokenizer, Prompt("<fim_prefix>a<|endoftext|>"))
    assert not tokenizer.special_ids.intersection(ids)


def test_santacoder_spells_with_hyphens(santacoder):
    ids = encode_prompt(santacoder, Prompt("a", "b"))
    assert santacoder.decode(ids) == "<fim-prefix>a<fim-suffix>b<fim-middle>"
    assert ids[0] == santacoder.vocab_size - len(santacoder.special_ids) + 1


def test_no_fim_tokens(without_fim):
    assert encode_prompt(without_fim, Prompt("a"))
    with pytest.raises(DataError, match="no fill-in-the-middle tokens"):
        encode_prompt(without_fim, Prompt("a", ""))


LINES = [f"value_{number} = {number}\n" for number in range(30)]


@pytest.mark.parametrize("most", [10, 40, 100, 10_000])
def test_a_completion_is_cut_at_a_line_start(tokenizer, most):
    text = "".join(LINES) + "last = "
    kept = tokenizer.decode(encode_prompt(tokenizer, Prompt(text), most=most))
    assert text.endswith(kept) and (kept == text or text[-len(kept) - 1] == "\n")
    assert len(tokenizer.encode(kept)) <= most
    longer = text[text.rfind("\n", 0, len(text) - len(kept) - 1) + 1 :]
    assert kept == text or len(tokenizer.encode(longer)) > most


def test_an_infill_is_cut_around_its_gap(tokenizer):
    prefix, suffix = "".join(LINES) + "  a = ", "\n" + "".join(LINES)
    for spm in (False, True):
        ids = encode_prompt(tokenizer, Prompt(prefix, suffix), most=100, spm=spm)
        assert 60 < len(ids) <= 100
        text = tokenizer.decode(ids)
        before, after = text.split("<fim_middle>")
        if spm:
            kept_prefix, kept_suffix = after, before.removeprefix("<fim_prefix><fim_suffix>")
        else:
            kept_prefix, kept_suffix = before.removeprefix("<fim_prefix>").split("<fim_suffix>")
        assert prefix.endswith(kept_prefix) and prefix[-len(kept_prefix) - 1] == "\n"
        assert suffix.startswith(kept_suffix) and kept_suffix.endswith("\n")


def test_what_one_side_leaves_the_other_has(tokenizer):
    long = "".join(LINES)
    for prompt in (Prompt(long, "\nend"), Prompt("start", long)):
        ids = encode_prompt(tokenizer, prompt, most=120)
        assert 100 < len(ids) <= 120
        text = tokenizer.decode(ids)
        assert "\nend" in text or "start" in text


def test_one_line_that_is_too_long_is_cut_inside(tokenizer):
    ids = tokenizer.encode("x + " * 500)
    assert encode_prompt(tokenizer, Prompt("x + " * 500), most=20) == ids[-20:]
    prompt = encode_prompt(tokenizer, Prompt("x + " * 500, "+ y" * 500), most=21)
    assert len(prompt) == 21 and prompt[0] == tokenizer.fim.prefix


def test_hardly_any_room(tokenizer):
    for most in (1, 3, 4, 5):
        assert 1 <= len(encode_prompt(tokenizer, Prompt("abc " * 9, "def " * 9), most=most)) <= max(most, 3)
