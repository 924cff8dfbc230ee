"""Documents -> token store, once, in a seeded random order.

Two passes, both over files, neither holding the corpus in memory:

1. encode: documents are read in order, a group of about 32 MB of text at a time; each is encoded, given its place in
   the order (a keyed permutation of its number), and the group is written as one *run*, sorted by place.
2. merge: the range of places is cut into stretches; of each run a stretch is one slice, so the slices of all runs,
   sorted, are the next documents of the stream.

The result is a function of the documents, the tokenizer and the seed alone: not of threads, nor of interruptions.
A killed build goes on at the last finished run when started again. What identifies a build is written first
(`work/build.json`), the manifest last, and the directory of another build is never touched.
"""

import io
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxcoder.data.directory import Directory, fingerprint_file
from jaxcoder.data.order import Permutation
from jaxcoder.data.randomness import Purpose, check_seed
from jaxcoder.data.store import FORMAT, FORMAT_VERSION, MANIFEST, WORK, TokenStore, array_spec, parse_manifest
from jaxcoder.errors import DataError
from jaxcoder.protocols import SILENT, Progress
from jaxcoder.tokenizer.atomic import file_system_errors
from jaxcoder.tokenizer.document import Document, well_formed
from jaxcoder.tokenizer.document_files import ORIGIN_FIELDS, Paths, document_files, read_documents
from jaxcoder.tokenizer.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 24  # one file of the array: 32 MiB of uint16 before compression
_RUN_CHARACTERS = 32 << 20
_STRETCH_TOKENS = 1 << 24
_NUM_PLACES = 1 << 62  # documents are sorted by places in this range; a permutation gives no two the same
_BUILD = f"{WORK}/build.json"


def build_store(
    documents: Paths,
    tokenizer: Tokenizer,
    output_dir: str | os.PathLike,
    *,
    seed: int,
    progress: Progress = SILENT,
    shard_tokens: int = SHARD_TOKENS,
    run_characters: int = _RUN_CHARACTERS,
) -> TokenStore:
    """Build the token store of `documents` (parquet, jsonl, directories of them) in `output_dir`; return it, open.

    A finished store of the same build is returned at once, an unfinished one is completed. `run_characters` bounds the
    memory of the first pass; `shard_tokens` is a multiple of 8192. Raises DataError if the directory holds anything
    else, if there are no documents, if one of them cannot be read, or if the disk is full.
    """
    files = document_files(documents)
    directory = Directory(output_dir)
    settings = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "seed": check_seed(seed),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "shard_tokens": shard_tokens,
        "inputs": [fingerprint_file(file) for file in files],
    }
    if _claim(directory, {"settings": settings, "run_characters": run_characters}):
        num_runs = _encode(files, tokenizer, directory, settings, run_characters, progress)
        runs = _Runs(directory, num_runs)
        _write_tokenizer(tokenizer, directory)
        counts = _merge(runs, directory, settings, progress)
        _write_manifest(directory, settings, counts)
    directory.remove(WORK)
    return TokenStore.open(directory.path)


def _claim(directory: Directory, build: dict) -> bool:
    """Whether anything is left to build. DataError if the directory holds something else than this build."""
    present = directory.sizes()
    if MANIFEST in present:
        manifest = parse_manifest(directory.read(MANIFEST), directory / MANIFEST)
        _refuse_other(directory, manifest["settings"], build["settings"])
        return False
    if _BUILD in present:
        started = json.loads(directory.read(_BUILD))
        _refuse_other(directory, started["settings"], build["settings"])
        if started != build:  # the runs are cut elsewhere
            directory.remove(WORK)
    elif any(not name.startswith(f"{WORK}/") for name in present):
        raise DataError(
            f"{directory.path} is not empty and holds no token store: choose another output directory, or empty it."
        )
    for name in {name.split("/", 1)[0] for name in present} - {WORK}:
        directory.remove(name)  # the second pass, if it was under way, starts again
    directory.write(_BUILD, _json(build))
    return True


def _refuse_other(directory: Directory, theirs: dict, ours: dict) -> None:
    if theirs == ours:
        return
    words = {
        "inputs": "other documents",
        "tokenizer_fingerprint": "another tokenizer",
        "seed": f"seed {theirs.get('seed')}",
        "shard_tokens": f"shard_tokens {theirs.get('shard_tokens')}",
    }
    differs = [text for key, text in words.items() if theirs.get(key) != ours[key]] or ["other settings"]
    raise DataError(
        f"{directory.path} holds a token store of another build (made with {' and '.join(differs)}): choose another "
        "output directory, or delete that one."
    )


