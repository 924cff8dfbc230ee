"""Findings of the doctor, and the commands that they suggest."""

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from jaxcoder.record.events import text
from jaxcoder.record.run_record import RunRecord

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

MARGIN = 0.02
"""Relative difference of two losses below which they count as equal: the gain of a model of 1B parameters from doubling
300B tokens (1.9 %, equation 10 of Hoffmann et al. 2022, arXiv 2203.15556)."""


@dataclass(frozen=True)
class Finding:
    """A problem of a run, or a note."""

    severity: Severity
    """error: the run fails or does not learn. warning: time or quality is lost. note: information."""
    what: str
    """A sentence."""
    evidence: tuple[str, ...]
    """Numbers and steps."""
    try_next: tuple[str, ...]
    """What to do, with commands in `backticks`."""
    traced: tuple[int, ...] = ()
    """Steps whose batches are traced to their files."""
    rule: str = ""
    """The name of the rule, set by `examine`."""


def trace_command(record: RunRecord, step: int) -> str:
    return f"`jaxcoder data trace {shlex.quote(record.path)} --step {step}`"


def train_command(record: RunRecord, *options: str) -> str:
    """The command that last started the run, or one like it; `options` ("--name value") replace its own."""
    command = text(record.goodput.attempts[-1].begin.get("command")) if record.goodput.attempts else ""
    if "train" not in command.split():
        name = record.config.name if record.config is not None else "CONFIG"
        command = f"jaxcoder train {name} ... --output-dir {shlex.quote(record.path)}"
    for option in options:
        name = re.escape(option.split()[0]).replace(r"\-", "[-_]")
        command = re.sub(rf" {name}(=\S+| (?!--)\S+)?(?= |$)", "", command)
    return f"`{' '.join([command, *options])}`"


def changed(record: RunRecord, *options: str) -> str:
    """`train_command` with options that change the computation."""
    return train_command(record, *options, "--accept-config-change")


def lower_rate(record: RunRecord) -> str:
    """The advice to train with a third of the learning rate."""
    if record.config is None:
        return "lower optimizer.peak_learning_rate to a third"
    peak = record.config.optimizer.peak_learning_rate
    command = changed(record, f"--optimizer.peak-learning-rate {peak / 3:.2g}")
    return f"lower the learning rate to a third of {peak:.2g}: {command}"


def profile_command(record: RunRecord) -> str:
    """Profiles the next steps, or steps of the next run if this one is at its end."""
    first = record.last_step + 10
    if record.config is None or first + 3 <= record.config.num_steps:
        return train_command(record, f"--profile-steps {first}:{first + 3}")
    return "`--profile-steps 50:53` of the next run"
