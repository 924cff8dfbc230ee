"""Writers of metrics: JSONL (the source of truth), TensorBoard, several at once; and readers of the JSONL.

A line of metrics.jsonl is one JSON object: {"step": 20, "loss": 3.25, ...}. JSON has no NaN and no infinities: they are
written as the strings "NaN", "Infinity" and "-Infinity", which `float()` and JavaScript's `Number()` parse, and
`read_metrics` returns them as floats.
"""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec

from jaxcoder.errors import DataError, MissingExtraError
from jaxcoder.formatting import plural
from jaxcoder.io.atomic import write_bytes
from jaxcoder.protocols import MetricWriter

logger = logging.getLogger(__name__)

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class JsonlWriter:
    """Appends one line per step and flushes it, so that a killed process loses at most one line.

    An existing file is continued: a torn last line is dropped, and with `resume_from_step` also the lines of later
    steps, which the resumed run writes again. A remote file (gs://, s3://) cannot be appended to: it is rewritten every
    `remote_every` lines and by `close`.
    """

    def __init__(self, path: str | Path, *, resume_from_step: int | None = None, remote_every: int = 100):
        self.path = str(path)
        self._remote_every = remote_every
        self._is_remote = "://" in self.path
        self._lines = [
            line
            for line, record in read_records(self.path, missing_ok=True)
            if resume_from_step is None or record["step"] <= resume_from_step
        ]
        self._file = None
        if not self._is_remote:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            content = b"".join(self._lines)
            if not os.path.exists(self.path) or os.path.getsize(self.path) != len(content):
                write_bytes(self.path, content)
            self._lines = []
            # Unbuffered, one write for each line: a line can be torn, but never mixed with another.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Appends {"step": step, **metrics}; values are numbers (NumPy and JAX scalars too)."""
        record = {"step": int(step), **{name: _plain(value) for name, value in metrics.items()}}
        line = f"{json.dumps(record)}\n".encode()
        if self._is_remote:
            self._lines.append(line)
            if len(self._lines) % self._remote_every == 0:
                self._upload()
        elif self._file is None:
            raise ValueError(f"{self.path} is closed")
        else:
            self._file.write(line)

    def _upload(self) -> None:
        with fsspec.open(self.path, "wb") as file:
            file.write(b"".join(self._lines))

    def close(self) -> None:
        """Flushes and closes; it may be called twice."""
        if self._is_remote:
            self._upload()
        elif self._file is not None:
            self._file.close()
            self._file = None


def read_records(path: str | Path, *, missing_ok: bool = False) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, record) of every complete line, read as a stream. A torn last line is left out; other lines that are not
    records are left out with a warning.

    DataError when there is no file, unless `missing_ok`. Values that are not finite are still strings.
    """
    num_bad = 0
    try:
        with fsspec.open(str(path), "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] < 2**62:
                    yield line, record
                else:
                    num_bad += 1
        if num_bad:
            logger.warning(f"{path} has {plural(num_bad, 'line')} that are not metrics, which are ignored.")
    except FileNotFoundError:
        if not missing_ok:
            raise DataError(f"there is no metrics file {str(path)!r}: check the path, or train first.") from None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first, torn lines left out. DataError when there is no file."""
    return [_with_floats(record) for _, record in read_records(path)]


def last_metrics(path: str | Path, count: int) -> list[dict[str, Any]]:
    """The last `count` of `read_metrics`; [] when there is no file."""
    return [_with_floats(record) for _, record in deque(read_records(path, missing_ok=True), maxlen=count)]


def _with_floats(record: dict[str, Any]) -> dict[str, Any]:
    return {name: float(value) if value in NOT_FINITE else value for name, value in record.items()}


def _plain(value: float | str) -> float | int | str:
    if isinstance(value, bool | int | str):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


class TensorBoardWriter:
    """TensorBoard events in a directory (the extra `tensorboard`). Steps after `resume_from_step` are hidden there."""

    def __init__(self, directory: str | Path, *, resume_from_step: int | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("Writing TensorBoard events", "tensorboard") from error
        purge = None if resume_from_step is None else resume_from_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge)

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """One scalar per metric; texts are left out."""
        for name, value in metrics.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        self._writer.close()


class MultiWriter:
    """Writes to several writers. All are closed, also when closing one fails; the first error is raised."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = list(writers)

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        for writer in self._writers:
            writer.write(step, metrics)

    def close(self) -> None:
        failures = []
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]
