"""Gathers a corpus: trees of raw code -> `train.parquet`, `held_out.parquet` and a manifest.

StarCoder's basic filters, exact deduplication, and a held-out set of complete packages. The result depends on the files
and the arguments only. Texts are read twice (to filter, then to write), so that memory holds names and digests only.
Files are written atomically and the manifest last: an output directory with a manifest is complete, others are redone.

Columns: content, repo_name ("<source>/<package>"), path (inside the source), lang.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jaxcoder.corpus.extensions import classify, resolve_languages
from jaxcoder.corpus.filters import why_dropped
from jaxcoder.corpus.sources import (
    Source,
    SourceFile,
    directory_sources,
    interpreter_sources,
    read_source,
    walk,
)
from jaxcoder.corpus.split import KeptFile, choose_held_out, keyed_hash, packages_of, without_copies
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.formatting import format_bytes
from jaxcoder.io import manifests
from jaxcoder.io.atomic import write_bytes
from jaxcoder.io.checksums import fingerprint_file
from jaxcoder.io.document import Document, well_formed
from jaxcoder.io.document_files import write_documents
from jaxcoder.io.os_errors import access_errors
from jaxcoder.protocols import SILENT, Progress

TRAIN_FILE = "train.parquet"
HELD_OUT_FILE = "held_out.parquet"
MANIFEST_FILE = "manifest.json"
_SCHEMA = {"format": str, "request": dict, "summary": dict, "sha256": dict}
FORMAT = "jaxcoder corpus 1"


@dataclass
class CorpusSummary:
    """What was found, kept and dropped. Bytes are of UTF-8 text."""

    output_dir: Path
    files_found: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of files. Every file found was dropped or kept."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of directories and links that were not entered."""
    train_documents: int = 0
    train_bytes: int = 0
    held_out_documents: int = 0
    held_out_bytes: int = 0
    held_out_packages: list[str] = field(default_factory=list)
    reused: bool = False
    """The same corpus was there already, complete, and nothing was done."""

    def lines(self) -> list[str]:
        """The summary for a terminal."""
        kept = self.train_documents + self.held_out_documents
        table = [(count, reason) for reason, count in self.dropped.items()]
        return [
            f"{self.files_found:,} files found, {kept:,} kept" + (" (gathered before)" if self.reused else ""),
            *(
                f"  {count:>9,}  dropped: {reason}"
                for count, reason in sorted(table, key=lambda row: (-row[0], row[1]))
            ),
            *(f"  {count:>9,}  not entered: {reason}" for reason, count in sorted(self.skipped.items())),
            f"train     {self.train_documents:>9,} documents {format_bytes(self.train_bytes):>10}  "
            f"{self.output_dir / TRAIN_FILE}",
            f"held out  {self.held_out_documents:>9,} documents {format_bytes(self.held_out_bytes):>10}  "
            f"{self.output_dir / HELD_OUT_FILE} ({len(self.held_out_packages):,} packages)",
        ]


def gather(
    sources: Sequence[str | Path] | None,
    output_dir: str | Path,
    *,
    languages: Sequence[str] = ("python",),
    held_out_fraction: float = 0.05,
    max_bytes: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> CorpusSummary:
    """Gather the code under `sources` (None: the running interpreter's library and packages) into `output_dir`.

    max_bytes: stop when about so much text is kept; files are then taken in an order that depends on seed and path.
    A corpus that these arguments made before is left as it is. Raises ConfigError for impossible arguments, DataError
    for sources without usable code, an output directory that holds something else, and a failing disk.
    """
    if not 0 <= held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction is {held_out_fraction}, but it must be at least 0 and below 1.")
    if max_bytes is not None and max_bytes <= 0:
        raise ConfigError(f"max_bytes is {max_bytes}, but it must be positive (or None for no limit).")
    languages = resolve_languages(languages)
    trees = interpreter_sources() if sources is None else directory_sources(sources)
    if not trees:
        raise DataError("No source is given: name at least one directory of code.")
    request = {
        "sources": [well_formed(str(tree.root)) for tree in trees],
        "languages": list(languages),
        "held_out_fraction": held_out_fraction,
        "max_bytes": max_bytes,
        "seed": seed,
    }
    output_dir = Path(output_dir)
    summary = _finished(output_dir, request)
    if summary:
        return summary
    summary = CorpusSummary(output_dir)
    kept = _judge(trees, languages, max_bytes, seed, summary, progress)
    held_out = choose_held_out(kept, held_out_fraction, seed)
    if held_out_fraction and not held_out:
        raise DataError(
            f"The code kept from {_names(trees)} is one package, or packages that share files, so none can be held "
            "out: add another source, or ask for a held-out fraction of 0."
        )
    unique = without_copies(kept, held_out)
    if len(unique) < len(kept):
        summary.dropped["exact copy of another file"] = len(kept) - len(unique)
    _write(output_dir, unique, held_out, request, summary, progress)
    return summary


def _judge(
    trees: Sequence[Source],
    languages: Sequence[str],
    max_bytes: int | None,
    seed: int,
    summary: CorpusSummary,
    progress: Progress,
) -> list[KeptFile]:
    """Read and filter the sources' files; all that pass, exact copies included."""
    skipped: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    found = [file for tree in trees for file in walk(tree, skipped)]
    summary.files_found = len(found)
    order = sorted(found, key=lambda file: keyed_hash(seed, f"{file.source.label}/{file.path}"))
    progress.start("Reading source files", len(found), "files")
    passed: list[tuple[SourceFile, str, bytes, int]] = []
    seen: set[bytes] = set()
    room = float("inf") if max_bytes is None else max_bytes
    for file in order:
        progress.advance(1)
        language, text, reason = _judge_file(file, languages) if room > 0 else ("", "", "beyond max_bytes")
        if reason:
            dropped[reason] += 1
            continue
        content = text.encode()
        digest = hashlib.sha256(content).digest()
        passed.append((file, language, digest, len(content)))
        if digest not in seen:
            seen.add(digest)
            room -= len(content)
    summary.dropped, summary.skipped = dict(dropped), dict(skipped)
    progress.finish(f"Kept {len(passed):,} of {len(found):,} files")
    if not passed:
        raise _nothing_kept(trees, languages, summary)
    return _with_packages(trees, passed)


def _judge_file(file: SourceFile, languages: Sequence[str]) -> tuple[str, str, str | None]:
    """(language, text, reason to drop it or None)."""
    classified = classify(file.path.rpartition("/")[2], languages)
    if classified is None:
        return "", "", f"not a source file of {', '.join(languages) if len(languages) < 4 else 'these languages'}"
    language, rule = classified
    if rule is None:
        return language, "", "an extension that StarCoder left out"
    text, reason = read_source(file.file)
    return language, text, reason or why_dropped(text, language, rule)


def _with_packages(trees: Sequence[Source], passed: list[tuple[SourceFile, str, bytes, int]]) -> list[KeptFile]:
    packages = {}
    for tree in trees:
        sizes = {file.path: size for file, _, _, size in passed if file.source is tree}
        packages[tree.label] = packages_of(sizes, is_package_root=tree.is_package_root)
    return [
        KeptFile(
            file.file,
            repo_name=f"{file.source.label}/{packages[file.source.label][file.path]}",
            path=file.path,
            lang=language,
            digest=digest,
            size=size,
        )
        for file, language, digest, size in passed
    ]


def _nothing_kept(trees: Sequence[Source], languages: Sequence[str], summary: CorpusSummary) -> DataError:
    counts = {**summary.dropped, **summary.skipped}
    if not counts:
        return DataError(f"The source {_names(trees)} holds no files: give a directory with code in it.")
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in ordered)
    wanted = ", ".join(languages) if len(languages) < 4 else f"{len(languages)} languages"
    return DataError(
        f"No file under {_names(trees)} can be used ({reasons}): give a directory with {wanted} source files, or name "
        "other languages."
    )


