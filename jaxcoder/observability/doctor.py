"""`doctor`: every rule over one RunRecord, the findings in order of weight, and as text for a terminal.

A rule is a function from a record to findings, in doctor_learning.py, doctor_data.py, doctor_time.py and
doctor_life.py; its docstring says when it speaks. It is silent where what it needs was not recorded.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxcoder.observability import doctor_data, doctor_learning, doctor_life, doctor_time
from jaxcoder.observability.findings import SEVERITIES, Finding, Rule
from jaxcoder.observability.run_record import RunRecord
from jaxcoder.observability.summary import status

RULES: tuple[tuple[Rule, str], ...] = (
    (doctor_life.not_moving, "that it moves"),
    (doctor_life.failures, "how its starts ended"),
    (doctor_life.restarts_loop, "restarts in a loop"),
    (doctor_life.watchdog, "watchdogs"),
    (doctor_life.damaged_checkpoints, "that checkpoints are whole"),
    (doctor_life.schedule_ended, "the learning rate's schedule"),
    (doctor_life.code_changed, "changes of code and devices"),
    (doctor_life.cannot_be_read, "that its files can be read"),
    (doctor_learning.loss_does_not_fall, "that the loss falls"),
    (doctor_learning.loss_spikes, "loss spikes"),
    (doctor_learning.gradients_rise, "gradient norms"),
    (doctor_learning.gradient_spikes, "gradient spikes"),
    (doctor_learning.skipped_steps, "skipped steps"),
    (doctor_data.languages_behind, "every language and corpus"),
    (doctor_data.held_out_rises, "memorising"),
    (doctor_data.context_unused, "loss by position"),
    (doctor_data.fim_shares, "FIM shares"),
    (doctor_data.repeated_batches, "repeated batches"),
    (doctor_time.data_wait, "waiting for data"),
    (doctor_time.slow_hosts, "slow hosts"),
    (doctor_time.checkpoints_block, "what checkpoints cost"),
    (doctor_time.checkpoints_rare, "what failures cost"),
    (doctor_time.low_goodput, "goodput"),
    (doctor_time.compiles_again, "the compilation cache"),
    (doctor_time.throughput_decays, "throughput"),
    (doctor_time.memory_grows, "memory"),
)
"""Every rule, and what it looks at in a word."""

_MOST_TRACED_LINES = 10
_GLUE = "\x00"

Trace = Callable[[int], Sequence[str]]
"""From a step to the lines that say which files its batch held."""


def examine(record: RunRecord, trace: Trace | None = None) -> list[Finding]:
    """All findings, errors first. trace: when given, the batches of the steps that findings point at are traced."""
    found = [finding for rule, _ in RULES for finding in rule(record)]
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    told: set[int] = set()
    return found if trace is None else [_traced(finding, trace, told) for finding in found]


def _traced(finding: Finding, trace: Trace, told: set[int]) -> Finding:
    """told: the steps that were traced for findings before it, and need not be again."""
    lines: list[str] = []
    for step in finding.traced:
        if step in told:
            lines.append(f"step {step:,}: its files are above")
            continue
        told.add(step)
        own = list(trace(step))
        lines += own[:_MOST_TRACED_LINES]
        if len(own) > _MOST_TRACED_LINES:
            lines.append(f"and {len(own) - _MOST_TRACED_LINES} more lines")
    return replace(finding, evidence=finding.evidence + tuple(lines))


def describe(record: RunRecord, findings: Sequence[Finding], width: int = 100) -> str:
    """The findings for a terminal; what was looked at, when there are none."""
    name = record.config.name if record.config is not None else record.path
    head = f"{name}: {status(record).rstrip('.')}; step {record.last_step:,}"
    checked = textwrap.fill(f"Looked at: {', '.join(what for _, what in RULES)}.", width)
    if not findings:
        return f"{head}\n\nNothing found.\n{checked}"
    parts = [head, *(_said(finding, width) for finding in findings), checked]
    return "\n\n".join(parts)


def _said(finding: Finding, width: int) -> str:
    lines = [f"{finding.severity.upper()}  {finding.what}  [{finding.rule}]"]
    for evidence in finding.evidence:
        lines += _wrapped(evidence, "    ", width)
    for number, advice in enumerate(finding.try_next):
        lines += _wrapped(advice, "  try  " if number == 0 else "       ", width)
    return "\n".join(lines)


def _wrapped(text: str, lead: str, width: int) -> list[str]:
    if text.startswith(" "):  # lines of a trace: as they are
        return [lead + text]
    # A command stays on one line, however long, so that it can be copied.
    text = re.sub("`[^`]*`", lambda command: command[0].replace(" ", _GLUE), text)
    indent = " " * len(lead)
    lines = textwrap.wrap(
        text, width, initial_indent=lead, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_GLUE, " ") for line in lines] or [lead]
