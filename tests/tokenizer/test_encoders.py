"""tiktoken must give the ids of `tokenizers`, or stand aside."""

import copy
import json
import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxcoder.errors import DataError
from jaxcoder.tokenizer.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "failing_inputs" / "tokenizers"

# Characters on which the two splits could part: digits of all kinds, blanks of all kinds, quotes, marks, letters.
HOSTILE = (
    "abstremvdlS '\"\u20190123\u00b2\u00bd\u0663\uff11 \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000\ufeff\u200b"
    "_.-#<|>e\u0301\u4e2d\U0001f600\0"
)


@pytest.fixture(scope="module")
def reference(tokenizer):
    """The same tokenizer, encoding with `tokenizers`."""
    other = copy.copy(tokenizer)
    other._encode = tokenizer._reference
    return other


def test_the_fast_encoder_is_used(tokenizer):
    assert (tokenizer.encoder_name, tokenizer.encoder_reason) == ("tiktoken", "")


def test_real_files(tokenizer, reference, stdlib_texts):
    for text in stdlib_texts:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from(HOSTILE), max_size=60))
@example("  1")
@example("a   \n\n  1 it's 12're")
def test_hostile_strings(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_strings(tokenizer, reference, text):
    assert tokenizer.encode(text) == reference.encode(text)


def test_random_joins_of_tokens(tokenizer, reference):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(19, tokenizer.vocab_size) for _ in range(100)]
        text = tokenizer.decode(ids)
        assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize("character", [" ", "\n", "\u3000"])
def test_runs_of_blanks_that_overflow_the_fast_regex(tokenizer, reference, character):
    text = "x" + character * 1_000_000 + "1"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "x" + character * 60_000 + "1"
    assert tokenizer.encode(text) == reference.encode(text)


def _changed(tokenizer, change) -> Tokenizer:
    spec = json.loads(tokenizer._content)
    change(spec)
    return Tokenizer(json.dumps(spec).encode())


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda s: s["pre_tokenizer"]["pretokenizers"].pop(0), "its pre-tokenizer is not StarCoder's"),
        (lambda s: s["model"]["merges"].reverse(), "order of its merges"),
        (lambda s: s["model"]["merges"].pop(), "tokens that no merge makes"),
        (lambda s: s["model"].update(ignore_merges=True), "ignore_merges"),
        (
            lambda s: s["added_tokens"].append(
                s["added_tokens"][0]
                | {"id": max(s["model"]["vocab"].values()) + 1, "content": "unused words", "special": False}
            ),
            "added tokens that are not special",
        ),
    ],
)
def test_other_tokenizers_keep_the_slow_encoder_and_say_why(tokenizer, change, reason):
    other = _changed(tokenizer, change)
    assert other.encoder_name == "tokenizers"
    assert reason in other.encoder_reason
    assert other.encode("return") == other._reference("return")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda s: s.update(pre_tokenizer=None),
        lambda s: s.update(normalizer={"type": "NFC"}),
        lambda s: s.update(normalizer={"type": "Lowercase"}),
    ],
)
def test_tokenizers_that_alter_text_are_refused(tokenizer, change):
    with pytest.raises(DataError, match="alters text .*: jaxcoder needs a tokenizer without a normalizer"):
        _changed(tokenizer, change)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, id_: s["added_tokens"].append(s["added_tokens"][0] | {"id": 600 + id_, "content": "x"}), "gives it"),
        (
            lambda s, id_: s["added_tokens"].append(s["added_tokens"][0] | {"id": id_ - 5, "content": "TODO:"}),
            "gives it",
        ),
        (lambda s, id_: s["model"]["vocab"].update({"zz": 2**31}), "must be from 0 to 2\\*\\*31 - 1"),
        (lambda s, id_: s["model"]["vocab"].update({"zz": -1}), "expected u32"),
    ],
)
def test_ids_that_are_not_those_of_the_library_are_refused(tokenizer, change, message):
    with pytest.raises(DataError, match=message):
        _changed(tokenizer, lambda spec: change(spec, max(spec["model"]["vocab"].values()) + 1))


def test_bpe_dropout_is_turned_off(tokenizer, caplog):
    other = _changed(tokenizer, lambda spec: spec["model"].update(dropout=0.5))
    assert "BPE dropout 0.5, which is turned off" in caplog.text
    text = "def function(argument): return argument" * 20
    assert other.encode(text) == tokenizer.encode(text)
    assert json.loads(other.files()["tokenizer.json"])["model"]["dropout"] is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared folder of failing inputs")
def test_failing_inputs():
    for name in ("ids_behind_a_gap", "added_token_with_a_taken_id"):
        with pytest.raises(DataError, match="gives it"):
            Tokenizer.load(SHARED / f"{name}.json")
    assert Tokenizer.load(SHARED / "bpe_dropout.json").encode("def f(x):") == Tokenizer.load(
        SHARED / "bpe_dropout.json"
    ).encode("def f(x):")


def test_a_byte_without_a_symbol_is_dropped_as_the_reference_drops_it(tokenizer):
    """StarCoder's own vocabulary lacks 14 byte symbols; tiktoken alone would panic on them."""

    def without_f4(spec):
        del spec["model"]["vocab"]["\u00f4"]

    other = _changed(tokenizer, without_f4)
    assert other.encoder_name == "tiktoken"
    assert other.encode("a\U0010ffffb") == other._reference("a\U0010ffffb")
    assert other.encode("plain") == tokenizer.encode("plain")


def test_merges_written_as_strings(tokenizer, stdlib_texts):
    def as_strings(spec):
        spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]

    other = _changed(tokenizer, as_strings)
    assert other.encoder_name == "tiktoken"
    assert other.encode(stdlib_texts[0]) == tokenizer.encode(stdlib_texts[0])


def test_truncation_and_padding_of_a_saved_tokenizer_are_ignored(tokenizer):
    def truncating(spec):
        spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        spec["pre_tokenizer"]["pretokenizers"].pop(0)

    assert len(_changed(tokenizer, truncating).encode("a b c d e f g h")) == 8
