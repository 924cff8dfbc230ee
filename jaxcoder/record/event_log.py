"""Writes events.jsonl (format: `events.py`), and measures time by category."""

import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

_TIMES_EVERY = 10.0  # seconds between two `spent` events
_UPLOAD_EVERY = 60.0  # seconds between two uploads of a remote file


class EventLog:
    """Appends one event a line; other processes of the run may append too.

    A remote file (gs://, s3://) cannot be appended to: it is rewritten at most once a minute, and by `close`.
    """

    def __init__(self, path: str, *, attempt: str | None = None, is_writing: bool = True):
        """attempt: hex id of this start of the run's processes. is_writing: whether this process writes events;
        otherwise it writes only an end by its watchdog."""
        self.path = path
        self.attempt = attempt or new_attempt()
        self._is_writing, self._is_remote = is_writing, "://" in path
        self._lock = threading.Lock()
        self._before: bytes | None = None  # the remote file at the start
        self._lines: list[str] = []
        self._next_upload = 0.0

    def write(self, event: str, **fields: Any) -> None:
        """Writes one event with the current time. `fields` are plain JSON."""
        if self._is_writing:
            self._append(event, fields)

    def write_end(self, step: int, reason: str, message: str = "", *, process: int = 0) -> None:
        """Writes the end of the run. reason "watchdog" is written by every process."""
        fields = {"step": step, "reason": reason} | ({"message": message} if message else {})
        if self._is_writing or reason == "watchdog":
            self._append("end", fields | ({"process": process} if process else {}))
            self.close()

    def _append(self, event: str, fields: dict[str, Any]) -> None:
        line = json.dumps({"time": time.time(), "attempt": self.attempt, "event": event} | fields) + "\n"
        with self._lock:
            if self._is_remote:
                self._lines.append(line)
                if time.monotonic() > self._next_upload:
                    self._upload()
                return
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                is_torn = file.tell() > 0 and not _ends_with_newline(self.path)
                file.write(b"\n" * is_torn + line.encode())

    def _upload(self) -> None:
        if self._before is None:
            try:
                with fsspec.open(self.path, "rb") as file:
                    before: bytes = file.read()
            except FileNotFoundError:
                before = b""
            self._before = before + b"\n" * (before[-1:] not in (b"", b"\n"))
        with fsspec.open(self.path, "wb") as file:
            file.write(self._before + "".join(self._lines).encode())
        self._next_upload = time.monotonic() + _UPLOAD_EVERY

    def close(self) -> None:
        """Uploads pending events; it may be called twice."""
        with self._lock:
            if self._is_remote and self._lines:
                self._upload()


def _ends_with_newline(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def new_attempt() -> str:
    """A random id for a start of the run."""
    return secrets.token_hex(6)


class CategoryTimer:
    """Seconds since the process was started, by category; other time is not counted.

    Categories may nest: the outer one does not count the time of the inner one.
    """

    def __init__(self, log: EventLog, process_started: float):
        """process_started: Unix seconds. The time from then until now is `init`."""
        self._log = log
        self.seconds = {"init": max(0.0, time.time() - process_started)}
        self._inside: list[float] = []  # for each open category: seconds of the categories inside it
        self._next = 0.0

    @contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Counts the block as `category`, also if it raises."""
        started = time.monotonic()
        self._inside.append(0.0)
        try:
            yield
        finally:
            took = time.monotonic() - started
            self.seconds[category] = self.seconds.get(category, 0.0) + took - self._inside.pop()
            if self._inside:
                self._inside[-1] += took

    def write(self, step: int, *, now: bool = False) -> None:
        """Writes a `spent` event after `step`: every ten seconds, or `now`."""
        if now or time.monotonic() >= self._next:
            self._next = time.monotonic() + _TIMES_EVERY
            self._log.write("spent", step=step, seconds={name: round(took, 3) for name, took in self.seconds.items()})
