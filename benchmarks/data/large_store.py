"""A token store of any size for measurements: real content in its first shard, which every other shard links to.

It costs the disk one shard and reads like the real thing: every chunk is looked up, checked and decompressed anew, and
no cache holds it. The documents are those of the small store, repeated under distinct names.
"""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np

from jaxcoder.data.directory import Directory
from jaxcoder.data.store import MANIFEST, TokenStore, array_spec
from jaxcoder.errors import DataError

ORIGIN = ("repo_name", "path", "lang")


def make_large_store(small: TokenStore, path: str | os.PathLike, num_tokens: int) -> TokenStore:
    """A local store of `num_tokens` tokens (rounded up to whole shards) in the new directory `path`.

    Document d of `small`, met for the k-th time, has repo_name "<k>/<its own>". DataError if `path` exists.
    """
    import tensorstore as ts

    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists already: give a new directory, or delete it.")
    shard_tokens = small.shard_tokens
    num_shards = -(-num_tokens // shard_tokens)
    num_tokens = num_shards * shard_tokens
    directory = Directory(path)
    path.mkdir(parents=True)
    for name in small.manifest["files"]:
        if name.startswith("tokenizer/") or name == "token_bytes.npy":
            directory.write(name, small.directory.read(name))

    block = _one_shard(small)
    kvstore, dtype = directory.kvstore("tokens"), small.manifest["settings"]["dtype"]
    spec = array_spec(kvstore, num_tokens=num_tokens, dtype=dtype, shard_tokens=shard_tokens)
    ts.open(spec, create=True).result()[:shard_tokens].write(block).result()
    shards = path / "tokens" / "c"
    for number in range(1, num_shards):
        _link(shards / "0", shards / str(number))

    table = _documents(small, block, num_shards)
    directory.write("documents.parquet", _parquet(table))
    of_shards = directory.sha256("tokens/c/0")
    files = {
        name: {"bytes": size, "sha256": of_shards if name.startswith("tokens/c/") else directory.sha256(name)}
        for name, size in directory.sizes().items()
    }
    counts = {
        "num_tokens": num_tokens,
        "num_documents": table.num_rows,
        "text_bytes": int(table["text_bytes"].to_numpy().sum()),
    }
    manifest = {**small.manifest, **counts, "files": files}
    directory.write(MANIFEST, json.dumps(manifest).encode())
    return TokenStore.open(path)


def _one_shard(small: TokenStore) -> np.ndarray:
    """The small store's tokens, repeated or cut to fill a shard that ends a document."""
    have = small.read(0, min(small.num_tokens, small.shard_tokens))
    block = np.resize(have, small.shard_tokens).astype(small.manifest["settings"]["dtype"])
    block[-1] = small.tokenizer().eos_id
    return block


def _documents(small: TokenStore, block: np.ndarray, num_shards: int):
    import pyarrow as pa
    import pyarrow.compute as pc

    ends = np.flatnonzero(block == small.tokenizer().eos_id)
    starts = np.append(0, ends[:-1] + 1)
    times, rows = np.divmod(np.arange(len(starts) * num_shards), small.num_documents)
    text_bytes = np.append(0, np.cumsum(small.token_bytes[block], dtype=np.int64))
    per_document = text_bytes[ends + 1] - text_bytes[starts]
    origins = {field: small.documents[field].combine_chunks().take(pa.array(rows)) for field in ORIGIN}
    origins["repo_name"] = pc.binary_join_element_wise(pa.array(times).cast(pa.string()), origins["repo_name"], "/")
    return pa.table(
        {
            "start": (np.arange(num_shards, dtype=np.int64)[:, None] * len(block) + starts).reshape(-1),
            "text_bytes": np.tile(per_document, num_shards),
            **origins,
        }
    )


def _parquet(table) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