def _names(trees: Sequence[Source]) -> str:
    return ", ".join(str(tree.root) for tree in trees)


def _write(
    output_dir: Path,
    files: Sequence[KeptFile],
    held_out: frozenset[str],
    request: dict,
    summary: CorpusSummary,
    progress: Progress,
) -> None:
    """Write both parquet files, then the manifest that makes them valid; fill in the rest of `summary`."""
    sides = {
        TRAIN_FILE: [file for file in files if file.repo_name not in held_out],
        HELD_OUT_FILE: [file for file in files if file.repo_name in held_out],
    }
    progress.start("Writing documents", len(files), "files")
    for name, side in sides.items():
        write_documents(_documents(side, progress), output_dir / name, plain=True)
    summary.train_documents, summary.held_out_documents = map(len, sides.values())
    summary.train_bytes, summary.held_out_bytes = (sum(file.size for file in side) for side in sides.values())
    summary.held_out_packages = sorted(well_formed(name) for name in {file.repo_name for file in sides[HELD_OUT_FILE]})
    manifest = {
        "format": FORMAT,
        "request": request,
        "summary": {name: value for name, value in asdict(summary).items() if name not in ("output_dir", "reused")},
        "sha256": {name: fingerprint_file(output_dir / name)["sha256"] for name in sides},
    }
    write_bytes(output_dir / MANIFEST_FILE, manifests.seal(manifest))
    progress.finish(f"Wrote {len(files):,} documents to {output_dir}")


def _documents(files: Iterable[KeptFile], progress: Progress) -> Iterator[Document]:
    for file in files:
        text, reason = read_source(file.file)
        if reason or hashlib.sha256(text.encode()).digest() != file.digest:
            raise DataError(f"The file {file.file} changed while it was gathered: run the command again.")
        progress.advance(1)
        yield Document.from_text(text, repo_name=file.repo_name, path=file.path, lang=file.lang)


def _finished(output_dir: Path, request: dict) -> CorpusSummary | None:
    """The summary of the same corpus if it is complete; None if the directory may be written. DataError otherwise."""
    if not output_dir.exists():
        return None
    own_files = {TRAIN_FILE, HELD_OUT_FILE, MANIFEST_FILE}
    with access_errors(output_dir, "write"):
        names = {entry.name for entry in output_dir.iterdir()}
        for name in names:
            if any(name.startswith(f".{file}.tmp") for file in own_files):  # of a run that was killed
                (output_dir / name).unlink(missing_ok=True)
    strange = sorted(name for name in names - own_files if not name.startswith("."))
    if strange:
        raise DataError(
            f"The output directory {output_dir} contains other files ({strange[0]}): choose another or a new one."
        )
    try:
        content = (output_dir / MANIFEST_FILE).read_bytes()
        if json.loads(content)["format"] != FORMAT:
            raise DataError(f"The corpus in {output_dir} is of another format: choose another output directory.")
        manifest = manifests.unseal(content, str(output_dir / MANIFEST_FILE), schema=_SCHEMA, advice="delete it")
        summary = CorpusSummary(output_dir, reused=True, **manifest["summary"])
        is_complete = all(
            fingerprint_file(output_dir / name)["sha256"] == digest for name, digest in manifest["sha256"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if manifest["request"] != request:
        before = manifest["request"]
        changed = [
            f"{key} {before.get(key)!r}, not {request[key]!r}" for key in request if before.get(key) != request[key]
        ]
        raise DataError(
            f"The corpus in {output_dir} was gathered with other arguments ({'; '.join(changed)}): choose another "
            "output directory, or delete that one."
        )
    return summary if is_complete else None
