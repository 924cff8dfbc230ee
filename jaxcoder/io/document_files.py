"""Documents in files: parquet, JSON lines, or a directory of both; local, gs:// or s3:// (through fsspec).

A row has `parts: list<struct<special: string, text: string>>`, or plain `content: string` for one text part, and
`repo_name`, `path`, `lang` where known, also under The Stack's names. A text part may have `ids: list<int32>`.
"""

import itertools
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxcoder.errors import DataError
from jaxcoder.formatting import plural
from jaxcoder.io.addresses import open_address
from jaxcoder.io.atomic import replacing
from jaxcoder.io.document import Document, Part, well_formed
from jaxcoder.io.os_errors import access_errors

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
ORIGIN_FIELDS = ("repo_name", "path", "lang")
_ALIASES = {"max_stars_repo_name": "repo_name", "max_stars_repo_path": "path"}
"""Columns of The Stack -> fields."""
_ROWS_PER_GROUP = 1000

Paths = str | os.PathLike | Sequence[str | os.PathLike]


def read_documents(paths: Paths) -> Iterator[Document]:
    """Documents of one path or several, in order; the files of a directory (recursively) are sorted by name.

    Raises DataError, naming the file and the row or line, for unreadable input.
    """
    for file in document_files(paths):
        rows = _parquet_rows(file) if file.endswith(".parquet") else _json_rows(file)
        for where, row in rows:
            yield document_of_row(row, f"{file}, {where}")


def document_files(paths: Paths) -> list[str]:
    """The files that `read_documents` reads, each once. DataError for a path that is missing or has no documents."""
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    files: dict[str, str] = {}
    for path in paths:
        for file in _files_of(os.fspath(path)):
            identity = file if "://" in file else os.path.realpath(file)
            if identity in files:
                logger.warning(f"{file} is the same file as {files[identity]} and is read once.")
            files.setdefault(identity, file)
    return list(files.values())


