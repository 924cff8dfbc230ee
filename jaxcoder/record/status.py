"""The status of a run: running, silent, finished or stopped; exit reasons; slowest hosts."""

from dataclasses import dataclass

import numpy as np

from jaxcoder.config.schema import WatchdogConfig
from jaxcoder.formatting import format_duration
from jaxcoder.record.goodput import Attempt
from jaxcoder.record.run_record import RunRecord

_REASONS = {"died": "died without an end event", "open": "not ended"}


def silent_for(record: RunRecord) -> float | None:
    """Seconds since the last event of a run that has not ended, if they exceed the limits of its watchdog; else None.

    The default limits are used for a run without a watchdog.
    """
    if record.reason != "open":
        return None
    attempt, config = record.goodput.attempts[-1], record.config
    watchdog, default = WatchdogConfig() if config is None else config.watchdog, WatchdogConfig()
    has_stepped = any(sample.step is not None and sample.step > (attempt.ready or 0) for sample in attempt.samples)
    may_evaluate = config is not None and record.last_step % config.eval.every_steps == 0
    if has_stepped and not may_evaluate:
        limit = watchdog.step_seconds or default.step_seconds
    else:
        limit = watchdog.start_seconds or default.start_seconds
    silent = record.now - attempt.last_seen
    # Plus the time to write stacks and to upload a remote events.jsonl.
    return silent if limit is not None and silent > limit + 300 else None


def status(record: RunRecord) -> str:
    """The status as a phrase."""
    if not record.goodput.attempts:
        return "only metrics, from a version without events.jsonl"
    attempt = record.goodput.attempts[-1]
    if attempt.reason == "open":
        if (silent := silent_for(record)) is not None:
            return f"not ended, no event for {format_duration(silent)}"
        return f"running (last event {format_duration(max(record.now - attempt.last_seen, 0))} ago)"
    return "finished" if attempt.reason == "finished" else f"stopped: {exit_reason(attempt)}"


def exit_reason(attempt: Attempt) -> str:
    """The reason and the message of an attempt's end."""
    reason = _REASONS.get(attempt.reason, attempt.reason)
    process = attempt.ends[0].get("process") if attempt.ends else None
    if isinstance(process, int) and process:
        reason += f" (process {process})"
    return f"{reason}: {attempt.message}" if attempt.message else reason


@dataclass(frozen=True)
class SlowHost:
    """A process that was the slowest in some measurements."""

    name: str
    """Of its host."""
    process: int
    count: int
    """Measurements in which it was the slowest."""
    behind: float
    """Mean seconds per step behind the median."""

    def __str__(self) -> str:
        return f"{self.name} (process {self.process})"


def slowest_hosts(record: RunRecord) -> list[SlowHost]:
    """The most frequent first."""
    columns = record.columns
    slowest = columns["hosts/slowest_seconds"]
    names = dict(columns.texts.get("hosts/slowest_name", ()))
    behind = slowest.values - columns["hosts/median_seconds"].at(slowest.steps)
    processes = columns["hosts/slowest"].at(slowest.steps)
    measured: dict[tuple[str, int], list[float]] = {}
    for step, seconds, process in zip(slowest.steps.tolist(), behind.tolist(), processes.tolist(), strict=True):
        if np.isfinite(seconds) and np.isfinite(process):
            measured.setdefault((names.get(step, "?"), int(process)), []).append(seconds)
    hosts = [SlowHost(*key, len(seconds), float(np.mean(seconds))) for key, seconds in measured.items()]
    return sorted(hosts, key=lambda host: (-host.count, host.process))
