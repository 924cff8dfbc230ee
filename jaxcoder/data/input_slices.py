"""Splits the documents of a build into slices that are read independently.

A slice is a range of row groups of a parquet file, or a range of bytes of a JSON lines file (the lines that start in
it); a compressed JSON lines file is one slice. A document's number is made of the index of its file and its position in
the file: its row, or the byte offset of its line.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxcoder.errors import DataError
from jaxcoder.io.addresses import open_address
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import document_columns, document_of_row
from jaxcoder.io.os_errors import access_errors

POSITION_BITS = 42  # documents are numbered in [0, 2**62): 2**20 files of 2**42 rows or bytes
_MOST_FILES = 1 << 20
_BATCH_BYTES = 8 << 20  # of a parquet file, converted to Python objects at once
_GZIP_RATIO = 5  # of source code; it affects the size of slices only
_ARROW_BYTES = 4096  # upper bound of a row's bytes that are not text; the text itself is counted later
_ESCAPES = 6  # maximum bytes of JSON per byte of text (\u0000)


@dataclass(frozen=True)
class Slice:
    """Row groups or bytes [start, stop) of a file. first: number of its first row. size: approximate bytes of text."""

    file: str
    file_number: int
    start: int
    stop: int
    first: int
    size: int


def file_layout(path: str) -> dict:
    """The layout of a file, for its slices: approximate bytes of text, `size`; for parquet also `groups`: [[rows,
    bytes]]."""
    fs, root = open_address(path)
    if not path.endswith(".parquet"):
        with access_errors(path):
            return {"size": fs.size(root) * (_GZIP_RATIO if path.endswith(".gz") else 1)}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with access_errors(path), fs.open(root, "rb") as stream:
            metadata = pq.ParquetFile(stream).metadata
    except pa.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file ({error}): write it again.") from error
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return {
        "size": sum(group.total_byte_size for group in groups),
        "groups": [[group.num_rows, group.total_byte_size] for group in groups],
    }


def plan_slices(files: Sequence[str], layouts: Sequence[dict], slice_bytes: int) -> list[Slice]:
    """Splits all files into slices of about `slice_bytes` of text. DataError for more files than can be numbered."""
    if len(files) > _MOST_FILES:
        raise DataError(f"{len(files)} files of documents are more than {_MOST_FILES}: join them into larger ones.")
    slices: list[Slice] = []
    for number, (file, layout) in enumerate(zip(files, layouts, strict=True)):
        if file.endswith(".parquet"):
            slices += _slices_of_groups(file, number, layout["groups"], slice_bytes)
        elif file.endswith(".gz"):
            slices.append(Slice(file, number, 0, 1 << POSITION_BITS, 0, layout["size"]))
        else:
            starts = range(0, layout["size"], slice_bytes)
            stops = (min(start + slice_bytes, layout["size"]) for start in starts)
            slices += [Slice(file, number, a, b, a, b - a) for a, b in zip(starts, stops, strict=True)]
    return slices


def _slices_of_groups(file: str, number: int, groups: list[list[int]], slice_bytes: int) -> Iterator[Slice]:
    start = first = rows = size = 0
    for index, (group_rows, group_bytes) in enumerate(groups):
        rows += group_rows
        size += group_bytes
        if size >= slice_bytes or index == len(groups) - 1:
            yield Slice(file, number, start, index + 1, first, size)
            start, first, rows, size = index + 1, first + rows, 0, 0


def read_slice(part: Slice, max_document_bytes: int) -> Iterator[tuple[int, int, Document]]:
    """(number, bytes of text, document) of every document of the slice, in order.

    Raises DataError, which names the file and the row or line, for unreadable documents and for those above the limit.
    """
    rows = _parquet_rows if part.file.endswith(".parquet") else _json_rows
    for position, where, row in rows(part, max_document_bytes):
        document = document_of_row(row, f"{part.file}, {where}")
        size = sum(len(part_.text.encode()) for part_ in document.parts)
        check_size(size, max_document_bytes, part, where)
        yield part.file_number << POSITION_BITS | position, size, document


def check_size(size: int, most: int, part: Slice, where: str) -> None:
    if size > most:
        raise DataError(
            f"{part.file}, {where} is a document of {size:,} bytes, but the limit is {most:,}, which bounds the memory "
            "of the workers: split the document, leave it out, or raise --max-document-bytes (a worker needs about 50 "
            "times as much)."
        )


def _parquet_rows(part: Slice, most: int) -> Iterator[tuple[int, str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, root = open_address(part.file)
    try:
        with access_errors(part.file), fs.open(root, "rb") as stream:
            table = pq.ParquetFile(stream)
            columns = document_columns(table.schema_arrow.names, part.file)
            groups = range(part.start, part.stop)
            num_rows = sum(table.metadata.row_group(group).num_rows for group in groups)
            batch_size = max(1, min(1000, _BATCH_BYTES * num_rows // max(1, part.size)))
            row = part.first
            for batch in table.iter_batches(batch_size, row_groups=groups, columns=columns, use_threads=False):
                if batch.nbytes > most:
                    for index in range(batch.num_rows):  # before the conversion to Python objects
                        size = batch.column(0).slice(index, 1).nbytes
                        if size > most + _ARROW_BYTES:
                            check_size(size, most, part, f"row {row + index}")
                for values in batch.to_pylist():
                    yield row, f"row {row}", values
                    row += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{part.file} is not a readable parquet file ({error}): write it again.") from error


def _json_rows(part: Slice, most: int) -> Iterator[tuple[int, str, dict]]:
    fs, root = open_address(part.file)
    longest = _ESCAPES * most + (1 << 16)
    try:
        with access_errors(part.file), fs.open(root, "rb", compression="infer") as stream:
            position = part.start
            if position:
                stream.seek(position - 1)
                position += _skip_line(stream) - 1
            while position < part.stop and (line := stream.readline(longest + 1)):
                where = f"line at byte {position}"
                if len(line) > longest:
                    check_size(len(line), most, part, f"{where} (of JSON)")
                if line.strip():
                    yield position, where, _parsed(line, part, position)
                position += len(line)
    except (EOFError, zlib.error) as error:
        raise DataError(f"{part.file} cannot be read ({error}): write it again.") from error


def _skip_line(stream) -> int:
    """Reads up to the end of the line; returns the number of bytes."""
    size = 0
    while block := stream.readline(1 << 20):
        size += len(block)
        if block.endswith(b"\n"):
            break
    return size


def _parsed(line: bytes, part: Slice, position: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        number = _line_number(part.file, position)
        raise DataError(f"{part.file}, line {number} is not JSON ({error}): fix or delete that line.") from None


def _line_number(file: str, position: int) -> int:
    fs, root = open_address(file)
    count = 1
    with access_errors(file), fs.open(root, "rb", compression="infer") as stream:
        while position > 0 and (block := stream.read(min(position, 1 << 20))):
            count += block.count(b"\n")
            position -= len(block)
    return count


def absolute(path: str) -> str:
    """The path for a worker with another working directory."""
    return path if "://" in path else os.path.abspath(path)