def write_documents(
    documents: Iterable[Document], path: str | os.PathLike, *, plain: bool = False, with_ids: bool = False
) -> int:
    """Write documents to one local `.parquet` or `.jsonl` file, atomically and deterministically; returns their number.

    plain: write the column `content`, for documents without special parts, instead of `parts`.
    with_ids: write the ids of parts.

    Raises DataError for another suffix, a special part in a plain file, ids that would be lost, or a failed write.
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".jsonl"):
        raise DataError(f"Cannot write documents to {path}: name a file that ends in .parquet or .jsonl.")
    write = _write_parquet if path.suffix == ".parquet" else _write_jsonl
    with replacing(path) as temporary:
        return write((_row(document, plain, with_ids, path) for document in documents), temporary, plain, with_ids)


def _files_of(path: str) -> list[str]:
    fs, root = open_address(path)
    with access_errors(path):
        if not fs.exists(root):
            raise DataError(f"There are no documents at {path}: it does not exist; check the spelling.")
        if not fs.isdir(root):
            files = [root]
        else:
            found = sorted(file for file in fs.find(root) if file.endswith(SUFFIXES))
            files = [file for file in found if "/." not in file[len(root.rstrip("/")) :]]
            if len(files) < len(found):
                logger.warning(f"{path} has {plural(len(found) - len(files), 'hidden file')}, not read.")
    if not files:
        raise DataError(f"The directory {path} has no documents: give one with {', '.join(SUFFIXES)} files.")
    if not files[0].endswith(SUFFIXES):
        raise DataError(f"{path} is not a file of documents: it must end in one of {', '.join(SUFFIXES)}.")
    held_out = [file for file in files if os.path.basename(file).startswith("held_out.")]
    if held_out and len(files) > len(held_out):
        raise DataError(
            f"The directory {path} has {os.path.basename(held_out[0])} next to other documents, and reading both would "
            "mix held-out documents with the rest: name the files to read, such as its train.parquet."
        )
    return [fs.unstrip_protocol(file) if "://" in path else file for file in files]


def _parquet_rows(file: str) -> Iterator[tuple[str, dict]]:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fsspec.open(file, "rb") as stream:
            table = pq.ParquetFile(stream)
            columns = document_columns(table.schema_arrow.names, file)
            batches = table.iter_batches(batch_size=_ROWS_PER_GROUP, columns=columns, use_threads=False)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"row {number}", row) for number, row in enumerate(rows))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a readable parquet file ({error}): write it again.") from error


def document_columns(names: Sequence[str], file: str) -> list[str]:
    """The columns of a parquet file that documents use. DataError, naming `file`, if it has no text."""
    body = next((name for name in ("parts", "content") if name in names), None)
    if body is None:
        raise DataError(
            f"{file} has no column `parts` or `content` (its columns are {', '.join(names)}): rename the one "
            "with the text to `content`."
        )
    aliases = [alias for alias, field in _ALIASES.items() if alias in names and field not in names]
    return [body, *(field for field in ORIGIN_FIELDS if field in names), *aliases]


def _json_rows(file: str) -> Iterator[tuple[str, dict]]:
    import fsspec

    try:
        with fsspec.open(file, "rb", compression="infer") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{file}, line {number} is not JSON ({error}): fix or delete that line.") from None
                yield f"line {number}", row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}): write it again.") from error


def document_of_row(row: object, where: str) -> Document:
    """A row of a file as a document; `where` names the row in errors. DataError if it is not a document."""
    if not isinstance(row, dict) or ("parts" not in row and "content" not in row):
        raise DataError(f"{where} has no `parts` or `content`: each row must have one of them.")
    known = {field: row.get(alias) for alias, field in _ALIASES.items()}
    origin = {field: row.get(field) or known.get(field) or "" for field in ORIGIN_FIELDS}
    if not all(isinstance(value, str) for value in origin.values()):
        raise DataError(f"{where}: {', '.join(ORIGIN_FIELDS)} must be strings or absent.")
    if "parts" not in row:
        if not isinstance(row["content"], str):
            raise DataError(f"{where}: `content` must be a string, not {type(row['content']).__name__}.")
        return Document.from_text(well_formed(row["content"]), **origin)
    parts = row["parts"]
    if not isinstance(parts, list) or not all(_is_part(part) for part in parts):
        raise DataError(f"{where}: `parts` must be a list of objects with a string as `special` or as `text`.")
    return Document(tuple(map(_part, parts)), **origin)


def _part(part: dict) -> Part:
    ids = part.get("ids")
    return Part(well_formed(part.get("text") or ""), part.get("special"), ids if ids is None else tuple(ids))


def _is_part(part: object) -> bool:
    if not isinstance(part, dict):
        return False
    special, text, ids = part.get("special"), part.get("text"), part.get("ids")
    if ids is not None and not (isinstance(text, str) and isinstance(ids, list) and all(type(i) is int for i in ids)):
        return False
    return (isinstance(special, str) and not text) or (special is None and isinstance(text, str))


def _row(document: Document, plain: bool, with_ids: bool, path: Path) -> dict:
    origin = {field: well_formed(getattr(document, field)) for field in ORIGIN_FIELDS}
    if not with_ids and any(part.ids is not None for part in document.parts):
        raise DataError(f"Cannot write {document.path or 'a document'} with its ids to {path}: write it with_ids.")
    if not plain:
        parts: list[dict[str, object]] = [
            {"special": part.special, "text": well_formed(part.text)} for part in document.parts
        ]
        if with_ids:
            parts = [row | {"ids": part.ids} for row, part in zip(parts, document.parts, strict=True)]
        return {"parts": parts, **origin}
    if any(part.special is not None for part in document.parts):
        raise DataError(
            f"Cannot write {document.path or 'a document'} with its special tokens to the plain file {path}: write it "
            "with parts."
        )
    return {"content": well_formed(document.text), **origin}


def _write_parquet(rows: Iterator[dict], path: Path, plain: bool, with_ids: bool) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = [("ids", pa.list_(pa.int32()))] if with_ids else []
    part = pa.struct([("special", pa.string()), ("text", pa.string()), *ids])
    body = ("content", pa.large_string()) if plain else ("parts", pa.list_(part))
    schema = pa.schema([body, *((field, pa.string()) for field in ORIGIN_FIELDS)])
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, _ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count


def _write_jsonl(rows: Iterator[dict], path: Path, plain: bool, with_ids: bool) -> int:
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
