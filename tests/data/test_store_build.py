"""The build: every document whole, in a seeded order; the same bytes whatever happens; nothing overwritten."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import hostile_documents

import jaxcoder.data.build as build
from jaxcoder.data.build import build_store
from jaxcoder.data.directory import Directory
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import DataError
from jaxcoder.tokenizer.document import Document
from jaxcoder.tokenizer.document_files import read_documents, write_documents
from jaxcoder.tokenizer.train import train_tokenizer

SMALL = {"shard_tokens": 8192, "run_characters": 3000}


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def documents_of(store: TokenStore) -> list[tuple[int, ...]]:
    ids = store.read(0, store.num_tokens)
    return [tuple(ids[start:stop]) for start, stop in pairwise(store.document_offsets)]


def test_holds_every_document_once_with_its_identity(store, tokenizer, documents_file):
    expected = {}
    for document in read_documents(documents_file):
        expected[document.path] = (
            (*tokenizer.encode_document(document), tokenizer.eos_id),
            (document.repo_name, document.lang, len(document.text.encode())),
        )
    table = store.documents.to_pylist()
    assert store.num_documents == len(table) == len(expected) == 1200
    for row, ids in zip(table, documents_of(store), strict=True):
        assert (ids, (row["repo_name"], row["lang"], row["text_bytes"])) == expected[row["path"]]
    assert store.num_tokens == sum(len(ids) for ids, _ in expected.values()) == store.document_offsets[-1]
    assert store.vocab_size == tokenizer.vocab_size and store.tokenizer().fingerprint == tokenizer.fingerprint
    assert store.manifest["settings"]["dtype"] == "uint16"


def test_order_is_random_and_seeded(store, tokenizer, documents_file, tmp_path):
    paths = [document.path for document in read_documents(documents_file)]
    rank = {path: place for place, path in enumerate(paths)}
    order = [rank[path] for path in store.documents["path"].to_pylist()]
    other = build_store(documents_file, tokenizer, tmp_path / "other", seed=12)
    order_of_other = [rank[path] for path in other.documents["path"].to_pylist()]
    for first, second in ((order, range(1200)), (order, order_of_other)):
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(1200)


def test_counts_bytes_of_text(store, tokenizer, documents_file):
    total = sum(len(document.text.encode()) for document in read_documents(documents_file))
    ids = store.read(0, store.num_tokens)
    assert store.text_bytes == total == store.count_text_bytes(ids) == store.documents["text_bytes"].to_numpy().sum()
    assert store.bytes_per_token == total / store.num_tokens
    special = sorted(tokenizer.special_ids)
    assert store.count_text_bytes(np.array(special)) == 0
    some = [token for token in ids[100:200].tolist() if token not in tokenizer.special_ids]
    assert store.count_text_bytes(np.array(some)) == len(tokenizer.decode_bytes(some))


def test_reads_any_slice(tokenizer, documents_file, tmp_path):
    store = build_store(documents_file, tokenizer, tmp_path / "store", seed=11, **SMALL)
    whole = store.read(0, store.num_tokens)
    assert whole.dtype == np.int32 and store.num_tokens > 3 * 8192
    rng = random.Random(0)
    for _ in range(50):
        start, stop = sorted(rng.choices(range(store.num_tokens + 1), k=2))
        assert np.array_equal(store.read(start, stop), whole[start:stop])
    for start, stop in ((-1, 5), (5, 4), (0, store.num_tokens + 1)):
        with pytest.raises(IndexError):
            store.read(start, stop)


def test_same_stream_for_any_size_of_runs_shards_and_stretches(store, tokenizer, documents_file, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_STRETCH_TOKENS", 1000)
    small = build_store(documents_file, tokenizer, tmp_path / "small", seed=11, **SMALL)
    assert np.array_equal(small.read(0, small.num_tokens), store.read(0, store.num_tokens))
    assert small.documents.to_pylist() == store.documents.to_pylist()


def test_large_vocabulary_is_stored_as_uint32(tokenizer, documents_file, tmp_path):
    class Wide:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        vocab_size = 70_000

        def encode_document(self, document):
            return [token + 65_000 for token in tokenizer.encode_document(document)]

    wide = build_store(documents_file, Wide(), tmp_path / "wide", seed=11)
    assert wide.manifest["settings"]["dtype"] == "uint32"
    assert wide.read(0, wide.num_tokens).max() > 65_535


def test_finished_build_returns_at_once_and_other_builds_are_refused(tokenizer, documents_file, tmp_path, monkeypatch):
    output = tmp_path / "store"
    build_store(documents_file, tokenizer, output, seed=1)
    before = content(output)
    other_documents = tmp_path / "other.jsonl"
    write_documents(hostile_documents(5, seed=9), other_documents)
    other_tokenizer = train_tokenizer(["some text"], vocab_size=300)

    monkeypatch.setattr(build, "_encode", None)  # nothing may be encoded
    assert build_store(documents_file, tokenizer, output, seed=1).num_documents == 1200
    for arguments, words in (
        ((documents_file, tokenizer, 2), "seed 1"),
        ((documents_file, other_tokenizer, 1), "another tokenizer"),
        ((other_documents, tokenizer, 1), "other documents"),
    ):
        with pytest.raises(DataError, match=f"another build .*{words}.*choose another output directory"):
            build_store(arguments[0], arguments[1], output, seed=arguments[2])
    assert content(output) == before


def test_a_directory_of_something_else_is_left_alone(tokenizer, documents_file, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not empty and holds no token store"):
        build_store(documents_file, tokenizer, tmp_path, seed=1)
    with pytest.raises(DataError, match="is a file, not a directory"):
        build_store(documents_file, tokenizer, tmp_path / "thesis.txt", seed=1)
    assert content(tmp_path) == {"thesis.txt": b"years of work"}


def test_interrupted_anywhere_gives_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    documents = tmp_path / "documents.jsonl"
    write_documents(hostile_documents(120), documents)
    build_store(documents, tokenizer, tmp_path / "undisturbed", seed=1, **SMALL)
    undisturbed = content(tmp_path / "undisturbed")
    real_write, real_remove, steps = Directory.write, Directory.remove, []

    def dies_at(number, after):
        count = 0

        def step(real):
            def wrapper(self, *arguments):
                nonlocal count
                count += 1
                if count == number and not after:
                    raise KeyboardInterrupt
                real(self, *arguments)
                if count == number:
                    raise KeyboardInterrupt

            return wrapper

        monkeypatch.setattr(Directory, "write", step(real_write))
        monkeypatch.setattr(Directory, "remove", step(real_remove))

    number = 0
    while True:
        number += 1
        output = tmp_path / f"disturbed-{number}"
        dies_at(number, after=number % 2)
        try:
            build_store(documents, tokenizer, output, seed=1, **SMALL)
        except KeyboardInterrupt:
            steps.append(number)
            with pytest.raises(DataError) if not (output / "manifest.json").exists() else open(os.devnull):
                TokenStore.open(output)
            dies_at(2, after=True)  # and once more on the way
            try:
                build_store(documents, tokenizer, output, seed=1, **SMALL)
            except KeyboardInterrupt:
                dies_at(0, after=False)
                build_store(documents, tokenizer, output, seed=1, **SMALL)
        else:
            break
        assert content(output) == undisturbed, number
    assert len(steps) > 10


BUILD_SCRIPT = """
import sys
from jaxcoder.data.build import build_store
from jaxcoder.tokenizer.tokenizer import Tokenizer
print("begin", flush=True)
build_store(sys.argv[1], Tokenizer.load(sys.argv[2]), sys.argv[3], seed=1, shard_tokens=8192, run_characters=3000)
"""


def test_killed_for_real(tokenizer, tmp_path):
    documents = tmp_path / "documents.parquet"
    write_documents(hostile_documents(2500), documents)
    tokenizer.save(tmp_path / "tokenizer")
    build_store(documents, tokenizer, tmp_path / "undisturbed", seed=1, **SMALL)
    command = [sys.executable, "-c", BUILD_SCRIPT, documents, tmp_path / "tokenizer", tmp_path / "killed"]
    rng = random.Random(time.time())
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.7))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert content(tmp_path / "killed") == content(tmp_path / "undisturbed")


def test_another_build_in_progress_is_refused(tokenizer, documents_file, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        build_store(documents_file, tokenizer, tmp_path / "store", seed=1)
    with pytest.raises(DataError, match="another build"):
        build_store(documents_file, tokenizer, tmp_path / "store", seed=2)
    with pytest.raises(DataError, match="unfinished: run the same `jaxcoder data build` again"):
        TokenStore.open(tmp_path / "store")


def test_no_documents(tokenizer, tmp_path):
    write_documents([], tmp_path / "none.parquet")
    with pytest.raises(DataError, match="There are no documents in .*none.parquet"):
        build_store(tmp_path / "none.parquet", tokenizer, tmp_path / "store", seed=1)
    with pytest.raises(DataError, match="does not exist"):
        build_store(tmp_path / "absent.parquet", tokenizer, tmp_path / "store", seed=1)


def test_empty_documents_are_kept(tokenizer, tmp_path):
    write_documents([Document.from_text("", path=str(number)) for number in range(3)], tmp_path / "empty.jsonl")
    store = build_store(tmp_path / "empty.jsonl", tokenizer, tmp_path / "store", seed=1)
    assert store.read(0, 3).tolist() == [tokenizer.eos_id] * 3 and store.text_bytes == 0


def test_full_disk(tokenizer, documents_file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="No space left on device.*free some space"):
        build_store(documents_file, tokenizer, tmp_path / "store", seed=1)


def damaged(store, tmp_path):
    import shutil

    shutil.copytree(store.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_missing_or_foreign_manifest(store, tmp_path):
    copy = damaged(store, tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["settings"]["format_version"] = 99
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="format version 99.*reads version 1"):
        TokenStore.open(copy)
    for foreign in ("{}", "[", '{"settings": 3}', "[]", '{"settings": {"format": "wheat"}}'):
        (copy / "manifest.json").write_text(foreign)
        with pytest.raises(DataError, match="not the manifest of a token store"):
            TokenStore.open(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds no manifest.json; make one with `jaxcoder data build`"):
        TokenStore.open(copy)
    with pytest.raises(DataError, match="does not exist or is empty"):
        TokenStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["tokens/c/0", "documents.parquet", "token_bytes.npy", "tokenizer/tokenizer.json"])
def test_truncated_or_missing_file(store, tmp_path, name):
    copy = damaged(store, tmp_path)
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-7])
    with pytest.raises(DataError, match=f"{name} has {len(whole) - 7} bytes instead of {len(whole)}"):
        TokenStore.open(copy)
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        TokenStore.open(copy)


def flip(file: Path, place: int) -> None:
    changed = bytearray(file.read_bytes())
    changed[place] ^= 16
    file.write_bytes(changed)


def test_altered_bytes_are_found_when_read(store, tmp_path):
    copy = damaged(store, tmp_path)
    flip(copy / "tokens/c/0", 100)
    opened = TokenStore.open(copy)
    with pytest.raises(DataError, match="tokens/c/0 cannot be read.*copy it again"):
        opened.read(0, 100)
    with pytest.raises(DataError, match="the content of tokens/c/0 is not what was written"):
        opened.verify()
    for name, use in (
        ("documents.parquet", lambda: TokenStore.open(copy).documents),
        ("tokenizer/tokenizer.json", lambda: TokenStore.open(copy).tokenizer()),
        ("token_bytes.npy", lambda: TokenStore.open(copy)),
    ):
        flip(copy / name, -50)
        with pytest.raises(DataError, match=f"the content of {name} is not what was written"):
            use()


def test_another_tokenizer_or_vocabulary(store):
    other = train_tokenizer(["some text"], vocab_size=300)
    with pytest.raises(DataError, match="written with another tokenizer"):
        store.check_tokenizer(other)
    store.check_vocabulary(store.vocab_size)
    with pytest.raises(DataError, match="set model.vocab_size to"):
        store.check_vocabulary(store.vocab_size - 1)


def test_directories_behind_other_addresses():
    directory = Directory("memory://some/where")
    assert directory.sizes() == {}
    directory.write("a/b.txt", b"content")
    directory.write("c", b"")
    assert directory.sizes() == {"a/b.txt": 7, "c": 0}
    assert directory.read("a/b.txt") == b"content" and len(directory.sha256("c")) == 64
    directory.remove("a")
    directory.remove("a")
    assert directory.sizes() == {"c": 0}
    with pytest.raises(DataError):
        directory.read("a/b.txt")
    with pytest.raises(DataError, match="Cannot use the directory"):
        Directory("nosuchprotocol://x")


def test_does_not_import_jax():
    imports = "import sys, jaxcoder.data.build, jaxcoder.data.stream\n"
    code = imports + "assert not {'jax', 'grain', 'pyarrow', 'tensorstore'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
