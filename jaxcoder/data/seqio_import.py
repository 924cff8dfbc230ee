"""Builds a token store from a seqio Mixture or Task: `jaxcoder data import-seqio`.

The examples are read in order and written as files of documents of about 16 million characters next to the store
(`STORE.import/`); the store is built from these files, which are then removed. Features are joined in the given order.
Text is encoded when the store is built. Ids are kept if their vocabulary is this tokenizer; their end tokens separate
documents, as in the store.

A killed import resumes: finished files are kept; their examples are read again, because tf.data cannot skip them, and
compared by a hash, which detects a Task that is not deterministic.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxcoder.data.build import build_store
from jaxcoder.data.directory import Directory
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.io.atomic import write_text
from jaxcoder.io.document import Document, Part, well_formed
from jaxcoder.io.document_files import write_documents
from jaxcoder.io.os_errors import access_errors
from jaxcoder.protocols import SILENT, Progress
from jaxcoder.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxcoder.data.seqio_tasks import Example, Examples

RECORD = "import.json"  # what the import was, in the directory of parts first and in the store at the end
_COMPLETE = "complete.json"
_PART_CHARACTERS = 16 << 20  # ids take ten times as much memory until their part is written


def import_seqio(
    name: str,
    output_dir: str | os.PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    modules: Sequence[str] = (),
    features: Sequence[str] | None = None,
    split: str = "train",
    separator: str = "",
    num_examples: int | None = None,
    seed: int = 1234,
    work_dir: str | os.PathLike | None = None,
    progress: Progress = SILENT,
    part_characters: int = _PART_CHARACTERS,
) -> TokenStore:
    """Builds the token store of a registered Mixture or Task in `output_dir` and opens it.

    modules: imported first, to register it. features: joined in this order with `separator` (default: inputs and
    targets, if they exist). num_examples: number of examples at the Mixture's rates; None: every Task once, completely.
    tokenizer: required for text; ids have their own. work_dir: temporary files (default: STORE.import).

    A finished import with the same arguments is returned immediately. Raises MissingExtraError without seqio; DataError
    if ids have another vocabulary, if the directory has other contents, or if something cannot be read or written.
    """
    if num_examples is not None and num_examples < 1:
        raise ConfigError(f"An import of {num_examples} examples is empty: give 1 or more, or leave it out for all.")
    output = Directory(output_dir)
    record = {
        "mixture": name,
        "modules": list(modules),
        "features": list(features) if features else None,
        "split": split,
        "separator": separator,
        "examples": num_examples,
        "seed": seed,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "part_characters": part_characters,
    }
    work = _work_directory(output, work_dir)
    if RECORD in output.sizes():
        _refuse_other(output.path, json.loads(output.read(RECORD)), record)
        if (work / _COMPLETE).exists():  # killed before the clean-up
            shutil.rmtree(work)
        return TokenStore.open(output.path)
    parts = _Parts(work, record)
    if output.sizes() and not parts.is_complete:
        raise DataError(f"{output.path} is not empty and is not such an import: choose another output directory.")
    if not parts.is_complete:
        from jaxcoder.data import seqio_tasks  # imports TensorFlow, which takes ten seconds

        seqio_tasks.require_seqio(f"Importing {name}")
        examples = seqio_tasks.Examples(
            name, modules=modules, features=features, split=split, num_examples=num_examples, seed=seed
        )
        tokenizer = _common_tokenizer(examples, tokenizer)
        parts.claim()
        _write_parts(examples, tokenizer, separator, parts, part_characters, progress)
        tokenizer.save(parts.directory / "tokenizer")
        parts.complete()
    tokenizer = Tokenizer.load(parts.directory / "tokenizer")
    build_store(parts.files(), tokenizer, output.path, seed=seed, progress=progress)
    output.write(RECORD, json.dumps(record, indent=2).encode() + b"\n")
    parts.remove()
    return TokenStore.open(output.path)


def _work_directory(output: Directory, work_dir: str | os.PathLike | None) -> Path:
    if work_dir is not None:
        return Path(work_dir)
    if not output.is_local:
        raise DataError(
            f"The import into {output.path} needs a local directory for its parts until the store is built: give "
            "--work-dir."
        )
    return Path(f"{os.path.abspath(output.path)}.import")


def _refuse_other(where: object, existing: dict, requested: dict) -> None:
    differs = [key for key in requested if existing.get(key) != requested[key]]
    if differs:
        words = ", ".join(f"{key} {existing.get(key)!r} instead of {requested[key]!r}" for key in differs)
        raise DataError(
            f"{where} contains another import ({words}): choose another output directory, or delete that one."
        )


def _common_tokenizer(examples: "Examples", tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of the store: the one given, or that of the ids. DataError if ids are of another vocabulary."""
    from jaxcoder.data.seqio_tasks import CodeVocabulary

    for (feature, task), vocabulary in examples.vocabularies.items():
        is_jaxcoder = isinstance(vocabulary, CodeVocabulary)
        if tokenizer is None and is_jaxcoder:
            tokenizer = vocabulary.tokenizer
        if not is_jaxcoder or tokenizer is None or vocabulary.tokenizer.fingerprint != tokenizer.fingerprint:
            wanted = f"fingerprint {tokenizer.fingerprint[:12]}" if tokenizer else "a jaxcoder tokenizer"
            raise DataError(
                f"The feature {feature!r} of the seqio Task {task} holds ids of another vocabulary ({vocabulary}) than "
                f"the store's ({wanted}): name a feature that is still text with --features, such as "
                f"{feature}_pretokenized."
            )
    if tokenizer is None:
        raise DataError(f"The features {', '.join(examples.features)} of {examples.name} are text: give --tokenizer.")
    return tokenizer


