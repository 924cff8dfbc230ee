"""`jaxcoder data build` and `data inspect`, as the command line calls them."""

import argparse

import pytest

from jaxcoder.cli import data
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import DataError


def run(*words):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.run(parser.parse_args([str(word) for word in words]))


def test_builds_and_inspects(tokenizer, documents_file, tmp_path, capsys):
    pytest.importorskip("jaxcoder.record.console")
    tokenizer.save(tmp_path / "tokenizer")
    command = ("build", documents_file, "--tokenizer", tmp_path / "tokenizer", "--output-dir", tmp_path / "store")
    assert not run(*command)
    store = TokenStore.open(tmp_path / "store")
    printed = capsys.readouterr().out
    assert f"{store.num_tokens:,} tokens of 1,200 documents" in printed and "jaxcoder train" in printed
    assert not run(*command)
    with pytest.raises(DataError, match="another build"):
        run(*command, "--seed", 5)
    capsys.readouterr()
    assert not run("inspect", tmp_path / "store", "--verify")
    printed = capsys.readouterr().out
    assert "files match their hashes" in printed
    row = next(line for line in printed.splitlines() if line.startswith("python"))
    assert row.split() == ["python", "1,200", f"{store.num_tokens:,}", f"{store.text_bytes:,}"]


def test_refuses_what_is_not_there(tokenizer, documents_file, tmp_path):
    with pytest.raises(DataError, match="Cannot read the tokenizer"):
        run("build", documents_file, "--tokenizer", tmp_path / "none", "--output-dir", tmp_path / "store")
    with pytest.raises(DataError, match="There is no token store"):
        run("inspect", tmp_path / "store")
