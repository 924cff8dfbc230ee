"""events.jsonl: the events of a run, one JSON object a line, appended by every start.

    begin     processes are connected: process_started, processes, devices, device_kind, hosts, mesh, version, code,
              jax, command
    ready     step (after which it continues), samples
    spent     step (last one known), seconds: since process_started, by category, cumulative
    saved     step, blocked (seconds exposed to a step), seconds (until committed), bytes
    profile   first, last, directory
    end       step, reason (finished, SIGTERM, SIGHUP, Ctrl-C, watchdog, error), message, process

Each has "time" (Unix seconds), "attempt" (hex id of one start) and "event". Readers skip torn lines and lines that are
no events, and return events of later versions unchanged.
"""

import json
import math
from pathlib import Path
from typing import Any

import fsspec

EVENTS = "events.jsonl"


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a file in the order they were written, each with a finite "time" and texts "attempt" and "event".

    [] when there is no file: older versions wrote none.
    """
    try:
        with fsspec.open(str(path), "rb") as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    return [event for line in lines if line and (event := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or number(event.get("time")) is None:
        return None
    has_texts = isinstance(event.get("attempt"), str) and isinstance(event.get("event"), str)
    return event if has_texts else None


def number(value: Any) -> float | None:
    """A finite number as a float; None for everything else, so that a damaged field counts as missing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def count(value: Any) -> int | None:
    """A step or another count: a number that is not negative, as an int; None for everything else."""
    value = number(value)
    return int(value) if value is not None and value >= 0 else None


def text(value: Any) -> str:
    """A text unchanged, "" for everything else."""
    return value if isinstance(value, str) else ""
