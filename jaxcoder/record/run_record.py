"""Everything that a run left behind, read once: what `report` draws and `doctor` judges.

RUN/config.json         the configuration
RUN/metrics.jsonl       a line a step, and one an evaluation
RUN/events.jsonl        starts, time spent, checkpoints, ends
RUN/stacks/             of processes that their watchdogs ended
RUN/checkpoints/STEP/   whole once there is a manifest.json
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from jaxcoder.config.schema import RunConfig
from jaxcoder.config.serialize import from_json
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.record.events import EVENTS, number, read_events
from jaxcoder.record.goodput import Goodput, account
from jaxcoder.record.series import Columns, Series, read_columns

CONFIG, METRICS, STACKS, CHECKPOINTS, MANIFEST = (
    "config.json",
    "metrics.jsonl",
    "stacks",
    "checkpoints",
    "manifest.json",
)
_MOST_STACK_BYTES = 200_000
_MOST_STACKS = 64


@dataclass(frozen=True)
class Stack:
    """The stacks of one process that its watchdog ended. sentence: the first line."""

    name: str
    step: int
    process: int
    sentence: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its directory tells it. What is not there is empty."""

    path: str
    config: RunConfig | None = None
    """None when there is none that this version can read; `config_problem` then says why."""
    config_problem: str = ""
    columns: Columns = field(default_factory=Columns)
    events: Sequence[Mapping[str, Any]] = ()
    goodput: Goodput = field(default_factory=lambda: account(()))
    stacks: Sequence[Stack] = ()
    checkpoints: Mapping[int, str] = field(default_factory=dict)
    """Steps with a directory, ascending -> what is wrong with it; "" for a whole one."""
    now: float = 0.0
    """Unix seconds at which it was read."""

    @property
    def last_step(self) -> int:
        """The newest step known, of metrics and of events; 0 before the first."""
        attempts = [attempt.last_step for attempt in self.goodput.attempts if attempt.last_step is not None]
        return max([self.columns.last_step or 0, *attempts[-1:]])

    @property
    def is_synthetic(self) -> bool:
        """Whether it read random tokens, of which nothing can be learned."""
        return self.config is not None and self.config.data.store == "synthetic"

    @property
    def reason(self) -> str:
        """How its last start ended (goodput.Attempt.reason); "" when there are no events."""
        return self.goodput.attempts[-1].reason if self.goodput.attempts else ""

    def saved(self, key: str) -> Series:
        """A field of the `saved` events by step: "blocked", "seconds" or "bytes"."""
        found: dict[int, float] = {}
        for event in self.events:
            if event["event"] == "saved" and isinstance(event.get("step"), int):
                value = number(event.get(key))
                if value is not None and value >= 0:
                    found[event["step"]] = value
        return Series(np.array(sorted(found), np.int64), np.array([found[step] for step in sorted(found)]))


def read_run(path: str, *, damage: Mapping[int, str] | None = None, now: float | None = None) -> RunRecord:
    """The record of a run's directory, local or gs://, s3://; also of one that is under way or has just begun.

    damage: what is wrong with its checkpoints, by step ("" for a whole one), of somebody who looked into them; without
    it a checkpoint counts as whole when its manifest is there. now: Unix seconds (default: the clock).
    Raises DataError when the directory is no run.
    """
    path = path.rstrip("/")
    config_text = _text(f"{path}/{CONFIG}")
    events = read_events(f"{path}/{EVENTS}")
    try:
        columns = read_columns(f"{path}/{METRICS}")
    except DataError:
        if config_text is None and not events:
            raise DataError(
                f"`{path}` is no run: it has neither {CONFIG} nor {METRICS} nor {EVENTS}; give the --output-dir of a "
                "`jaxcoder train`."
            ) from None
        columns = Columns()
    config, problem = None, f"there is no {CONFIG}"
    if config_text is not None:
        try:
            config, problem = from_json(config_text, source=f"{path}/{CONFIG}"), ""
        except ConfigError as error:
            problem = str(error)
    return RunRecord(
        path=path, config=config, config_problem=problem, columns=columns, events=events, goodput=account(events),
        stacks=_stacks(f"{path}/{STACKS}"), checkpoints=_checkpoints(path) if damage is None else dict(damage),
        now=time.time() if now is None else now,
    )  # fmt: skip


def _text(path: str | Path) -> str | None:
    try:
        with fsspec.open(str(path), "rb") as file:
            return file.read().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _names(path: str) -> list[str]:
    """What lies in a directory; [] when there is none."""
    filesystem, inside = fsspec.url_to_fs(path)
    try:
        entries = filesystem.ls(inside, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)


def _checkpoints(path: str) -> dict[int, str]:
    directory = f"{path}/{CHECKPOINTS}"
    filesystem, inside = fsspec.url_to_fs(directory)
    steps = sorted(int(name) for name in _names(directory) if name.isdecimal())
    missing = f"it has no {MANIFEST}: its save was not finished"
    return {step: "" if filesystem.exists(f"{inside}/{step}/{MANIFEST}") else missing for step in steps}


def _stacks(directory: str) -> list[Stack]:
    """The newest ones, by step and process."""
    found = []
    for name in _names(directory):
        parts = re.fullmatch(r"step-(\d+)-process-(\d+)\.txt", name)
        if parts:
            found.append((int(parts[1]), int(parts[2]), name))
    stacks = []
    for step, process, name in sorted(found)[-_MOST_STACKS:]:
        content = (_text(f"{directory}/{name}") or "")[:_MOST_STACK_BYTES]
        stacks.append(Stack(name, step, process, content.partition("\n")[0].strip(), content))
    return stacks
