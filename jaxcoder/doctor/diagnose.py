"""The doctor: applies all rules to a RunRecord, sorts the findings by severity and formats them.

A rule is a function from a record to findings, in learning.py, data.py, throughput.py and lifecycle.py. Its docstring
is its condition; it has no findings if its metrics were not recorded.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from jaxcoder.doctor import data, learning, lifecycle, throughput
from jaxcoder.doctor.findings import SEVERITIES, Finding
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.status import status

RULES: tuple[tuple[Callable[[RunRecord], Iterable[Finding]], str], ...] = (
    (lifecycle.not_moving, "progress"),
    (lifecycle.failures, "exit reasons"),
    (lifecycle.restarts_loop, "restarts in a loop"),
    (lifecycle.watchdog, "watchdogs"),
    (lifecycle.damaged_checkpoints, "checkpoints"),
    (lifecycle.schedule_ended, "the learning rate"),
    (lifecycle.code_changed, "changes of code and devices"),
    (lifecycle.cannot_be_read, "its files"),
    (learning.loss_does_not_fall, "the loss"),
    (learning.loss_spikes, "loss spikes"),
    (learning.gradients_rise, "gradient norms"),
    (learning.gradient_spikes, "gradient spikes"),
    (learning.skipped_steps, "skipped steps"),
    (data.languages_behind, "languages and corpora"),
    (data.held_out_rises, "memorization"),
    (data.context_unused, "loss by position"),
    (data.fim_shares, "FIM shares"),
    (data.repeated_batches, "repeated batches"),
    (throughput.data_wait, "waiting for data"),
    (throughput.slow_hosts, "slow hosts"),
    (throughput.checkpoints_block, "the cost of checkpoints"),
    (throughput.checkpoints_rare, "the cost of failures"),
    (throughput.low_goodput, "goodput"),
    (throughput.compiles_again, "the compilation cache"),
    (throughput.throughput_decays, "throughput"),
    (throughput.memory_grows, "memory"),
)
"""All rules, and what they check."""

_MOST_TRACED_LINES = 10
_NO_BREAK = "\x00"

Trace = Callable[[int], Sequence[str]]
"""From a step to lines that name the files of its batch."""


def examine(record: RunRecord, trace: Trace | None = None) -> list[Finding]:
    """All findings, errors first. trace: traces the batches of `Finding.traced`."""
    findings = [replace(finding, rule=rule.__name__) for rule, _ in RULES for finding in rule(record)]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    traced: set[int] = set()
    return findings if trace is None else [_traced(finding, trace, traced) for finding in findings]


def _traced(finding: Finding, trace: Trace, traced: set[int]) -> Finding:
    """traced: steps of earlier findings, which are not traced again."""
    lines: list[str] = []
    for step in finding.traced:
        if step in traced:
            lines.append(f"step {step:,}: see its files above")
            continue
        traced.add(step)
        own = list(trace(step))
        lines += own[:_MOST_TRACED_LINES]
        if len(own) > _MOST_TRACED_LINES:
            lines.append(f"and {len(own) - _MOST_TRACED_LINES} more lines")
    return replace(finding, evidence=(*finding.evidence, *lines))


def describe(record: RunRecord, findings: Sequence[Finding], width: int = 100) -> str:
    """The findings for a terminal, and what was checked. width: of a line."""
    head = f"{record.name}: {status(record).rstrip('.')}; step {record.last_step:,}"
    checked = textwrap.fill(f"Checked: {', '.join(what for _, what in RULES)}.", width)
    if not findings:
        return f"{head}\n\nNothing found.\n{checked}"
    parts = [head, *(_format(finding, width) for finding in findings), checked]
    return "\n\n".join(parts)


def _format(finding: Finding, width: int) -> str:
    lines = [f"{finding.severity.upper()}  {finding.what}  [{finding.rule}]"]
    for evidence in finding.evidence:
        lines += _wrapped(evidence, "    ", width)
    for number, advice in enumerate(finding.try_next):
        lines += _wrapped(advice, "  try  " if number == 0 else "       ", width)
    return "\n".join(lines)


def _wrapped(text: str, lead: str, width: int) -> list[str]:
    if text.startswith(" "):  # a line of a trace
        return [lead + text]
    # Commands are not wrapped, so that they can be copied.
    text = re.sub("`[^`]*`", lambda command: command[0].replace(" ", _NO_BREAK), text)
    indent = " " * len(lead)
    lines = textwrap.wrap(
        text, width, initial_indent=lead, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_NO_BREAK, " ") for line in lines] or [lead]
