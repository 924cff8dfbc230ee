"""The tasks of a build, run by workers on files. `build.py` has the order of the stages.

    encode  a slice of documents -> a *run*: encoded documents, partitioned into buckets by key
    sort    one bucket of every run -> a *bucket*: documents in stream order, their ids as one array
    shard   the buckets that overlap a shard of the store -> the shard, as tensorstore would write it
    table   the tables of all buckets -> documents.parquet

A document's key is a keyed permutation of its number: a unique, uniform integer in [0, 2**62). Buckets are ranges of
keys, so they are contiguous in the stream. The output of a task does not depend on the worker or the time. Intermediate
files have checksums. Memory is bounded by one slice, one bucket or one shard.
"""

import functools
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jaxcoder.data.directory import Directory
from jaxcoder.data.input_slices import Slice, read_slice
from jaxcoder.data.permutation import Permutation
from jaxcoder.data.randomness import Purpose
from jaxcoder.data.store import array_spec
from jaxcoder.errors import DataError
from jaxcoder.io.addresses import open_address
from jaxcoder.io.checksums import fingerprint_file
from jaxcoder.io.document import Document, well_formed
from jaxcoder.io.document_files import ORIGIN_FIELDS
from jaxcoder.io.os_errors import access_errors
from jaxcoder.tokenizer.tokenizer import Tokenizer

NUM_KEYS = 1 << 62

# The location of each bucket in a run. A run of a large compressed file has several entries per bucket.
INDEX = np.dtype(
    [("bucket", "<i4"), ("crc", "<u4"), ("offset", "<i8"), ("bytes", "<i8"), ("documents", "<i8"), ("tokens", "<i8")]
)


@dataclass(frozen=True)
class Encoding:
    """Parameters of the encoding."""

    seed: int
    dtype: str
    num_buckets: int
    tokenizer_fingerprint: str
    segment_bytes: int  # of text that a worker holds in memory
    max_document_bytes: int


# Encode ---------------------------------------------------------------------------------------------------------------


def encode_slice(
    inputs: Sequence[str], output: Path, *, part: Slice, encoding: Encoding, version: tuple[list, str]
) -> dict:
    """inputs: tokenizer.json and the file of documents. Writes a run: tables of documents, then their index.

    version: size and time, and SHA-256, of the file; DataError if it has changed.
    """
    tokenizer = _tokenizer(inputs[0], encoding.tokenizer_fingerprint)
    index: list[tuple] = []
    text_bytes = offset = 0
    is_named = False
    with open(output, "wb") as file:
        for group in _encoded_groups(read_slice(part, encoding.max_document_bytes), tokenizer, encoding):
            table = group.table(encoding.seed)
            text_bytes += group.text_bytes
            is_named |= group.is_named
            for bucket, rows in _by_bucket(table, encoding.num_buckets):
                content = _table_to_bytes(rows)
                tokens = int(rows["length"].to_numpy().sum())
                index.append((bucket, zlib.crc32(content), offset, len(content), rows.num_rows, tokens))
                offset += file.write(content)
        entries = np.array(index, INDEX)
        file.write(entries.tobytes())
    check_unchanged(part.file, *version)
    return {
        "documents": int(entries["documents"].sum()),
        "tokens": int(entries["tokens"].sum()),
        "text_bytes": text_bytes,
        "named": is_named,
        "index_at": offset,
        "encoder": tokenizer.encoder_name,
    }


