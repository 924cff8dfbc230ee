import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcoder.errors import DataError
from jaxcoder.io.document import Document, Part
from jaxcoder.tokenizer.special_tokens import SPECIAL_TOKENS
from jaxcoder.tokenizer.tokenizer import FimIds, Tokenizer


def test_special_tokens_have_starcoders_ids(tokenizer):
    assert [tokenizer.special_id(name) for name in SPECIAL_TOKENS] == list(range(19))
    assert tokenizer.eos_id == 0
    assert tokenizer.fim == FimIds(prefix=1, middle=2, suffix=3, pad=4)
    assert tokenizer.special_ids == frozenset(range(19))
    assert tokenizer.is_special(18) and not tokenizer.is_special(19)


def test_alphabet_is_complete_and_in_code_point_order(tokenizer):
    """Printable ASCII byte b has id b - 33 + 19; a complete alphabet puts newline at 217 (StarCoder: 203)."""
    assert tokenizer.encode("_(A") == [81, 26, 51]
    assert tokenizer.encode("\n") == [217]
    assert sorted(tokenizer.decode_bytes([i]) for i in range(19, 275)) == [bytes([b]) for b in range(256)]


@settings(deadline=None)
@given(st.binary(max_size=50))
def test_any_bytes_decode_exactly(tokenizer, content):
    id_of = {tokenizer.decode_bytes([i]): i for i in range(19, 275)}
    assert tokenizer.decode_bytes([id_of[bytes([byte])] for byte in content]) == content


@settings(deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<fim-prefix>", "<", "|", " a"]), max_size=8).map("".join))
def test_text_never_yields_a_special_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not tokenizer.special_ids.intersection(ids)
    assert not tokenizer.special_ids.intersection(tokenizer._reference(text))
    assert tokenizer.decode(ids) == text


def test_documents(tokenizer):
    document = Document(
        (Part(special="<filename>"), Part("a<fim"), Part("_prefix>"), Part(special="<gh_stars>"), Part("1"))
    )
    expected = [5, *tokenizer.encode("a<fim_prefix>"), 6, *tokenizer.encode("1")]
    assert tokenizer.encode_document(document) == expected
    assert tokenizer.decode(expected) == "<filename>a<fim_prefix><gh_stars>1"
    assert tokenizer.decode(expected, show_specials=False) == "a<fim_prefix>1"
    assert tokenizer.encode_document(Document(())) == []
    with pytest.raises(DataError, match="no special token '<nope>'"):
        tokenizer.encode_document(Document((Part(special="<nope>"),)))
    with pytest.raises(DataError, match="separates documents"):
        tokenizer.encode_document(Document((Part("x"), Part(special="<|endoftext|>"))))


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_decoding_a_part_of_a_character(tokenizer):
    ids = tokenizer.encode("\U0010fffe")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode(np.asarray(ids, np.int32)) == "\U0010fffe"


def test_ids_of_no_token(tokenizer):
    with pytest.raises(DataError, match=f"Token id {tokenizer.vocab_size} is not in the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(DataError, match="Token id -1"):
        tokenizer.decode([-1])
    mask = tokenizer.valid_ids(tokenizer.vocab_size + 3)
    assert mask[:-3].all() and not mask[-3:].any()
    with pytest.raises(DataError, match="only 100 rows"):
        tokenizer.valid_ids(100)


def test_loading_and_saving_keep_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "dir")
    for path in (tmp_path / "new" / "dir", tmp_path / "new" / "dir" / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("for i in range(10):") == tokenizer.encode("for i in range(10):")
    odd = json.dumps(json.loads(tokenizer._content), separators=(" ,", ": ")).encode()
    (tmp_path / "odd.json").write_bytes(odd)
    loaded = Tokenizer.load(tmp_path / "odd.json")
    assert loaded.fingerprint != tokenizer.fingerprint
    loaded.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == odd


def test_pickled(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint and copy.encode("x = 1") == tokenizer.encode("x = 1")


def test_santacoder_spelling_and_ids(tokenizer):
    """Specials at the end, with hyphens; rows between may be unused."""
    spec = json.loads(tokenizer._content)
    names = ["<|endoftext|>", "<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"]
    model = spec["model"]
    model["vocab"] = {token: id_ - 19 for token, id_ in model["vocab"].items() if id_ >= 19}
    first = len(model["vocab"])
    spec["added_tokens"] = [
        dict(spec["added_tokens"][0], id=first + i, content=name, special=name != "<fim-pad>")
        for i, name in enumerate(names)
    ]
    santa = Tokenizer(json.dumps(spec).encode())
    assert santa.fim == FimIds(prefix=first + 1, middle=first + 2, suffix=first + 3, pad=first + 4)
    assert santa.eos_id == first and santa.vocab_size == first + 5
    assert santa.encode("def f(): 12") == [i - 19 for i in tokenizer.encode("def f(): 12")]
    assert not santa.special_ids.intersection(santa.encode("<fim-prefix><fim-pad>"))
    with pytest.raises(DataError, match="no special token '<reponame>'"):
        santa.special_id("<reponame>")


def test_a_tokenizer_without_fim_says_so(tokenizer):
    spec = json.loads(tokenizer._content)
    spec["added_tokens"] = spec["added_tokens"][:1]
    assert Tokenizer(json.dumps(spec).encode()).fim is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'"x"',
        b'{"model": 5}',
        b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}}',
        b'{"model": {"type": "WordPiece", "vocab": {"a": 0}, "merges": []}}',
        b'{"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [5]}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [5]}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": 5}',
        '{"model": {"type": "BPE", "vocab": {"\u2581a": 0}, "merges": []}}'.encode(),
        b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": "x"}}',
    ],
)
def test_what_is_not_a_tokenizer_is_refused(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_loading_from_an_object_store(tokenizer):
    import fsspec

    fsspec.filesystem("memory").pipe_file("/bucket/tok/tokenizer.json", tokenizer._content)
    assert Tokenizer.load("memory://bucket/tok").fingerprint == tokenizer.fingerprint
    with pytest.raises(DataError, match="Cannot read the tokenizer memory://bucket/none"):
        Tokenizer.load("memory://bucket/none")
    with pytest.raises(DataError, match="Cannot read the tokenizer nowhere://x"):
        Tokenizer.load("nowhere://x")


def test_missing(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="Cannot read the tokenizer"):
            Tokenizer.load(path)
