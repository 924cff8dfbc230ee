"""The token store: one stream of token ids on disk, with checksums and the origin of every document.

    manifest.json        settings, counts, and the size and hash of every other file; written last
    tokens/              zarr 3 array of all ids (uint16 up to 65,536 ids, else uint32), in shards of compressed chunks
                         with checksums; every document is followed by an end token
    documents.parquet    one row per document, in stream order: start, text_bytes, repo_name, path, lang
    token_bytes.npy      bytes of text of each id, int32 [vocab_size]; 0 for special tokens
    tokenizer/           the tokenizer of the ids

A store is read from a local disk, gs:// or s3://.
Reference: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

import functools
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxcoder.data.directory import Directory
from jaxcoder.errors import DataError
from jaxcoder.io import manifests
from jaxcoder.io.os_errors import is_access_error
from jaxcoder.tokenizer.portable import parse_settings
from jaxcoder.tokenizer.tokenizer import Tokenizer

FORMAT = "jaxcoder token store"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WORK = "work"  # temporary files of an incomplete build
CHUNK_TOKENS = 8192  # unit of compression and checksum: a random window of 8192 tokens reads one or two
_CACHE_BYTES = 64 << 20
_SCHEMA = {
    "num_tokens": int,
    "num_documents": int,
    "text_bytes": int,
    "files": dict,
    "settings.vocab_size": int,
    "settings.tokenizer_fingerprint": str,
    "settings.shard_tokens": int,
    "settings.inputs": list,
}
_ANEW = "copy it again, or delete the directory and run `jaxcoder data build` again"


class TokenStore:
    """A complete store, open for reading; thread-safe.

    text_bytes: UTF-8 bytes of all documents, without special tokens.
    token_bytes: int32 [vocab_size], bytes of text of each id.
    """

    def __init__(self, directory: Directory, manifest: dict):
        self.directory = directory
        self.path = directory.path
        self.manifest = manifest
        settings = manifest["settings"]
        self.num_tokens: int = manifest["num_tokens"]
        self.num_documents: int = manifest["num_documents"]
        self.text_bytes: int = manifest["text_bytes"]
        self.vocab_size: int = settings["vocab_size"]
        self.tokenizer_fingerprint: str = settings["tokenizer_fingerprint"]
        self.shard_tokens: int = settings["shard_tokens"]
        self.token_bytes: np.ndarray = np.load(io.BytesIO(self._checked("token_bytes.npy")))
        self._checked("tokens/zarr.json")
        self._tokens = _open_array(directory)
        if self._tokens.shape != (self.num_tokens,):
            raise DataError(
                f"The token store {self.path} is damaged: its array has {self._tokens.shape[0]} tokens, but "
                f"{MANIFEST} has {self.num_tokens}; {_ANEW}."
            )

    @classmethod
    def open(cls, path: str | os.PathLike) -> "TokenStore":
        """Opens the store at `path`.

        Raises DataError if there is none, if it is incomplete, if another release wrote it, or if a file is missing or
        has another size than in the manifest. Altered bytes are detected by checksums when they are read.
        """
        directory = Directory(path)
        sizes = directory.sizes()
        if MANIFEST not in sizes:
            raise DataError(_no_manifest(directory.path, sizes))
        manifest = parse_manifest(directory.read(MANIFEST), directory / MANIFEST)
        for name, entry in manifest["files"].items():
            if sizes.get(name) != entry["bytes"]:
                state = "is missing" if name not in sizes else f"has {sizes[name]} bytes instead of {entry['bytes']}"
                raise DataError(f"The token store {directory.path} is damaged: {name} {state}; {_ANEW}.")
        return cls(directory, manifest)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids at positions [start, stop) of the stream, int32 [stop - start]. DataError if a checksum fails."""
        return self.start_reading(start, stop)()

    def start_reading(self, start: int, stop: int) -> Callable[[], np.ndarray]:
        """Starts `read` and returns a function that finishes it. Concurrent reads take half the time of serial ones."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) is not within the {self.num_tokens} tokens of {self.path}")
        reading = self._tokens[start:stop].read()

        def finish() -> np.ndarray:
            try:
                return reading.result().astype(np.int32)
            except ValueError as error:
                raise DataError(self._damaged(start, stop, error)) from error

        return finish

    @functools.cached_property
    def documents(self):
        """pyarrow.Table, one row per document in stream order: start, text_bytes, repo_name, path, lang."""
        import pyarrow.parquet as pq

        return pq.read_table(io.BytesIO(self._checked("documents.parquet")), use_threads=False)

    @functools.cached_property
    def document_offsets(self) -> np.ndarray:
        """int64 [num_documents + 1]: document d with its end token is [offsets[d], offsets[d + 1])."""
        return np.append(self.documents["start"].to_numpy(), np.int64(self.num_tokens))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per stored token, end tokens included: bits per byte is about loss / ln 2 / bytes_per_token."""
        return self.text_bytes / self.num_tokens

    def count_text_bytes(self, ids: np.ndarray) -> int:
        """Bytes of text of the ids; special tokens have none.

        Bits per byte of any windows is (sum of the losses of `ids`) / ln 2 / count_text_bytes(ids).
        """
        return int(self.token_bytes[ids].sum(dtype=np.int64))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the store, from its own copy."""
        name, config = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
        settings = parse_settings(self._checked(config), self.path) if config in self.manifest["files"] else None
        return Tokenizer(self._checked(name), origin=self.directory / name, settings=settings)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises DataError unless `tokenizer` is the one of the store."""
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise DataError(
                f"The token store {self.path} was written with another tokenizer (fingerprint "
                f"{self.tokenizer_fingerprint[:12]}, {self.vocab_size} ids) than the one given "
                f"({tokenizer.fingerprint[:12]}, {tokenizer.vocab_size} ids): use the copy in "
                f"{self.directory / 'tokenizer'}, or build the store again."
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError if the store has ids that exceed a model's `vocab_size`."""
        if vocab_size < self.vocab_size:
            raise DataError(
                f"The token store {self.path} has ids up to {self.vocab_size - 1}, but the model's vocab_size is "
                f"{vocab_size}: set model.vocab_size to {self.vocab_size} or more, or use a store with fewer ids."
            )

    def verify(self, *, at_most: int | None = None) -> None:
        """Compares every file with its hash, reading the entire store. DataError names the first that differs.

        at_most: skip stores of more bytes, and those on object stores; they are checked as they are read.
        """
        files = self.manifest["files"]
        size = sum(entry["bytes"] for entry in files.values())
        if at_most is not None and (size > at_most or not self.directory.is_local):
            return
        with ThreadPoolExecutor() as pool:  # hashing releases the GIL
            for name, sha256 in zip(files, pool.map(self.directory.sha256, files), strict=True):
                self._compare(name, sha256)

    def _checked(self, name: str) -> bytes:
        import hashlib

        content = self.directory.read(name)
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def _compare(self, name: str, sha256: str) -> None:
        if sha256 != self.manifest["files"][name]["sha256"]:
            raise DataError(f"The token store {self.path} is damaged: {name} was altered; {_ANEW}.")

    def _damaged(self, start: int, stop: int, error: ValueError) -> str:
        shards = range(start // self.shard_tokens, (stop - 1) // self.shard_tokens + 1)
        bad = [shard for shard in shards if not self._is_readable(shard, start, stop)] or list(shards)
        names = " and ".join(f"tokens/c/{shard}" for shard in bad)
        reason = str(error).split("[", 1)[0].strip()
        if is_access_error(error):
            return f"The token store {self.path} cannot be read ({names}: {reason}): check that it is still there."
        return f"The token store {self.path} is damaged: {names} cannot be read ({reason}); {_ANEW}."

    def _is_readable(self, shard: int, start: int, stop: int) -> bool:
        """Whether the part of [start, stop) in the shard can be read."""
        start, stop = max(start, shard * self.shard_tokens), min(stop, (shard + 1) * self.shard_tokens)
        try:
            self._tokens[start:stop].read().result()
        except ValueError:
            return False
        return True


def parse_manifest(content: bytes, origin: str) -> dict:
    """The manifest of a store of this release. Raises DataError for anything else, and if it was altered."""
    try:
        settings = json.loads(content)["settings"]
        version = settings["format_version"] if settings["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    if version is None:
        raise DataError(
            f"{origin} is damaged, or not the manifest of a token store: give a directory made by "
            "`jaxcoder data build`."
        )
    if version != FORMAT_VERSION:
        raise DataError(
            f"{origin} has format version {version}, but this release reads version {FORMAT_VERSION}: build the store "
            "again, or use the release of jaxcoder that wrote it."
        )
    manifest = manifests.unseal(content, origin, schema=_SCHEMA, advice=_ANEW)
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise DataError(f"{origin} is damaged (files.{name} has no bytes and sha256): {_ANEW}.")
    return manifest


def array_spec(kvstore: dict | str, *, num_tokens: int, dtype: str, shard_tokens: int) -> dict:
    """The tensorstore spec that creates the array of ids."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    checksum = {"name": "crc32c"}
    compression = {"name": "zstd", "configuration": {"level": 3}}
    sharding = {
        "chunk_shape": [CHUNK_TOKENS],
        "codecs": [little_endian, compression, checksum],
        "index_codecs": [little_endian, checksum],
        "index_location": "end",
    }
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        # Otherwise a chunk of end tokens only (id 0) is not stored and has no checksum.
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [num_tokens],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_tokens]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }


def _open_array(directory: Directory):
    import tensorstore as ts

    spec = {
        "driver": "zarr3",
        "kvstore": directory.kvstore("tokens"),
        "fill_missing_data_reads": False,  # otherwise a shard deleted during a run reads as end tokens (id 0)
        "recheck_cached_data": "open",  # a complete store does not change; checking on every read costs a third
        "context": {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}},
    }
    try:
        return ts.open(spec, read=True, open=True).result()
    except ValueError as error:
        reason = str(error).split(" [", 1)[0]
        raise DataError(
            f"The token store {directory.path} cannot be opened ({reason}): check the access to it, or copy it again."
        ) from error


def _no_manifest(path: str, sizes: dict[str, int]) -> str:
    if any(name.startswith(f"{WORK}/") for name in sizes):
        return f"The token store {path} is incomplete: run the same `jaxcoder data build` again, which completes it."
    state = "has no manifest.json" if sizes else "does not exist or is empty"
    return f"There is no token store at {path}: it {state}; make one with `jaxcoder data build`."
