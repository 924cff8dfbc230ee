"""The store as a reader meets it: damaged, foreign, unfinished, behind other addresses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcoder.data.build import build_store
from jaxcoder.data.directory import Directory
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import DataError
from jaxcoder.tokenizer.train import train_tokenizer


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
    with pytest.raises(DataError, match="has no manifest.json; make one with `jaxcoder data build`"):
        TokenStore.open(copy)
    with pytest.raises(DataError, match="does not exist or is empty"):
        TokenStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["files", "num_tokens", "settings.vocab_size"])
def test_a_manifest_that_lacks_something(store, tmp_path, name):
    copy = damaged(store, tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    within = manifest["settings"] if name.startswith("settings.") else manifest
    del within[name.removeprefix("settings.")], manifest["sha256_of_this_file"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"has no {name} of type .*: copy it again"):
        TokenStore.open(copy)


def test_a_manifest_that_contradicts_the_array(store, tmp_path):
    copy = damaged(store, tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["num_tokens"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="manifest.json was altered"):
        TokenStore.open(copy)
    del manifest["sha256_of_this_file"]  # as an earlier release wrote it
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"its array has {store.num_tokens} tokens, but manifest.json has"):
        TokenStore.open(copy)


def test_a_shard_that_vanishes_while_the_store_is_open(store, tmp_path):
    copy = damaged(store, tmp_path)
    opened = TokenStore.open(copy)
    (copy / "tokens/c/0").unlink()
    with pytest.raises(DataError, match="cannot be read .tokens/c/0: .*is missing"):
        opened.read(0, 100)


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
    with pytest.raises(DataError, match="tokens/c/0 was altered"):
        opened.verify()
    for name, use in (
        ("documents.parquet", lambda: TokenStore.open(copy).documents),
        ("tokenizer/tokenizer.json", lambda: TokenStore.open(copy).tokenizer()),
        ("tokens/zarr.json", lambda: TokenStore.open(copy)),
        ("token_bytes.npy", lambda: TokenStore.open(copy)),
    ):
        flip(copy / name, -50)
        with pytest.raises(DataError, match=f"{name} was altered"):
            use()


def test_the_damaged_shard_is_named_among_others(tokenizer, documents_file, tmp_path):
    build_store(documents_file, tokenizer, tmp_path / "store", seed=1, shard_tokens=8192)
    flip(tmp_path / "store/tokens/c/1", 100)
    opened = TokenStore.open(tmp_path / "store")
    assert len(opened.read(0, 8192)) == 8192
    with pytest.raises(DataError, match=r"damaged: tokens/c/1 cannot be read"):
        opened.read(8000, 24_000)
    with pytest.raises(DataError, match="tokens/c/1 was altered"):
        opened.verify(at_most=1 << 30)
    opened.verify(at_most=1000)


def test_chunks_of_end_tokens_alone_have_a_checksum_too(tokenizer, tmp_path):
    assert tokenizer.eos_id == 0  # what zarr takes for "nothing was written"
    (tmp_path / "empty.jsonl").write_text('{"content": ""}\n' * 30_000 + '{"content": "x"}\n')
    store = build_store(tmp_path / "empty.jsonl", tokenizer, tmp_path / "store", seed=1, shard_tokens=8192)
    shard = next(k for k in range(3) if not store.read(k * 8192, (k + 1) * 8192).any())
    flip(tmp_path / f"store/tokens/c/{shard}", 10)
    with pytest.raises(DataError, match=f"tokens/c/{shard} cannot be read"):
        TokenStore.open(tmp_path / "store").read(shard * 8192, shard * 8192 + 808)


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
    with pytest.raises(DataError, match="Cannot use the address"):
        Directory("nosuchprotocol://x")


def test_does_not_import_jax():
    imports = "import sys, jaxcoder.data.build, jaxcoder.data.stream\n"
    code = imports + "assert not {'jax', 'grain', 'pyarrow', 'tensorstore'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flipped_bits_of_a_manifest_are_found(store, tmp_path):
    copy = damaged(store, tmp_path)
    original = (copy / "manifest.json").read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for position, bit in zip(draw.integers(0, len(original), 200), draw.integers(0, 8, 200), strict=True):
        content = bytearray(original)
        content[position] ^= 1 << bit
        (copy / "manifest.json").write_bytes(content)
        try:
            opened = TokenStore.open(copy)
        except DataError:
            refused += 1
        else:  # a change of white space
            assert opened.manifest == store.manifest
    assert refused > 150