# The first pass -------------------------------------------------------------------------------------------------------


def _encode(
    files: list[str],
    tokenizer: Tokenizer,
    directory: Directory,
    settings: dict,
    run_characters: int,
    progress: Progress,
) -> int:
    """Write `work/run-00000.arrow` and so on, as far as they are not there; returns their number. DataError if none."""
    finished = directory.sizes()
    places = Permutation.from_seed(_NUM_PLACES, settings["seed"], Purpose.DOCUMENT_ORDER, 0)
    progress.start("Encoding documents", _count_rows(files), "documents")
    ordinal, num_runs, num_characters = 0, 0, 0

    def encode(document: Document) -> np.ndarray:
        return np.array([*tokenizer.encode_document(document), tokenizer.eos_id], settings["dtype"])

    # tiktoken and tokenizers let go of the interpreter while they encode, so threads use all cores
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for group in _groups(read_documents(files), run_characters):
            name = _run_name(num_runs)
            if name not in finished:
                ids = list(pool.map(encode, group))
                directory.write(name, _run(group, ids, ordinal, places))
            ordinal += len(group)
            num_runs += 1
            num_characters += sum(len(document.text) for document in group)
            progress.advance(len(group), f"{num_characters / 1e6:.0f} M characters")
    progress.finish(f"{ordinal:,} documents encoded with {tokenizer.encoder_name}")
    if ordinal == 0:
        raise DataError(f"There are no documents in {', '.join(files)}: give files that hold some.")
    return num_runs


def _groups(documents: Iterator[Document], run_characters: int) -> Iterator[list[Document]]:
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= run_characters:
            yield group
            group, size = [], 0
    if group:
        yield group


def _run(group: list[Document], ids: list[np.ndarray], ordinal: int, places: Permutation) -> bytes:
    """One run as an Arrow file: a row a document, sorted by place; `ordinal` is the number of the first."""
    import pyarrow as pa

    place = places(np.arange(ordinal, ordinal + len(group), dtype=np.uint64))
    order = np.argsort(place)
    offsets = np.cumsum([0, *(len(ids[row]) for row in order)], dtype=np.int64)
    tokens = np.concatenate([ids[row] for row in order])
    documents = [group[row] for row in order]
    table = pa.table(
        {
            "place": place[order],
            "tokens": pa.LargeListArray.from_arrays(offsets, tokens),
            "text_bytes": np.array([len(document.text.encode()) for document in documents], np.int64),
            **{
                field: pa.array([well_formed(getattr(document, field)) for document in documents], pa.string())
                for field in ORIGIN_FIELDS
            },
        }
    )
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _run_name(number: int) -> str:
    return f"{WORK}/run-{number:05d}.arrow"


