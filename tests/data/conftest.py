"""What the tests of the data room share: a small tokenizer, documents and a store of hostile text."""

import random

import pytest
from hostile import HOSTILE, hostile_documents

from jaxcoder.data.build import build_store
from jaxcoder.io.document_files import write_documents
from jaxcoder.tokenizer.train import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    # Half of the snippets: the others are spelled byte by byte, so that windows cut characters in two.
    rng = random.Random(5)
    texts = ["".join(rng.choice(HOSTILE[::2]) for _ in range(40)) for _ in range(300)]
    return train_tokenizer(texts, vocab_size=600)


@pytest.fixture(scope="session")
def documents_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "documents.parquet"
    write_documents(hostile_documents(1200), path)
    return path


@pytest.fixture(scope="session")
def store(tokenizer, documents_file, tmp_path_factory):
    return build_store(documents_file, tokenizer, tmp_path_factory.mktemp("store") / "store", seed=11)
