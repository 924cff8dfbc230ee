import hashlib
import os
import subprocess
import sys

import pytest

from jaxcoder.errors import ConfigError, DataError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.tokenizer.train import sample_texts, train_tokenizer


def test_vocabulary_size_and_digits(tokenizer):
    assert tokenizer.vocab_size == 2048
    digits = [token for i in range(275, 2048) if (token := tokenizer.decode([i])) and any(c.isdigit() for c in token)]
    assert digits == []
    assert len(tokenizer.encode("20231121")) == 8


def test_the_shortest_vocabulary_and_one_below():
    assert train_tokenizer(["some text"], 275).vocab_size == 275
    with pytest.raises(ConfigError, match="need 275"):
        train_tokenizer(["some text"], 274)
    with pytest.raises(ConfigError, match="too large"):
        train_tokenizer(["some text"], 10**30)


def test_little_text_gives_a_smaller_vocabulary():
    assert 275 < train_tokenizer(["some text"], 5000).vocab_size < 300


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text(texts):
    with pytest.raises(DataError, match="no text to train"):
        train_tokenizer(texts, 300)


def test_sentinels_and_surrogates_in_the_text_are_text():
    trained = train_tokenizer(["<|endoftext|>" * 50, "\ud800" * 50], 400)
    assert not trained.special_ids.intersection(trained.encode("<|endoftext|>"))


def test_an_error_of_the_reader_arrives():
    def texts():
        yield "x"
        raise DataError("broken line")

    with pytest.raises(DataError, match="broken line"):
        train_tokenizer(texts(), 300)


def test_result_does_not_depend_on_threads_or_hash_seeds(tmp_path, stdlib_texts):
    write_documents(map(Document.from_text, stdlib_texts[:25]), tmp_path / "d.parquet", plain=True)
    code = (
        "import sys; from jaxcoder.tokenizer.train import *; "
        "print(train_tokenizer(sample_texts(sys.argv[1], 300_000), 900).fingerprint)"
    )
    fingerprints = set()
    for threads in ("1", "2", "5"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", code, str(tmp_path / "d.parquet")]
        fingerprints.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(fingerprints) == 1


def test_sample_is_capped_even_and_always_the_same(tmp_path):
    texts = [hashlib.sha256(str(i).encode()).hexdigest() * 10 for i in range(1000)]
    write_documents(map(Document.from_text, texts), tmp_path / "d.parquet", plain=True)
    sample = list(sample_texts(tmp_path, 64_000))
    assert sample == list(sample_texts(tmp_path, 64_000))
    assert 50_000 < sum(map(len, sample)) <= 64_000
    places = [texts.index(text) for text in sample[:-1]]
    assert places == sorted(places) and places[0] < 100 and places[-1] > 800
    assert list(sample_texts(tmp_path, None)) == texts == list(sample_texts(tmp_path, 10**9))
    assert sample != list(sample_texts(tmp_path, 64_000, seed=1))


def test_one_large_document_is_cut_at_a_character(tmp_path):
    write_documents([Document.from_text("é" * 1000)], tmp_path / "d.jsonl")
    assert list(sample_texts(tmp_path, 1999)) in (["é" * 999], [])