def check_unchanged(file: str, version: list, sha256: str) -> None:
    """Raises DataError if a file is not what it was when the build began."""
    if Directory(os.path.dirname(file)).version(os.path.basename(file)) == list(version):
        return
    if fingerprint_file(file)["sha256"] != sha256:
        raise DataError(f"{file} changed during the build: run the same command again in another output directory.")


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str, fingerprint: str) -> Tokenizer:
    """The tokenizer, loaded once per worker."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{path} was altered during the build: delete the incomplete store and build it again.")
    return tokenizer


class _EncodedDocuments:
    """Encoded documents in memory, without their text."""

    def __init__(self):
        self.text_bytes = 0
        self._numbers: list[int] = []
        self._ids: list[np.ndarray] = []
        self._sizes: list[int] = []
        self._origins: dict[str, list[str]] = {field: [] for field in ORIGIN_FIELDS}

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def is_named(self) -> bool:
        """Whether a document has a repository or a path."""
        return any(self._origins["repo_name"]) or any(self._origins["path"])

    def add(self, number: int, document: Document, text_bytes: int, ids: np.ndarray) -> None:
        self.text_bytes += text_bytes
        self._numbers.append(number)
        self._ids.append(ids)
        self._sizes.append(text_bytes)
        for field, values in self._origins.items():
            values.append(well_formed(getattr(document, field)))

    def table(self, seed: int):
        """One row per document, sorted by key: key, length, text_bytes, the fields of its origin, tokens."""
        import pyarrow as pa

        permutation = Permutation.from_seed(NUM_KEYS, seed, Purpose.DOCUMENT_ORDER, 0)
        keys = permutation(np.array(self._numbers, np.uint64))
        order = np.argsort(keys)
        lengths = np.array([len(self._ids[row]) for row in order], np.int64)
        tokens = np.concatenate([self._ids[row] for row in order])
        return pa.table(
            {
                "key": keys[order],
                "length": lengths,
                "text_bytes": np.array(self._sizes, np.int64)[order],
                **{
                    field: pa.array([values[row] for row in order], pa.string())
                    for field, values in self._origins.items()
                },
                "tokens": pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), tokens),
            }
        )


def _encoded_groups(
    documents: Iterator[tuple[int, int, Document]], tokenizer: Tokenizer, encoding: Encoding
) -> Iterator[_EncodedDocuments]:
    """The encoded documents in groups of at least `segment_bytes` of text, except the last."""
    end, group = tokenizer.eos_id, _EncodedDocuments()
    for number, text_bytes, document in documents:
        ids = np.array([*tokenizer.encode_document(document), end], encoding.dtype)
        group.add(number, document, text_bytes, ids)
        if group.text_bytes >= encoding.segment_bytes:
            yield group
            group = _EncodedDocuments()
    if len(group):
        yield group


def _by_bucket(table: Any, num_buckets: int) -> Iterator[tuple[int, Any]]:
    """(bucket, its rows) of a table sorted by key, without empty buckets."""
    buckets = (table["key"].to_numpy() >> np.uint64(30)) * np.uint64(num_buckets) >> np.uint64(32)
    present, starts = np.unique(buckets, return_index=True)
    for bucket, start, stop in zip(present, starts, [*starts[1:], table.num_rows], strict=True):
        yield int(bucket), table.slice(start, stop - start)


def read_index(run: str, index_at: int, size: int) -> np.ndarray:
    """INDEX [entries] of a run of `size` bytes."""
    fs, root = open_address(run)
    with access_errors(run):
        return np.frombuffer(fs.cat_file(root, start=index_at, end=size), INDEX)


# Sort -----------------------------------------------------------------------------------------------------------------


def sort_bucket(inputs: Sequence[str], output: Path, *, entries: np.ndarray, dtype: str) -> dict:
    """inputs: the runs; entries: INDEX [inputs], one per input. Writes a bucket: ids, then the table of documents."""
    import pyarrow as pa

    tables = [
        _table_from_bytes(_read_checked(run, int(entry["offset"]), int(entry["bytes"]), int(entry["crc"])))
        for run, entry in zip(inputs, entries, strict=True)
    ]
    tokens, rest = np.zeros(0, dtype), b""
    if tables:
        order = np.argsort(np.concatenate([table["key"].to_numpy() for table in tables]))
        documents = [ids for table in tables for ids in _lists(table["tokens"].combine_chunks())]
        tokens = np.concatenate([documents[row] for row in order])
        table = pa.concat_tables(table.drop_columns(["key", "tokens"]) for table in tables)
        rest = _table_to_bytes(table.combine_chunks().take(pa.array(order)))
    with open(output, "wb") as file:
        file.write(tokens.data)
        file.write(rest)
    return {"tokens": len(tokens), "tokens_crc": zlib.crc32(tokens.data), "table_crc": zlib.crc32(rest)}


def _lists(array) -> list[np.ndarray]:
    """The rows of a list array, as views."""
    offsets, values = array.offsets.to_numpy(), array.values.to_numpy()
    return [values[start:stop] for start, stop in pairwise(offsets)]


# Write the store ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """A sorted bucket: `first` is the position of its first token in the stream, `bytes` the size of its file."""

    first: int
    tokens: int
    tokens_crc: int
    table_crc: int
    bytes: int


def write_shard(
    inputs: Sequence[str], output: Path, *, buckets: Sequence[Bucket], number: int, num_tokens: int, dtype: str,
    shard_tokens: int,
) -> dict:  # fmt: skip
    """inputs: the buckets that overlap the shard. Writes the file of shard `number` of the array."""
    start, stop = number * shard_tokens, min((number + 1) * shard_tokens, num_tokens)
    parts = []
    for path, bucket in zip(inputs, buckets, strict=True):
        ids = np.frombuffer(_read_checked(path, 0, bucket.tokens * np.dtype(dtype).itemsize, bucket.tokens_crc), dtype)
        parts.append(ids[max(0, start - bucket.first) : stop - bucket.first])
    array = _array_in_memory(num_tokens, dtype, shard_tokens)
    array[start:stop].write(np.concatenate(parts)).result()
    content = array.kvstore.read(f"c/{number}").result().value
    output.write_bytes(content)
    return {"sha256": hashlib.sha256(content).hexdigest()}


def array_metadata(num_tokens: int, dtype: str, shard_tokens: int) -> bytes:
    """The content of the array's zarr.json."""
    return _array_in_memory(num_tokens, dtype, shard_tokens).kvstore.read("zarr.json").result().value


