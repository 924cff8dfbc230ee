"""What `doctor` says: findings, and the few words and commands that its rules share."""

import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from jaxcoder.record.events import text
from jaxcoder.record.run_record import RunRecord

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    rule: str
    severity: Severity
    """error: the run does not do what it is for. warning: time or quality is lost. note: worth knowing."""
    what: str
    """A sentence."""
    evidence: tuple[str, ...]
    """Numbers and steps."""
    try_next: tuple[str, ...]
    """What to do, with commands in `backticks`."""
    traced: tuple[int, ...] = ()
    """Steps whose batches belong to the evidence."""


Rule = Callable[[RunRecord], Iterable[Finding]]


def trace_command(record: RunRecord, step: int) -> str:
    return f"`jaxcoder data trace {shlex.quote(record.path)} --step {step}`"


def train_command(record: RunRecord, *options: str) -> str:
    """The command that the run was last started with, or one like it; `options` ("--name value") replace its own."""
    command = text(record.goodput.attempts[-1].begin.get("command")) if record.goodput.attempts else ""
    if "train" not in command.split():
        name = record.config.name if record.config is not None else "CONFIG"
        command = f"jaxcoder train {name} ... --output-dir {shlex.quote(record.path)}"
    for option in options:
        name = re.escape(option.split()[0]).replace(r"\-", "[-_]")
        command = re.sub(rf" {name}(=\S+| (?!--)\S+)?(?= |$)", "", command)
    return f"`{' '.join([command, *options])}`"


def changed(record: RunRecord, *options: str) -> str:
    """`train_command` with options that change what is computed."""
    return train_command(record, *options, "--accept-config-change")


def profile_command(record: RunRecord) -> str:
    """How to record a profile of steps that are still to come; of a finished run, of the next one."""
    first = record.last_step + 10
    if record.config is None or first + 3 <= record.config.num_steps:
        return train_command(record, f"--profile-steps {first}:{first + 3}")
    return "`--profile-steps 50:53` of the next run"


def rate(value: float) -> str:
    """A learning rate as people write it."""
    return f"{value:.2g}"
