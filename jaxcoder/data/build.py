"""Builds a token store from documents, in a seeded random order, in four stages of shard tasks.

    inputs      hash the files of documents and split them into slices
    encode      encode each slice and partition it into buckets by document key          work/runs/
    sort        collect each bucket from all slices and sort it by key                   work/buckets/
    write       write each shard of the array from the buckets that overlap it           tokens/, documents.parquet

Each worker holds one slice, one bucket or one shard in memory. The store depends on the documents, the tokenizer and
the seed only, not on the number of workers, the sizes of slices and buckets, or interruptions. A killed build resumes
at its unfinished tasks. The identity of a build is written first (`work/build.json`), the manifest last; the directory
of another build is never modified. The temporary files in `work/` take about 3.5 bytes per token.
"""

import contextlib
import functools
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcoder.data import build_tasks
from jaxcoder.data.build_tasks import Bucket, Encoding
from jaxcoder.data.directory import Directory
from jaxcoder.data.input_slices import Slice, absolute, file_layout, plan_slices
from jaxcoder.data.randomness import check_seed
from jaxcoder.data.store import CHUNK_TOKENS, FORMAT, FORMAT_VERSION, MANIFEST, WORK, TokenStore, parse_manifest
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.formatting import format_names
from jaxcoder.io import manifests
from jaxcoder.io.atomic import is_left_over
from jaxcoder.io.checksums import fingerprint_file
from jaxcoder.io.document_files import Paths, document_files
from jaxcoder.io.os_errors import access_errors
from jaxcoder.protocols import SILENT, Progress
from jaxcoder.tasks import Mapper, ProcessPool, Task, available_cores, run_stage
from jaxcoder.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SHARD_TOKENS = 1 << 24  # one file of the array: 32 MiB of uint16 before compression
MAX_DOCUMENT_BYTES = 64 << 20  # a worker needs some 50 times as much while it encodes such a document
_BYTES_FOR_A_WORKER = 8 << 20  # encoding less text takes less time than starting a process
_BUILD = f"{WORK}/build.json"
_INPUTS = f"{WORK}/inputs.json"


@dataclass(frozen=True)
class WorkSizes:
    """Sizes of slices and buckets in bytes of text; the store does not depend on them.

    A worker needs about 130 MB with a vocabulary of 49,152, plus 3 times the larger of the two. There are at most 8192
    slices and as many buckets, so both grow with corpora of several hundred gigabytes.
    """

    slice_bytes: int = 32 << 20
    bucket_bytes: int = 64 << 20

    def for_corpus(self, total: int) -> "WorkSizes":
        return WorkSizes(max(self.slice_bytes, total >> 13), max(self.bucket_bytes, total >> 13))


