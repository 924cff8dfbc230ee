"""The records of a run, read once: the input of `report` and `doctor`.

RUN/config.json         the configuration
RUN/metrics.jsonl       a line for each step, evaluation, save and alarm
RUN/events.jsonl        starts, time by category, checkpoints, ends
RUN/stacks/             stacks of processes ended by their watchdogs
RUN/checkpoints/STEP/   committed once it has a manifest.json
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np

from jaxcoder.config.schema import RunConfig
from jaxcoder.config.serialize import from_json
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.record.events import EVENTS, number, read_events
from jaxcoder.record.goodput import Goodput, account
from jaxcoder.record.series import Columns, Series, read_columns

CONFIG, METRICS, STACKS = "config.json", "metrics.jsonl", "stacks"
CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
_MOST_STACK_BYTES = 200_000
_MOST_STACKS = 64


@dataclass(frozen=True)
class Stack:
    """The stacks of one process ended by its watchdog. reason: the first line of the file."""

    name: str
    step: int
    process: int
    reason: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The records in a run's directory. Fields of missing files are empty."""

    path: str
    config: RunConfig | None = None
    """None if it is missing or cannot be read; `config_problem` is then the reason."""
    config_problem: str = ""
    columns: Columns = field(default_factory=Columns)
    events: Sequence[Mapping[str, Any]] = ()
    goodput: Goodput = field(default_factory=lambda: account(()))
    stacks: Sequence[Stack] = ()
    checkpoints: Mapping[int, str] = field(default_factory=dict)
    """Step -> its damage, "" for a complete checkpoint; ascending."""
    now: float = 0.0
    """Unix seconds at which it was read."""

    @property
    def name(self) -> str:
        return self.config.name if self.config is not None else self.path

    @property
    def last_step(self) -> int:
        """The newest step in metrics and events; 0 before the first."""
        attempts = [attempt.last_step for attempt in self.goodput.attempts if attempt.last_step is not None]
        return max([self.columns.last_step or 0, *attempts[-1:]])

    @property
    def is_synthetic(self) -> bool:
        """Whether it read random tokens."""
        return self.config is not None and self.config.data.store == "synthetic"

    @property
    def reason(self) -> str:
        """The exit reason of its last start (goodput.Attempt.reason); "" without events."""
        return self.goodput.attempts[-1].reason if self.goodput.attempts else ""

    @property
    def skipped_steps(self) -> list[int]:
        """Steps whose update was not applied."""
        skipped = self.columns["skipped"]
        return skipped.steps[skipped.values > 0].tolist()

    @property
    def alarms(self) -> list[tuple[int, str, str]]:
        """(step, rule, message) of every alarm, in order."""
        prefix = "alarm/"
        texts = ((key, entries) for key, entries in self.columns.texts.items() if key.startswith(prefix))
        return sorted((step, key[len(prefix) :], message) for key, entries in texts for step, message in entries)

    def saved(self, key: str) -> Series:
        """A field of the `saved` events by step: "blocked", "seconds" or "bytes"."""
        values: dict[int, float] = {}
        for event in self.events:
            if event["event"] == "saved" and isinstance(event.get("step"), int):
                value = number(event.get(key))
                if value is not None and value >= 0:
                    values[event["step"]] = value
        return Series(np.array(sorted(values), np.int64), np.array([values[step] for step in sorted(values)]))


def read_run(path: str, *, damage: Mapping[int, str] | None = None, now: float | None = None) -> RunRecord:
    """Reads a run's directory, local or gs://, s3://, during the run or after it.

    damage: step -> the damage to its checkpoint, "" for none, of a caller that has checked the files. By default a
    checkpoint with a manifest counts as complete. now: Unix seconds (default: the clock).
    DataError if the directory is no run.
    """
    path = path.rstrip("/")
    config_text = _read_text(f"{path}/{CONFIG}")
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


def _read_text(path: str) -> str | None:
    try:
        with fsspec.open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _names(path: str) -> list[str]:
    """The names in a directory; [] when there is none."""
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
    missing = f"it has no {MANIFEST}: its save was not committed"
    return {step: "" if filesystem.exists(f"{inside}/{step}/{MANIFEST}") else missing for step in steps}


def _stacks(directory: str) -> list[Stack]:
    """The newest ones, by step and process."""
    matches = (re.fullmatch(r"step-(\d+)-process-(\d+)\.txt", name) for name in _names(directory))
    files = sorted((int(match[1]), int(match[2]), match[0]) for match in matches if match)
    stacks = []
    for step, process, name in files[-_MOST_STACKS:]:
        content = (_read_text(f"{directory}/{name}") or "")[:_MOST_STACK_BYTES]
        stacks.append(Stack(name, step, process, content.partition("\n")[0].strip(), content))
    return stacks