# Examples -> documents ------------------------------------------------------------------------------------------------


def documents_of(example: "Example", tokenizer: Tokenizer, separator: str, number: int) -> list[Document]:
    """The documents of one example: one, or as many as end tokens separate; none if it is empty."""
    documents_parts: list[list[Part]] = [[]]
    for k, value in enumerate(example.values):
        if k and separator:
            documents_parts[-1].append(Part(separator))
        if isinstance(value, bytes):
            documents_parts[-1].append(Part(well_formed(value.decode(errors="replace"))))
            continue
        last = value.size
        while last and value[last - 1] == tokenizer.eos_id:  # an end token behind a feature is no end of the example
            last -= 1
        for k, ids in enumerate(np.split(value[:last], np.flatnonzero(value[:last] == tokenizer.eos_id))):
            if k:
                documents_parts.append([])
                ids = ids[1:]
            documents_parts[-1] += _parts_of_ids(ids, tokenizer)
    origin = {"repo_name": example.task, "path": str(number), "lang": ""} | example.origin
    documents = [Document(tuple(parts), **origin) for parts in documents_parts]
    empty = ("", separator)
    return [d for d in documents if any(part.special or part.text not in empty for part in d.parts)]


def _parts_of_ids(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[Part]:
    """Special ids as special parts, the ids between them as text parts with ids."""
    is_special = np.isin(ids, list(tokenizer.special_ids))
    cuts = np.flatnonzero(is_special)
    for part in np.split(ids, np.unique([*cuts, *(cuts + 1)]) if cuts.size else []):
        if part.size == 1 and int(part[0]) in tokenizer.special_ids:
            yield Part(special=tokenizer.decode(part))
        elif part.size:
            yield Part(tokenizer.decode(part), ids=tuple(part.tolist()))


# The parts ------------------------------------------------------------------------------------------------------------


class _Parts:
    """The directory of parts: import.json, part-00000.parquet with part-00000.json behind it, ..., complete.json."""

    def __init__(self, directory: Path, record: dict):
        """DataError if the directory holds parts of another import, or anything else."""
        self.directory = directory
        self._record = record
        with access_errors(directory, "write"):
            present = {name for name in os.listdir(directory) if name[0] != "."} if directory.exists() else set()
        if RECORD in present and len(present) > 1:
            _refuse_other(directory, json.loads((directory / RECORD).read_text()), record)
        elif present - {RECORD}:
            raise DataError(f"{directory}, where the parts of the import go, holds something else: give --work-dir.")

    def claim(self) -> None:
        """Write down whose parts these will be."""
        write_text(self.directory / RECORD, json.dumps(self._record))

    @property
    def is_complete(self) -> bool:
        return (self.directory / _COMPLETE).exists()

    def complete(self) -> None:
        write_text(self.directory / _COMPLETE, "{}")

    def files(self) -> list[Path]:
        return sorted(self.directory.glob("part-*.parquet"))

    def finished(self, number: int) -> dict | None:
        """What is known of a part that is written: the examples read, and the hash of all up to its end."""
        file = self._name(number, "json")
        return json.loads(file.read_text()) if file.exists() else None

    def write(self, number: int, documents: list[Document], facts: dict) -> None:
        write_documents(documents, self._name(number, "parquet"), with_ids=True)
        write_text(self._name(number, "json"), json.dumps(facts))

    def remove(self) -> None:
        with access_errors(self.directory, "write"):
            shutil.rmtree(self.directory)

    def _name(self, number: int, suffix: str) -> Path:
        return self.directory / f"part-{number:05d}.{suffix}"


def _write_parts(
    examples: "Examples", tokenizer: Tokenizer, separator: str, parts: _Parts, part_characters: int, progress: Progress
) -> None:
    """Read all examples and write the parts that are not there yet. DataError if there is nothing in them, or if those
    of a finished part are not what they were."""
    progress.start(f"Reading {examples.name}", examples.num_examples, "examples")
    part, num_examples, num_documents, num_characters = 0, 0, 0, 0
    pending: list[Document] = []
    digest = hashlib.blake2b(digest_size=16)
    finished = parts.finished(part)

    def close_part() -> None:
        nonlocal part, pending, num_characters, finished
        facts = {"examples": num_examples, "hash": digest.hexdigest()}
        if finished and finished != facts:
            raise DataError(
                f"{examples.name} gives other examples than before its import was interrupted: make the Task "
                f"deterministic, delete {parts.directory}, and run again."
            )
        if not finished:
            parts.write(part, pending, facts)
        part, pending, num_characters = part + 1, [], 0
        finished = parts.finished(part)

    for example in examples:
        _add_to_hash(digest, example)
        documents = documents_of(example, tokenizer, separator, num_examples)
        num_examples += 1
        num_documents += len(documents)
        num_characters += sum(len(document.text) + len(document.parts) for document in documents)
        pending += documents
        if num_characters >= part_characters:
            close_part()
        progress.advance(1, example.task)
    if pending or finished:
        close_part()
    if not num_documents:
        raise DataError(f"The split {examples.split!r} of {examples.name} holds no text: there is nothing to import.")
    progress.finish(f"{num_examples:,} examples, {num_documents:,} documents")


def _add_to_hash(digest, example: "Example") -> None:
    for value in (example.task, *example.origin.values(), *example.values):
        content = value.encode() if isinstance(value, str) else bytes(value)
        digest.update(len(content).to_bytes(8))
        digest.update(content)