def build_store(
    documents: Paths,
    tokenizer: Tokenizer,
    output_dir: str | os.PathLike,
    *,
    seed: int,
    progress: Progress = SILENT,
    mapper: Mapper | None = None,
    shard_tokens: int = SHARD_TOKENS,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    sizes: WorkSizes = WorkSizes(),
) -> TokenStore:
    """Builds the token store of `documents` (parquet, jsonl, directories of them) in `output_dir` and opens it.

    All paths may be local, gs:// or s3://. A complete store of the same build is returned immediately, an incomplete
    one is resumed. `mapper` runs the tasks, by default one process per core (a script then needs
    `if __name__ == "__main__":`). `shard_tokens` is a multiple of 8192. Raises DataError if the directory has other
    contents, if there are no documents, if one of them cannot be read or is larger than `max_document_bytes`, if the
    disk is full, or if an object store cannot be accessed.
    """
    if shard_tokens < 1 or shard_tokens % CHUNK_TOKENS:
        raise ConfigError(f"shard_tokens is {shard_tokens}: choose a multiple of {CHUNK_TOKENS}.")
    files = [absolute(file) for file in document_files(documents)]
    directory = Directory(absolute(os.fspath(output_dir)))
    present = _usable(directory)
    inputs = _describe_inputs(files, directory, present, progress)
    settings: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "seed": check_seed(seed),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "shard_tokens": shard_tokens,
        "inputs": [entry["fingerprint"] for entry in inputs],
    }
    layouts = [entry["layout"] for entry in inputs]
    total = sum(layout["size"] for layout in layouts)
    sizes = sizes.for_corpus(total)
    if _claim(directory, present, {"settings": settings, "sizes": [sizes.slice_bytes, sizes.bucket_bytes]}):
        directory.write(_INPUTS, _json(inputs))  # so that a resumed build need not hash them again
        _write_tokenizer(tokenizer, directory)
        slices = plan_slices(files, layouts, sizes.slice_bytes)
        num_buckets = max(1, -(-total // sizes.bucket_bytes))
        limits = (2 * sizes.slice_bytes, max_document_bytes)
        encoding = Encoding(settings["seed"], settings["dtype"], num_buckets, tokenizer.fingerprint, *limits)
        with _mapper(mapper, total) as workers:
            versions = [(entry["version"], entry["fingerprint"]["sha256"]) for entry in inputs]
            stages = _Stages(directory, settings, versions, workers, progress)
            _write_manifest(directory, settings, *stages.run(slices, encoding))
    directory.remove(WORK)
    for name in filter(is_left_over, directory.sizes()):
        directory.remove(name)
    return TokenStore.open(directory.path)


@contextlib.contextmanager
def _mapper(mapper: Mapper | None, total_bytes: int) -> Iterator[Mapper]:
    if mapper is not None:
        yield mapper
        return
    with contextlib.closing(ProcessPool(min(available_cores(), 1 + total_bytes // _BYTES_FOR_A_WORKER))) as pool:
        yield pool


# The output directory -------------------------------------------------------------------------------------------------


def _usable(directory: Directory) -> dict[str, int]:
    """Sizes of the files of the directory. DataError if it has other contents than a store, complete or not."""
    present = directory.sizes()
    if MANIFEST in present or _BUILD in present or all(name.startswith(f"{WORK}/") for name in present):
        return present
    raise DataError(
        f"{directory.path} is not empty and is not a token store: choose another output directory, or empty it."
    )


def _describe_inputs(files: list[str], directory: Directory, present: dict[str, int], progress: Progress) -> list[dict]:
    """Fingerprint and layout of each file; those of an incomplete build are reused if size and time are unchanged."""
    known = {}
    if _INPUTS in present:
        with contextlib.suppress(ValueError):  # truncated by a power failure
            known = {entry["file"]: entry for entry in json.loads(directory.read(_INPUTS))}

    def describe(file: str) -> dict:
        version = Directory(os.path.dirname(file)).version(os.path.basename(file))
        entry = known.get(file)
        if entry is None or entry["version"] != version:
            entry = {"file": file, "version": version}
            entry |= {"fingerprint": fingerprint_file(file), "layout": file_layout(file)}
        progress.advance(1)
        return entry

    progress.start("Reading the inputs", len(files), "files")
    with ThreadPoolExecutor(available_cores()) as pool:  # hashing releases the GIL
        described = list(pool.map(describe, files))
    progress.finish()
    return described


def _claim(directory: Directory, present: dict[str, int], build: dict) -> bool:
    """Whether the store is incomplete. DataError if the directory has another build."""
    if MANIFEST in present:
        manifest = parse_manifest(directory.read(MANIFEST), directory / MANIFEST)
        _refuse_other(directory, manifest["settings"], build["settings"])
        return False
    if _BUILD in present:
        started = json.loads(directory.read(_BUILD))
        _refuse_other(directory, started["settings"], build["settings"])
        if started != build:  # other sizes of slices or buckets
            for name in {name.split("/", 1)[0] for name in present}:
                directory.remove(name)
    directory.write(_BUILD, _json(build))
    return True


def _refuse_other(directory: Directory, existing: dict, requested: dict) -> None:
    if existing == requested:
        return
    words = {
        "format_version": f"format version {existing.get('format_version')}",
        "inputs": "other documents",
        "tokenizer_fingerprint": "another tokenizer",
        "seed": f"seed {existing.get('seed')}",
        "shard_tokens": f"shard_tokens {existing.get('shard_tokens')}",
    }
    differs = [text for key, text in words.items() if existing.get(key) != requested[key]] or ["other settings"]
    raise DataError(
        f"{directory.path} contains the token store of another build (with {' and '.join(differs)}): choose another "
        "output directory, or delete that one."
    )


# The stages -----------------------------------------------------------------------------------------------------------


class _Stages:
    """The tasks of one build in `directory`. File names depend on the slices and buckets only."""

    def __init__(
        self,
        directory: Directory,
        settings: dict,
        versions: Sequence[tuple[list, str]],
        workers: Mapper,
        progress: Progress,
    ):
        """versions: of each input, its size and time, and its SHA-256."""
        self._directory, self._settings, self._versions = directory, settings, versions
        self._workers, self._progress = workers, progress

    def run(self, slices: Sequence[Slice], encoding: Encoding) -> tuple[dict, dict]:
        """Runs all stages; returns the counts and the files of the store, for the manifest."""
        runs, summaries = self._encode(slices, encoding)
        counts = {f"num_{key}": sum(summary[key] for summary in summaries) for key in ("tokens", "documents")}
        counts["text_bytes"] = sum(summary["text_bytes"] for summary in summaries)
        files = format_names([entry["name"] for entry in self._settings["inputs"]])
        if not counts["num_documents"]:
            raise DataError(f"There are no documents in {files}: give files with documents.")
        if counts["num_tokens"] == counts["num_documents"]:  # end tokens only
            raise DataError(f"All {counts['num_documents']:,} documents in {files} are empty: give some with text.")
        if not any(summary.get("named", True) for summary in summaries):
            logger.warning(f"The documents in {files} have no repo_name and no path: `data trace` cannot name them.")
        paths, buckets = self._sort(runs, summaries, encoding.num_buckets)
        return counts, self._write(paths, buckets, counts["num_tokens"])

    def _encode(self, slices: Sequence[Slice], encoding: Encoding) -> tuple[list[str], list[dict]]:
        tokenizer = self._directory / "tokenizer/tokenizer.json"
        tasks = [
            self._task(
                functools.partial(
                    build_tasks.encode_slice, part=part, encoding=encoding, version=self._versions[part.file_number]
                ),
                (tokenizer, part.file), f"{WORK}/runs/{number:06d}", part.size,
            )
            for number, part in enumerate(slices)
        ]  # fmt: skip
        summaries = self._stage(tasks, "Encoding documents", "bytes", _encoded)
        return [task.output for task in tasks], summaries

    def _sort(self, runs: list[str], summaries: list[dict], num_buckets: int) -> tuple[list[str], list[Bucket]]:
        extents = [(summary["index_at"], summary["bytes"]) for summary in summaries]
        indices = [build_tasks.read_index(run, *extent) for run, extent in zip(runs, extents, strict=True)]
        entries = np.concatenate(indices)
        of_run = np.repeat(np.arange(len(runs)), [len(index) for index in indices])
        order = np.argsort(entries["bucket"], kind="stable")
        ends = np.searchsorted(entries["bucket"][order], np.arange(num_buckets + 1))
        tasks = []
        for number in range(num_buckets):
            own = order[ends[number] : ends[number + 1]]
            fn = functools.partial(build_tasks.sort_bucket, entries=entries[own], dtype=self._settings["dtype"])
            inputs = tuple(runs[run] for run in of_run[own])
            size = int(entries["tokens"][own].sum())
            tasks.append(self._task(fn, inputs, f"{WORK}/buckets/{number:06d}", size))
        sorted_ = self._stage(tasks, "Shuffling documents", "tokens")
        buckets, first = [], 0
        for summary in sorted_:
            buckets.append(Bucket(first, **summary))
            first += summary["tokens"]
        return [task.output for task in tasks], buckets

    def _write(self, paths: list[str], buckets: list[Bucket], num_tokens: int) -> dict[str, dict]:
        dtype, shard_tokens = self._settings["dtype"], self._settings["shard_tokens"]
        array = {"num_tokens": num_tokens, "dtype": dtype, "shard_tokens": shard_tokens}
        self._directory.write("tokens/zarr.json", build_tasks.array_metadata(**array))
        table = functools.partial(build_tasks.write_table, buckets=buckets, dtype=dtype)
        tasks = {"documents.parquet": self._task(table, tuple(paths), "documents.parquet", 0)}
        firsts = np.array([bucket.first for bucket in buckets])
        for number in range(-(-num_tokens // shard_tokens)):
            start, stop = number * shard_tokens, min((number + 1) * shard_tokens, num_tokens)
            overlap = slice(np.searchsorted(firsts, start, side="right") - 1, np.searchsorted(firsts, stop))
            fn = functools.partial(build_tasks.write_shard, buckets=buckets[overlap], number=number, **array)
            name = f"tokens/c/{number}"
            tasks[name] = self._task(fn, tuple(paths[overlap]), name, stop - start)
        summaries = self._stage(list(tasks.values()), "Writing the token store", "tokens")
        return {
            name: {"bytes": summary["bytes"], "sha256": summary["sha256"]}
            for name, summary in zip(tasks, summaries, strict=True)
        }

    def _task(self, fn: Callable, inputs: tuple[str, ...], output: str, size: float) -> Task:
        marker = f"{WORK}/done/{output.removeprefix(f'{WORK}/')}"
        return Task(fn, inputs, self._directory / output, self._directory / marker, size)

    def _stage(self, tasks: list[Task], what: str, unit: str, summarize: Callable = lambda _: "") -> list[dict]:
        with access_errors(self._directory.path, "write"):
            return run_stage(tasks, self._workers, what=what, unit=unit, progress=self._progress, summarize=summarize)


def _encoded(summaries: list[dict]) -> str:
    keys = ("documents", "tokens", "text_bytes")
    documents, tokens, size = (sum(summary[key] for summary in summaries) for key in keys)
    if not documents:
        return "no documents"
    each = f"{size / tokens:.2f} bytes each"
    return f"{documents:,} documents of {size:,} bytes, {tokens:,} tokens ({each}), by {summaries[0]['encoder']}"


# The small files -----------------------------------------------------------------------------------------------------


def _write_tokenizer(tokenizer: Tokenizer, directory: Directory) -> None:
    """Writes the tokenizer's files and the table of bytes per id."""
    token_bytes = np.zeros(tokenizer.vocab_size, np.int32)
    for token in np.flatnonzero(tokenizer.valid_ids(tokenizer.vocab_size)).tolist():
        if not tokenizer.is_special(token):
            token_bytes[token] = len(tokenizer.decode_bytes([token]))
    sink = io.BytesIO()
    np.save(sink, token_bytes)
    directory.write("token_bytes.npy", sink.getvalue())
    tokenizer.save(directory / "tokenizer")


def _write_manifest(directory: Directory, settings: dict, counts: dict, shards: dict[str, dict]) -> None:
    """Writes the manifest. `shards` were hashed by their tasks; the small files are hashed here."""
    small = [name for name in directory.sizes() if name.startswith("tokenizer/") and not is_left_over(name)]
    files = dict(shards)
    for name in ("tokens/zarr.json", "token_bytes.npy", *small):
        entry = fingerprint_file(directory / name)
        files[name] = {"bytes": entry["bytes"], "sha256": entry["sha256"]}
    directory.write(MANIFEST, manifests.seal({"settings": settings, **counts, "files": dict(sorted(files.items()))}))


def _json(content: dict | list) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
