"""The build: every document whole, in a seeded order; the same bytes whatever happens; nothing overwritten."""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hostile import hostile_documents

import jaxcoder.data.build as build
from jaxcoder.data.build import WorkSizes, build_store
from jaxcoder.data.directory import Directory
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.io.document import Document, Part
from jaxcoder.io.document_files import read_documents, write_documents
from jaxcoder.tasks import ProcessPool
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.tokenizer.train import train_tokenizer

SMALL = {"shard_tokens": 8192, "sizes": WorkSizes(3000, 5000)}


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


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz"])
def test_same_stream_for_any_size_of_slices_buckets_and_shards(tokenizer, documents_file, tmp_path, suffix):
    file = documents_file
    if suffix != ".parquet":
        file = tmp_path / "documents.jsonl"
        write_documents(read_documents(documents_file), file)
        file.write_bytes(b"\n" + file.read_bytes().replace(b"\n", b"\r\n\n", 50))  # blank lines, and odd line ends
    if suffix == ".jsonl.gz":
        (tmp_path / "documents.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        file = tmp_path / "documents.jsonl.gz"
    whole = build_store(file, tokenizer, tmp_path / "whole", seed=11)
    for slice_bytes, bucket_bytes in ((3000, 5000), (1000, 1 << 30), (1 << 30, 2000)):
        output = tmp_path / f"{slice_bytes}-{bucket_bytes}"
        small = build_store(
            file, tokenizer, output, seed=11, sizes=WorkSizes(slice_bytes, bucket_bytes), shard_tokens=8192
        )
        assert np.array_equal(small.read(0, small.num_tokens), whole.read(0, whole.num_tokens))
        assert small.documents.to_pylist() == whole.documents.to_pylist()
    assert sorted(documents_of(whole)) == sorted(
        (*tokenizer.encode_document(document), tokenizer.eos_id) for document in read_documents(documents_file)
    )


def test_same_bytes_for_any_number_of_workers(tokenizer, documents_file, tmp_path):
    for workers in (1, 2, 3):
        with contextlib.closing(ProcessPool(workers)) as pool:
            build_store(documents_file, tokenizer, tmp_path / str(workers), seed=11, mapper=pool, **SMALL)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")
    names = {name.split("/")[0] for name in content(tmp_path / "1")}
    assert names == {"manifest.json", "tokens", "documents.parquet", "token_bytes.npy", "tokenizer"}


def test_manifest_has_the_hashes_of_inputs_and_shards(tokenizer, documents_file, tmp_path):
    store = build_store(documents_file, tokenizer, tmp_path / "store", seed=11, **SMALL)
    (source,) = store.manifest["settings"]["inputs"]
    assert source["sha256"] == hashlib.sha256(documents_file.read_bytes()).hexdigest()
    files = content(tmp_path / "store")
    assert store.manifest["files"].keys() == files.keys() - {"manifest.json"}
    for name, entry in store.manifest["files"].items():
        assert entry == {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    assert len([name for name in files if name.startswith("tokens/c/")]) == -(-store.num_tokens // 8192) > 3
    store.verify()


def test_large_vocabulary_is_stored_as_uint32(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    spec = json.loads((tmp_path / "tokenizer/tokenizer.json").read_bytes())
    next(token for token in spec["added_tokens"] if token["content"] == "<filename>")["id"] = 70_000
    spec["model"]["vocab"]["<filename>"] = 70_000
    wide = Tokenizer(json.dumps(spec).encode())
    document = Document((Part(special="<filename>"), Part("a.py")))
    write_documents([document], tmp_path / "documents.parquet")
    store = build_store(tmp_path / "documents.parquet", wide, tmp_path / "wide", seed=11)
    assert store.manifest["settings"]["dtype"] == "uint32"
    assert store.read(0, store.num_tokens).tolist() == [70_000, *wide.encode("a.py"), wide.eos_id]


def test_finished_build_returns_at_once_and_other_builds_are_refused(tokenizer, documents_file, tmp_path, monkeypatch):
    output = tmp_path / "store"
    build_store(documents_file, tokenizer, output, seed=1)
    before = content(output)
    other_documents = tmp_path / "other.jsonl"
    write_documents(hostile_documents(5, seed=9), other_documents)
    other_tokenizer = train_tokenizer(["some text"], vocab_size=300)

    monkeypatch.setattr(build, "_Stages", None)  # nothing may be encoded
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
    with pytest.raises(DataError, match="not empty and is not a token store"):
        build_store(documents_file, tokenizer, tmp_path, seed=1)
    with pytest.raises(DataError, match="is a file, not a directory"):
        build_store(documents_file, tokenizer, tmp_path / "thesis.txt", seed=1)
    assert content(tmp_path) == {"thesis.txt": b"years of work"}


def test_interrupted_anywhere_gives_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    documents = tmp_path / "documents.jsonl"
    write_documents(hostile_documents(25), documents)
    build_store(documents, tokenizer, tmp_path / "undisturbed", seed=1, **SMALL)
    undisturbed = content(tmp_path / "undisturbed")
    # Every file of a build appears by `os.replace`.
    real = {(os, "replace"): os.replace, (Directory, "remove"): Directory.remove}
    steps = []

    def dies_at(number, after):
        count = 0

        def step(action):
            def wrapper(*arguments):
                nonlocal count
                count += 1
                if count == number and not after:
                    raise KeyboardInterrupt
                action(*arguments)
                if count == number:
                    raise KeyboardInterrupt

            return wrapper

        for (owner, name), action in real.items():
            monkeypatch.setattr(owner, name, step(action))

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


def test_files_cut_off_while_they_were_written_leave_no_trace(tokenizer, documents_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(build, "plan_slices", lambda *_: 1 / 0)
        build_store(documents_file, tokenizer, tmp_path / "store", seed=1)
    for name in (".token_bytes.npy.tmp12", "tokenizer/.vocab.json.tmp345"):
        (tmp_path / "store" / name).write_bytes(b"cut o")
    build_store(documents_file, tokenizer, tmp_path / "store", seed=1)
    build_store(documents_file, tokenizer, tmp_path / "undisturbed", seed=1)
    assert content(tmp_path / "store") == content(tmp_path / "undisturbed")


def test_another_build_in_progress_is_refused(tokenizer, documents_file, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        build_store(documents_file, tokenizer, tmp_path / "store", seed=1)
    with pytest.raises(DataError, match="another build"):
        build_store(documents_file, tokenizer, tmp_path / "store", seed=2)
    with pytest.raises(DataError, match="incomplete: run the same `jaxcoder data build` again"):
        TokenStore.open(tmp_path / "store")


def test_no_documents(tokenizer, tmp_path):
    write_documents([], tmp_path / "none.parquet")
    with pytest.raises(DataError, match="There are no documents in .*none.parquet"):
        build_store(tmp_path / "none.parquet", tokenizer, tmp_path / "store", seed=1)
    with pytest.raises(DataError, match="does not exist"):
        build_store(tmp_path / "absent.parquet", tokenizer, tmp_path / "store", seed=1)


def test_empty_documents_are_kept_beside_others(tokenizer, tmp_path):
    texts = ["", "x", ""]
    documents = [Document.from_text(text, path=str(number)) for number, text in enumerate(texts)]
    write_documents(documents, tmp_path / "some.jsonl")
    store = build_store(tmp_path / "some.jsonl", tokenizer, tmp_path / "store", seed=1)
    assert store.read(0, 4).tolist().count(tokenizer.eos_id) == 3 and store.text_bytes == 1
    write_documents(documents[:1] * 3, tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="All 3 documents in empty.jsonl are empty: give some with text"):
        build_store(tmp_path / "empty.jsonl", tokenizer, tmp_path / "none", seed=1)


def test_full_disk(tokenizer, documents_file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="No space left on device.*free some space"):
        build_store(documents_file, tokenizer, tmp_path / "store", seed=1)


def test_a_document_above_the_limit_is_named(tokenizer, tmp_path):
    documents = [Document.from_text("small"), Document.from_text("x" * 2000), Document.from_text("y")]
    for name in ("d.parquet", "d.jsonl"):
        write_documents(documents, tmp_path / name)
        message = rf"{name}, .* is a document of 2,\d+ bytes, but the limit is 1,000.*--max-document-bytes"
        with pytest.raises(DataError, match=message):
            build_store(tmp_path / name, tokenizer, tmp_path / f"{name}-1", seed=1, max_document_bytes=1000)
        assert build_store(tmp_path / name, tokenizer, tmp_path / f"{name}-2", seed=1).num_documents == 3
    write_documents([Document.from_text("x" * 20_000)], tmp_path / "large.parquet")  # seen before it is text
    with pytest.raises(DataError, match=r"row 0 is a document of 20,0\d\d bytes, but the limit is 1,000,"):
        build_store(tmp_path / "large.parquet", tokenizer, tmp_path / "0", seed=1, max_document_bytes=1000)
    (tmp_path / "one_line.jsonl").write_text('{"content": "' + "z" * 200_000 + '"}\n')
    with pytest.raises(DataError, match="one_line.jsonl, line at byte 0 .*of JSON.* is a document of .* bytes"):
        build_store(tmp_path / "one_line.jsonl", tokenizer, tmp_path / "3", seed=1, max_document_bytes=1000)


def test_bad_documents_are_named(tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"content": "fine"}\n' * 500 + "{broken\n")
    with pytest.raises(DataError, match="bad.jsonl, line 501 is not JSON"):
        build_store(tmp_path / "bad.jsonl", tokenizer, tmp_path / "1", seed=1, **SMALL)
    write_documents([Document((Part(special="<nonsense>"),), path="odd.py")], tmp_path / "special.parquet")
    with pytest.raises(DataError, match="no special token '<nonsense>'"):
        build_store(tmp_path / "special.parquet", tokenizer, tmp_path / "2", seed=1)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="bad.parquet is not a readable parquet file"):
        build_store(tmp_path / "bad.parquet", tokenizer, tmp_path / "3", seed=1)
    with pytest.raises(ConfigError, match="shard_tokens is 1000: choose a multiple of 8192"):
        build_store(tmp_path / "bad.parquet", tokenizer, tmp_path / "3", seed=1, shard_tokens=1000)


def test_inputs_changed_during_an_unfinished_build(tokenizer, tmp_path, monkeypatch):
    documents = tmp_path / "documents.jsonl"
    write_documents(hostile_documents(20), documents)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build_store(documents, tokenizer, tmp_path / "store", seed=1)
    write_documents(hostile_documents(20, seed=5), documents)
    with pytest.raises(DataError, match="with other documents"):
        build_store(documents, tokenizer, tmp_path / "store", seed=1)
    write_documents(hostile_documents(20), documents)
    assert build_store(documents, tokenizer, tmp_path / "store", seed=1).num_documents == 20


@pytest.mark.parametrize("place", ["runs", "buckets"])
def test_damaged_work_files(tokenizer, tmp_path, monkeypatch, place):
    documents = tmp_path / "documents.jsonl"
    write_documents(hostile_documents(200), documents)
    expected = build_store(documents, tokenizer, tmp_path / "expected", seed=1, **SMALL)
    stage = {"runs": "sort_bucket", "buckets": "write_shard"}[place]
    with monkeypatch.context() as patch:
        patch.setattr(build.build_tasks, stage, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build_store(documents, tokenizer, tmp_path / "store", seed=1, **SMALL)
    first, second = sorted((tmp_path / "store/work" / place).iterdir())[:2]
    first.write_bytes(first.read_bytes()[:-1])  # cut short: done again
    altered = bytearray(second.read_bytes())
    altered[len(altered) // 3] ^= 4
    second.write_bytes(altered)
    with pytest.raises(DataError, match=f"{second} of the incomplete build is damaged .*delete that file"):
        build_store(documents, tokenizer, tmp_path / "store", seed=1, **SMALL)
    second.unlink()
    build_store(documents, tokenizer, tmp_path / "store", seed=1, **SMALL)
    assert content(tmp_path / "store") == content(Path(expected.path))
