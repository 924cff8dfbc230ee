"""`doctor`: every rule over one RunRecord, the findings in order of weight, and as text for a terminal.

A rule is a function from a record to findings, in learning.py, data.py, throughput.py and
lifecycle.py; its docstring says when it speaks. It is silent where what it needs was not recorded.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxcoder.doctor import data, learning, lifecycle, throughput
from jaxcoder.doctor.findings import SEVERITIES, Finding, Rule
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.summary import status

RULES: tuple[tuple[Rule, str], ...] = (
    (lifecycle.not_moving, "that it moves"),
    (lifecycle.failures, "how its starts ended"),
    (lifecycle.restarts_loop, "restarts in a loop"),
    (lifecycle.watchdog, "watchdogs"),
    (lifecycle.damaged_checkpoints, "that checkpoints are whole"),
    (lifecycle.schedule_ended, "the learning rate's schedule"),
    (lifecycle.code_changed, "changes of code and devices"),
    (lifecycle.cannot_be_read, "that its files can be read"),
    (learning.loss_does_not_fall, "that the loss falls"),
    (learning.loss_spikes, "loss spikes"),
    (learning.gradients_rise, "gradient norms"),
    (learning.gradient_spikes, "gradient spikes"),
    (learning.skipped_steps, "skipped steps"),
    (data.languages_behind, "every language and corpus"),
    (data.held_out_rises, "memorising"),
    (data.context_unused, "loss by position"),
    (data.fim_shares, "FIM shares"),
    (data.repeated_batches, "repeated batches"),
    (throughput.data_wait, "waiting for data"),
    (throughput.slow_hosts, "slow hosts"),
    (throughput.checkpoints_block, "what checkpoints cost"),
    (throughput.checkpoints_rare, "what failures cost"),
    (throughput.low_goodput, "goodput"),
    (throughput.compiles_again, "the compilation cache"),
    (throughput.throughput_decays, "throughput"),
    (throughput.memory_grows, "memory"),
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