def _count_rows(files: list[str]) -> int | None:
    """Documents to come, where that is known without reading them."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not all(file.endswith(".parquet") for file in files):
        return None
    total = 0
    for file in files:
        try:
            with fsspec.open(file, "rb") as stream:
                total += pq.ParquetFile(stream).metadata.num_rows
        except (pa.ArrowException, OSError):
            return None  # whoever reads the documents says it better
    return total


# The second pass ------------------------------------------------------------------------------------------------------


class _Runs:
    """The runs of the first pass, mapped into memory where the file system can."""

    def __init__(self, directory: Directory, count: int):
        self._tables = [self._open(directory, _run_name(number)) for number in range(count)]
        self._places = [table["place"].to_numpy() for table in self._tables]
        self.num_documents = sum(table.num_rows for table in self._tables)
        self.num_tokens = sum(len(chunk.values) for table in self._tables for chunk in table["tokens"].chunks)
        self.text_bytes = sum(int(table["text_bytes"].to_numpy().sum()) for table in self._tables)

    @staticmethod
    def _open(directory: Directory, name: str):
        import pyarrow as pa

        local = directory.local_file(name)
        try:
            source = pa.memory_map(str(local)) if local else pa.py_buffer(directory.read(name))
            return pa.ipc.open_file(source).read_all()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"The unfinished build in {directory.path} is damaged ({name}: {error}): delete the directory and "
                "run again."
            ) from error

    def in_order(self) -> Iterator:
        """Tables of documents that follow one another in the stream."""
        import pyarrow as pa

        count = -(-self.num_tokens // _STRETCH_TOKENS)
        for number in range(count):
            bounds = np.array([_NUM_PLACES * number // count, _NUM_PLACES * (number + 1) // count], np.uint64)
            slices = []
            for table, places in zip(self._tables, self._places, strict=True):
                start, stop = np.searchsorted(places, bounds)
                slices.append(table.slice(start, stop - start))
            stretch = pa.concat_tables(slices).combine_chunks()
            yield stretch.take(pa.array(np.argsort(stretch["place"].to_numpy())))


def _merge(runs: _Runs, directory: Directory, settings: dict, progress: Progress) -> dict:
    """Write the array of ids and the table of documents; returns the counts for the manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    progress.start("Writing the token store", runs.num_tokens, "tokens")
    writer = _ShardWriter(directory, runs.num_tokens, settings["dtype"], settings["shard_tokens"])
    documents, start = [], 0
    for table in runs.in_order():
        lists = table["tokens"].combine_chunks()
        ids = lists.flatten().to_numpy()
        offsets = start + lists.offsets.to_numpy()[:-1] - lists.offsets[0].as_py()
        documents.append(table.drop_columns(["place", "tokens"]).add_column(0, "start", pa.array(offsets)))
        writer.append(ids)
        start += len(ids)
        progress.advance(len(ids))
    writer.close()
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(documents), sink, compression="zstd")
    directory.write("documents.parquet", sink.getvalue())
    progress.finish(f"{runs.num_tokens:,} tokens of {runs.num_documents:,} documents in {directory.path}")
    return {"num_tokens": runs.num_tokens, "num_documents": runs.num_documents, "text_bytes": runs.text_bytes}


class _ShardWriter:
    """Appends ids to the array, a whole shard at a time: each is compressed and written once."""

    def __init__(self, directory: Directory, num_tokens: int, dtype: str, shard_tokens: int):
        import tensorstore as ts

        self._path = directory.path
        self._pending: list[np.ndarray] = []
        self._num_pending = self._written = 0
        self._shard_tokens = shard_tokens
        spec = array_spec(directory, num_tokens=num_tokens, dtype=dtype, shard_tokens=shard_tokens)
        self._array = self._wait(ts.open(spec, create=True))

    def append(self, ids: np.ndarray) -> None:
        self._pending.append(ids)
        self._num_pending += len(ids)
        if self._num_pending >= self._shard_tokens:
            self._flush(self._num_pending // self._shard_tokens * self._shard_tokens)

    def close(self) -> None:
        self._flush(self._num_pending)

    def _flush(self, count: int) -> None:
        ids = np.concatenate(self._pending) if self._pending else np.zeros(0, np.uint16)
        for start in range(0, count, self._shard_tokens):
            shard = ids[start : min(start + self._shard_tokens, count)]
            self._wait(self._array[self._written : self._written + len(shard)].write(shard))
            self._written += len(shard)
        self._pending, self._num_pending = [ids[count:]], len(ids) - count

    def _wait(self, future):
        try:
            return future.result()
        except ValueError as error:
            full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
            reason = "No space left on device" if full else str(error)
            raise DataError(
                f"Cannot write the token store {self._path} ({reason}): free some space or choose another output "
                "directory, and run again."
            ) from error


def _write_tokenizer(tokenizer: Tokenizer, directory: Directory) -> None:
    """The tokenizer's files and the table of bytes behind each id."""
    token_bytes = np.zeros(tokenizer.vocab_size, np.int32)
    for token in np.flatnonzero(tokenizer.valid_ids(tokenizer.vocab_size)).tolist():
        if not tokenizer.is_special(token):
            token_bytes[token] = len(tokenizer.decode_bytes([token]))
    sink = io.BytesIO()
    np.save(sink, token_bytes)
    directory.write("token_bytes.npy", sink.getvalue())
    with file_system_errors(directory / "tokenizer"), tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(temporary)
        for file in sorted(Path(temporary).iterdir()):
            directory.write(f"tokenizer/{file.name}", file.read_bytes())


def _write_manifest(directory: Directory, settings: dict, counts: dict) -> None:
    files = {
        name: {"bytes": size, "sha256": directory.sha256(name)}
        for name, size in directory.sizes().items()
        if not name.startswith(f"{WORK}/")
    }
    directory.write(MANIFEST, _json({"settings": settings, **counts, "files": files}))


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
