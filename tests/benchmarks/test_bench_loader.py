"""`jaxcoder bench loader` and benchmarks/data at small size."""

import json

import numpy as np
import pytest

from benchmarks import command
from benchmarks.data import large_loader
from benchmarks.data.large_store import make_large_store
from jaxcoder.cli.main import main
from jaxcoder.data.build import build_store
from jaxcoder.data.trace import documents_within
from jaxcoder.errors import DataError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.tokenizer.train import train_tokenizer

SHARD = 8192


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    texts = [f"def f{n}(x):\n    return x + {n}\n" * (n % 7 + 1) for n in range(200)]
    documents = [Document.from_text(text, repo_name=f"r{n % 5}", path=f"{n}.py") for n, text in enumerate(texts)]
    write_documents(documents, root / "documents.jsonl")
    tokenizer = train_tokenizer(texts, 300)
    return build_store(root / "documents.jsonl", tokenizer, root / "store", seed=0, shard_tokens=SHARD)


def test_a_large_store_reads_like_the_small_one(small, tmp_path):
    large = make_large_store(small, tmp_path / "large", 50 * SHARD - 5)
    assert large.num_tokens == 50 * SHARD
    content = large.read(0, SHARD)
    end_id = small.tokenizer().eos_id
    assert np.array_equal(content[:-1], small.read(0, SHARD)[:-1]) and content[-1] == end_id
    for shard in (1, 49):
        assert np.array_equal(large.read(shard * SHARD, (shard + 1) * SHARD), content)
    assert np.array_equal(large.document_offsets[1:] - 1, np.flatnonzero(large.read(0, large.num_tokens) == end_id))
    assert large.text_bytes == 50 * large.count_text_bytes(content)
    traced = documents_within(large, 30 * SHARD, 30 * SHARD + 100)[0]
    number, _, name = traced.repo_name.partition("/")
    assert int(number) > 0 and name in {"r0", "r1", "r2", "r3", "r4"} and traced.start == 0
    large.verify()
    with pytest.raises(DataError, match="exists already"):
        make_large_store(small, tmp_path / "large", 1)


def test_loader(small, tmp_path):
    output = tmp_path / "loader.json"
    options = ["--seq-len", "64", "--batches", "2", "--runs", "1", "--output", str(output)]
    assert main(["bench", "loader", "--store", small.path, *options]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert rows[-2]["name"] == "host batches, with FIM" and all(row["mtok"] > 0 for row in rows)


def test_large_loader(small, tmp_path, capsys):
    options = ["--store-tokens", "1e5", "--seq-len", "64", "--batches", "2", "--runs", "1", "--memory-tokens", "6e3"]
    output = tmp_path / "loader.json"
    assert command.main(large_loader, ["--store", small.path, *options, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "host batches, with FIM" in printed and "share of a core" in printed and "Mtoken streamed" in printed
    speed, consumption, memory = json.loads(output.read_text())
    assert all(row["mtok"] > 0 for row in speed["rows"])
    billion = next(row for row in consumption["rows"] if row["model"] == "starcoderbase_1b")
    assert billion["TPU v5p chip"] == pytest.approx(0.025, rel=0.02)  # 229.5e12 FLOP/s over 9.1e9 a token
    assert len(memory["rows"]) == 11
