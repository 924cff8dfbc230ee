"""Goodput: the time of a run by category over all its starts, from events.jsonl.

Goodput is the time in optimizer steps that were not lost, divided by the wall time from the first start of the run's
processes to its last event. A step is lost if a later start continued from before it.

An attempt (one start) records its time by category (init, restore, compile, data_wait, step, save, evaluate). Lost
steps count as `lost`; time without a record is `other`, or `init` in an attempt that never became ready; time between
attempts is `down`. All categories add up to the wall time even if clocks are wrong: attempts are placed on one time
line in the order they were written, each at least as long as the time it recorded.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcoder.record.events import count, number, text

RECORDED = ("init", "restore", "compile", "data_wait", "step", "save", "evaluate")
CATEGORIES = ("step", "lost", "data_wait", "save", "evaluate", "init", "restore", "compile", "other", "down")
CATEGORY_NAMES = {
    "step": "steps",
    "lost": "lost steps",
    "data_wait": "waiting for data",
    "save": "saving",
    "evaluate": "evaluating",
    "init": "starting up",
    "restore": "restoring or initializing weights",
    "compile": "compiling (first steps)",
    "other": "other (hangs, not measured)",
    "down": "down between starts",
}
_LONGEST_START = 86400.0  # seconds; a larger difference of process_started and `begin` means that the clock was reset


@dataclass(frozen=True)
class TimeSample:
    """A `spent` event."""

    elapsed: float
    """Seconds since the start of the attempt."""
    step: int | None
    """The last one known to be complete."""
    by: Mapping[str, float]
    """Cumulative seconds by category of RECORDED."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the run's processes."""

    id: str
    begin: Mapping[str, Any]
    """The `begin` event, or {}."""
    started: float
    """Unix seconds."""
    last_seen: float
    """Unix seconds of its latest event."""
    offset: float
    """Seconds on the run's time line, which starts at 0."""
    duration: float
    ready: int | None
    """The step after which it continued (0: a new run); None if it ended before."""
    last_step: int | None
    """The last step that is known to be complete."""
    lost_steps: int
    useful_step_seconds: float
    seconds: Mapping[str, float]
    """By CATEGORIES without `down`; they add up to `duration`."""
    samples: Sequence[TimeSample]
    ends: Sequence[Mapping[str, Any]]
    """Its `end` events: several when several processes were ended by their watchdogs."""
    is_last: bool

    @property
    def reason(self) -> str:
        """As in its `end`; without one "died" if another start followed, "open" if not."""
        if self.ends:
            return text(self.ends[0].get("reason")) or "ended"
        return "open" if self.is_last else "died"

    @property
    def message(self) -> str:
        """The message of its end; "" without one."""
        return next((message for end in self.ends if (message := text(end.get("message")))), "")

    @property
    def failed(self) -> bool:
        """Whether it ended before its work was done."""
        return self.reason not in ("finished", "open")


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The time of a run. `seconds` has each of CATEGORIES; they add up to `wall`."""

    attempts: Sequence[Attempt]
    seconds: Mapping[str, float]
    wall: float

    @property
    def share(self) -> float | None:
        """Goodput, 0 to 1; None when no time is recorded."""
        return self.seconds["step"] / self.wall if self.wall > 0 else None

    @property
    def lost_steps(self) -> int:
        return sum(attempt.lost_steps for attempt in self.attempts)

    def down_before(self, index: int) -> float:
        """Seconds between an attempt and the one before it."""
        if index == 0:
            return 0.0
        before = self.attempts[index - 1]
        return max(self.attempts[index].offset - before.offset - before.duration, 0.0)


def account(events: Sequence[Mapping[str, Any]]) -> Goodput:
    """The goodput of a run from its events (`read_events`). Without events: no attempts, no time."""
    by_attempt: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        by_attempt.setdefault(event["attempt"], []).append(event)
    parsed = [_AttemptEvents(id_, own) for id_, own in by_attempt.items()]
    attempts: list[Attempt] = []
    offset = 0.0
    for index, own in enumerate(parsed):
        if index:
            offset += max(own.started - parsed[index - 1].started, attempts[-1].duration)
        duration = own.longest
        if index + 1 < len(parsed):
            # A process may outlive its attempt: that time belongs to the next one.
            until_next = parsed[index + 1].started - own.started
            duration = min(duration, max(until_next, own.accounted)) if until_next > 0 else duration
        restarts = [other.ready for other in parsed[index + 1 :] if other.ready is not None]
        is_last = index == len(parsed) - 1
        attempts.append(own.attempt(offset, duration, min(restarts, default=None), is_last=is_last))
    wall = attempts[-1].offset + attempts[-1].duration if attempts else 0.0
    seconds = {name: sum(attempt.seconds[name] for attempt in attempts) for name in CATEGORIES if name != "down"}
    down = max(wall - sum(attempt.duration for attempt in attempts), 0.0)
    return Goodput(attempts=attempts, seconds=seconds | {"down": down}, wall=wall)


class _AttemptEvents:
    """The events of one attempt, before it is compared with the others."""

    def __init__(self, id_: str, events: Sequence[Mapping[str, Any]]):
        self.id, self.events = id_, events
        self.begin = next((event for event in events if event["event"] == "begin"), {})
        times = [number(event["time"]) or 0.0 for event in events]
        process_started = number(self.begin.get("process_started"))
        self.started = times[0]
        if process_started is not None and 0 <= times[0] - process_started <= _LONGEST_START:
            self.started = process_started
        self.last_seen = max(times)
        readies = [count(event.get("step")) for event in events if event["event"] == "ready"]
        self.ready = next((step for step in readies if step is not None), None)
        self.samples = self._samples()
        self.recorded = self.samples[-1].by if self.samples else dict.fromkeys(RECORDED, 0.0)
        self.accounted = sum(self.recorded.values())
        self.longest = max(self.last_seen - self.started, self.accounted)

    def _samples(self) -> list[TimeSample]:
        """In order. Cumulative values never decrease, even if a line is damaged."""
        samples: list[TimeSample] = []
        by, elapsed = dict.fromkeys(RECORDED, 0.0), 0.0
        step: int | None = None
        for event in self.events:
            seconds = event.get("seconds")
            if event["event"] != "spent" or not isinstance(seconds, Mapping):
                continue
            by = {name: max(by[name], number(seconds.get(name)) or 0.0) for name in RECORDED}
            step = max((known for known in (step, count(event.get("step"))) if known is not None), default=None)
            elapsed = max(elapsed, (number(event["time"]) or 0.0) - self.started, sum(by.values()))
            samples.append(TimeSample(elapsed, step, by))
        return samples

    def attempt(self, offset: float, duration: float, restart: int | None, *, is_last: bool) -> Attempt:
        """restart: the earliest step that a later attempt continued after; None when there was none."""
        ends = [event for event in self.events if event["event"] == "end"]
        # A watchdog names the step that hangs, not the last one that is complete.
        ended_at = [count(end.get("step")) for end in ends if end.get("reason") != "watchdog"]
        sampled = self.samples[-1].step if self.samples else None
        last_step = max((step for step in (sampled, self.ready, *ended_at) if step is not None), default=None)
        lost_steps = 0
        if restart is not None and last_step is not None:
            lost_steps = max(last_step - max(restart, self.ready or 0), 0)
        useful, other = self._step_seconds_at(restart), max(duration - self.accounted, 0.0)
        seconds = dict(self.recorded) | {"step": useful, "lost": self.recorded["step"] - useful, "other": other}
        if self.ready is None:
            seconds |= {"init": seconds["init"] + other, "other": 0.0}
        return Attempt(
            id=self.id, begin=self.begin, started=self.started, last_seen=self.last_seen, offset=offset,
            duration=duration, ready=self.ready, last_step=last_step, lost_steps=lost_steps, useful_step_seconds=useful,
            seconds=seconds, samples=self.samples, ends=ends, is_last=is_last,
        )  # fmt: skip

    def _step_seconds_at(self, restart: int | None) -> float:
        """Seconds of `step` until step `restart` was complete; all of them without a restart."""
        total, first = self.recorded["step"], self.ready or 0
        marks = [(first, 0.0)]
        marks += [(max(sample.step, first), sample.by["step"]) for sample in self.samples if sample.step is not None]
        if restart is None or restart >= marks[-1][0]:
            return total
        # Of several marks at one step the last one counts: the time after it went into saving and evaluating.
        right = bisect.bisect_right(marks, restart, key=lambda mark: mark[0])
        if right == 0:
            return 0.0
        (step, seconds), (next_step, next_seconds) = marks[right - 1], marks[right]
        share = (restart - step) / (next_step - step)
        return min(max(seconds + share * (next_seconds - seconds), 0.0), total)


def over_time(goodput: Goodput, bins: int) -> dict[str, np.ndarray]:
    """Seconds by category in each of `bins` equal intervals of the run's time line: float64 [bins] each."""
    edges = np.linspace(0.0, goodput.wall, bins + 1)
    result = {name: np.zeros(bins) for name in CATEGORIES}
    for attempt in goodput.attempts:
        inside = np.clip(edges - attempt.offset, 0.0, attempt.duration)
        elapsed = [min(sample.elapsed, attempt.duration) for sample in attempt.samples]
        times = np.array([0.0, *elapsed, attempt.duration])
        known = np.zeros(bins + 1)
        for name in RECORDED:
            cumulative = [0.0, *(sample.by[name] for sample in attempt.samples)]
            values = np.interp(inside, times, [*cumulative, cumulative[-1]])
            known += values
            if name == "step":
                result["lost"] += np.diff(np.maximum(values - attempt.useful_step_seconds, 0.0))
                values = np.minimum(values, attempt.useful_step_seconds)
            result[name] += np.diff(values)
        rest = np.diff(np.maximum.accumulate(np.maximum(inside - known, 0.0)))
        result["init" if attempt.ready is None else "other"] += rest
    result["down"] = np.maximum(np.diff(edges) - sum(result.values()), 0.0)
    return result