def _array_in_memory(num_tokens: int, dtype: str, shard_tokens: int):
    """The store's array in memory, empty: its key-value store then has the content of the files on disk."""
    import tensorstore as ts

    spec = array_spec("memory://", num_tokens=num_tokens, dtype=dtype, shard_tokens=shard_tokens)
    one_thread = {"data_copy_concurrency": {"limit": 1}}
    return ts.open(spec, create=True, context=ts.Context(one_thread)).result()


def write_table(inputs: Sequence[str], output: Path, *, buckets: Sequence[Bucket], dtype: str) -> dict:
    """inputs: all buckets. Writes documents.parquet, one row group per bucket."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [("start", pa.int64()), ("text_bytes", pa.int64()), *((field, pa.string()) for field in ORIGIN_FIELDS)]
    with pq.ParquetWriter(output, pa.schema(fields), compression="zstd") as writer:
        for path, bucket in zip(inputs, buckets, strict=True):
            at = bucket.tokens * np.dtype(dtype).itemsize
            if bucket.bytes == at:
                continue
            table = _table_from_bytes(_read_checked(path, at, bucket.bytes - at, bucket.table_crc))
            lengths = table["length"].to_numpy()
            starts = bucket.first + np.cumsum(lengths) - lengths
            writer.write_table(table.drop_columns(["length"]).add_column(0, "start", pa.array(starts)))
    return {"sha256": fingerprint_file(output)["sha256"]}


# Files ----------------------------------------------------------------------------------------------------------------


def _table_to_bytes(table) -> bytes:
    import pyarrow as pa

    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _table_from_bytes(content: bytes):
    import pyarrow as pa

    return pa.ipc.open_stream(content, options=pa.ipc.IpcReadOptions(use_threads=False)).read_all()


def _read_checked(path: str, offset: int, size: int, crc: int) -> bytes:
    fs, root = open_address(path)
    with access_errors(path):
        content = fs.cat_file(root, start=offset, end=offset + size)
    if zlib.crc32(content) != crc:
        raise DataError(
            f"{path} of the incomplete build is damaged (its checksum differs): delete that file and run again."
        )
    return content
