"""Inputs of a build that change, repeat, are hidden, damaged, or have The Stack's columns."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxcoder.data import build_tasks
from jaxcoder.data.build import build_store
from jaxcoder.errors import DataError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import document_files, read_documents, write_documents
from jaxcoder.tasks import ProcessPool
from jaxcoder.tokenizer.train import train_tokenizer

TEXT = "def f(x):\n    return x + 1\n" * 30


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


def write(file, **origin):
    write_documents([Document.from_text(TEXT + str(i), **origin) for i in range(20)], file)
    return file


def test_an_input_that_changes_during_the_build(tokenizer, tmp_path, monkeypatch):
    file = write(tmp_path / "d.jsonl", path="a")
    check = build_tasks.check_unchanged

    def change_and_check(name, *version):
        with open(file, "a") as stream:
            stream.write(json.dumps({"content": "more"}) + "\n")
        check(name, *version)

    monkeypatch.setattr(build_tasks, "check_unchanged", change_and_check)
    with pytest.raises(DataError, match="d.jsonl changed during the build"):
        build_store(file, tokenizer, tmp_path / "store", seed=0, mapper=ProcessPool(1))
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_an_input_that_is_only_touched(tokenizer, tmp_path, monkeypatch):
    file = write(tmp_path / "d.jsonl", path="a")
    check = build_tasks.check_unchanged

    def touch_and_check(name, *version):
        os.utime(file, (1, 1))
        check(name, *version)

    monkeypatch.setattr(build_tasks, "check_unchanged", touch_and_check)
    assert build_store(file, tokenizer, tmp_path / "store", seed=0, mapper=ProcessPool(1)).num_documents == 20


def test_the_same_input_twice_is_read_once(tmp_path, caplog):
    (tmp_path / "in").mkdir()
    file = write(tmp_path / "in" / "d.jsonl")
    (tmp_path / "link.jsonl").symlink_to(file)
    given = [tmp_path / "in", file, tmp_path / "link.jsonl", tmp_path / "in" / ".." / "in" / "d.jsonl"]
    assert len(document_files(given)) == 1
    assert caplog.text.count("is the same file as") == 3


def test_hidden_files_of_a_directory_are_not_read(tmp_path, caplog):
    (tmp_path / "in" / ".cache").mkdir(parents=True)
    file = write(tmp_path / "in" / "d.jsonl")
    write(tmp_path / "in" / ".d.jsonl")
    write(tmp_path / "in" / ".cache" / "e.jsonl")
    assert [os.path.realpath(found) for found in document_files(tmp_path / "in")] == [str(file)]
    assert "has 2 hidden files, not read" in caplog.text
    assert len(document_files(tmp_path / "in" / ".d.jsonl")) == 1  # unless it is named


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_the_columns_of_the_stack(tokenizer, tmp_path, suffix):
    rows = [
        {"content": TEXT, "max_stars_repo_name": "a/b", "max_stars_repo_path": f"{i}.py", "lang": "Python", "size": 3}
        for i in range(3)
    ]
    file = tmp_path / f"d{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = list(read_documents(file))
    assert [(d.repo_name, d.path, d.lang) for d in documents] == [("a/b", f"{i}.py", "Python") for i in range(3)]
    store = build_store(file, tokenizer, tmp_path / "store", seed=0, mapper=ProcessPool(1))
    assert set(store.documents["path"].to_pylist()) == {"0.py", "1.py", "2.py"}


def test_documents_without_names_are_reported(tokenizer, tmp_path, caplog):
    build_store(write(tmp_path / "d.jsonl"), tokenizer, tmp_path / "store", seed=0, mapper=ProcessPool(1))
    assert "have no repo_name and no path: `data trace` cannot name them" in caplog.text
    caplog.clear()
    build_store(write(tmp_path / "e.jsonl", path="x"), tokenizer, tmp_path / "named", seed=0, mapper=ProcessPool(1))
    assert "cannot name" not in caplog.text


@pytest.mark.parametrize("position", [30, 200, -20])
def test_a_gz_that_is_damaged_inside(tokenizer, tmp_path, position):
    file = tmp_path / "d.jsonl.gz"
    lines = "".join(json.dumps({"content": f"{TEXT}{i * 7919}"}) + "\n" for i in range(400))
    content = bytearray(gzip.compress(lines.encode()))
    content[position] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        build_store(file, tokenizer, tmp_path / "store", seed=0, mapper=ProcessPool(1))
    assert "d.jsonl.gz" in str(error.value) and "retries" not in str(error.value)
