"""Where the time of a run went, over all its starts: from events.jsonl to seconds by category, and goodput.

Goodput is the time in optimizer steps whose result survived, divided by the wall time from the first start of the run's
processes to its last event. A step is lost when a later start continued from before it.

The parts of an attempt are what it says it spent (init, restore, compile, data_wait, step, save, evaluate); of its
steps those done again are `lost`; what it does not account for is `other`, or `init` where it never got ready. Between
attempts the run is `down`. All parts together are the wall time, whatever the clocks of the machines did: attempts are
laid behind each other in the order they were written, none shorter than what it says it spent.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcoder.record.events import number, text, whole

SPENT = ("init", "restore", "compile", "data_wait", "step", "save", "evaluate")
CATEGORIES = ("step", "lost", "data_wait", "save", "evaluate", "init", "restore", "compile", "other", "down")
_LONGEST_START = 86400.0  # seconds; a process_started further from its `begin` is a clock that was set in between


@dataclass(frozen=True)
class Spent:
    """At `seconds` after the attempt's start: the last step known, and seconds by category of SPENT, cumulative."""

    seconds: float
    step: int | None
    by: Mapping[str, float]


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
    """Seconds on the run's own time line, which begins at 0 and never runs backwards."""
    duration: float
    ready: int | None
    """The step it continued after (0: new); None when it never got so far."""
    last_step: int | None
    """The last step that is known to be done."""
    lost_steps: int
    kept_step_seconds: float
    seconds: Mapping[str, float]
    """By CATEGORIES without `down`; together `duration`."""
    spent: Sequence[Spent]
    ends: Sequence[Mapping[str, Any]]
    """Its `end` events: several when several processes were ended by their watchdogs."""
    is_last: bool

    @property
    def reason(self) -> str:
        """As in its `end`; "died" when another start followed without one; "open" for the last start without one."""
        if self.ends:
            return text(self.ends[0].get("reason")) or "ended"
        return "open" if self.is_last else "died"

    @property
    def message(self) -> str:
        """The sentence that it ended with; "" when there is none."""
        return next((said for end in self.ends if (said := text(end.get("message")))), "")

    @property
    def failed(self) -> bool:
        """Ended by something else than its work being done."""
        return self.reason not in ("finished", "open")


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The account of a run. `seconds` has every one of CATEGORIES; together they are `wall`."""

    attempts: Sequence[Attempt]
    seconds: Mapping[str, float]
    wall: float

    @property
    def share(self) -> float | None:
        """Goodput, 0 to 1; None when nothing is known of the run's time."""
        return self.seconds["step"] / self.wall if self.wall > 0 else None

    @property
    def lost_steps(self) -> int:
        return sum(attempt.lost_steps for attempt in self.attempts)

    @property
    def last_seen(self) -> float | None:
        """Unix seconds of the last event; None without events."""
        return max((attempt.last_seen for attempt in self.attempts), default=None)

    def down_before(self, index: int) -> float:
        """Seconds between an attempt and the one before it."""
        if index == 0:
            return 0.0
        before = self.attempts[index - 1]
        return max(self.attempts[index].offset - before.offset - before.duration, 0.0)


def account(events: Sequence[Mapping[str, Any]]) -> Goodput:
    """The account of a run's events, as `read_events` gives them. Of no events: no attempts, no time."""
    by_attempt: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        by_attempt.setdefault(event["attempt"], []).append(event)
    groups = [_Raw(name, own) for name, own in by_attempt.items()]
    attempts, offset = [], 0.0
    for index, raw in enumerate(groups):
        if index:
            offset += max(raw.started - groups[index - 1].started, attempts[-1].duration)
        duration = raw.longest
        if index + 1 < len(groups):  # a process that outlives its attempt does not stop the clock of the next one
            until_next = groups[index + 1].started - raw.started
            duration = min(duration, max(until_next, raw.accounted)) if until_next > 0 else duration
        later = [other.ready for other in groups[index + 1 :] if other.ready is not None]
        attempts.append(_attempt(raw, offset, duration, min(later, default=None), is_last=index == len(groups) - 1))
    wall = attempts[-1].offset + attempts[-1].duration if attempts else 0.0
    seconds = {name: sum(attempt.seconds[name] for attempt in attempts) for name in CATEGORIES if name != "down"}
    down = max(wall - sum(attempt.duration for attempt in attempts), 0.0)
    return Goodput(attempts=attempts, seconds=seconds | {"down": down}, wall=wall)


class _Raw:
    """What the events of one attempt say, before it is compared with the others."""

    def __init__(self, name: str, events: Sequence[Mapping[str, Any]]):
        self.name, self.events = name, events
        self.begin = next((event for event in events if event["event"] == "begin"), {})
        first = number(events[0]["time"]) or 0.0
        process_started = number(self.begin.get("process_started"))
        is_sound = process_started is not None and 0 <= first - process_started <= _LONGEST_START
        self.started = process_started if is_sound else first
        self.last_seen = max(number(event["time"]) or 0.0 for event in events)
        readies = [
            step for event in events if event["event"] == "ready" and (step := whole(event.get("step"))) is not None
        ]
        self.ready = readies[0] if readies else None
        self.spent = self._spent()
        self.accounted = sum(self.spent[-1].by.values()) if self.spent else 0.0
        self.longest = max(self.last_seen - self.started, self.accounted)

    def _spent(self) -> list[Spent]:
        """In order; what was cumulative stays so, also where a damaged line says otherwise."""
        found: list[Spent] = []
        by, step, at = dict.fromkeys(SPENT, 0.0), None, 0.0
        for event in self.events:
            seconds = event.get("seconds")
            if event["event"] != "spent" or not isinstance(seconds, Mapping):
                continue
            by = {name: max(by[name], number(seconds.get(name)) or 0.0) for name in SPENT}
            reached = whole(event.get("step"))
            step = reached if step is None else max(step, step if reached is None else reached)
            at = max(at, (number(event["time"]) or 0.0) - self.started, sum(by.values()))
            found.append(Spent(at, step, by))
        return found


def _attempt(raw: _Raw, offset: float, duration: float, restart: int | None, *, is_last: bool) -> Attempt:
    """restart: the earliest step that a later attempt continued after; None when there was none."""
    by = raw.spent[-1].by if raw.spent else dict.fromkeys(SPENT, 0.0)
    last_step = raw.spent[-1].step if raw.spent else None
    ends = [event for event in raw.events if event["event"] == "end"]
    # A watchdog names the step that did not end, not the last one that did.
    told = [end for end in ends if end.get("reason") != "watchdog"]
    reached = [step for end in told if (step := whole(end.get("step"))) is not None]
    last_step = max([step for step in (last_step, raw.ready, *reached) if step is not None], default=None)
    kept = _step_seconds_at(raw, by["step"], restart)
    lost_steps = 0
    if restart is not None and last_step is not None:
        lost_steps = max(last_step - max(restart, raw.ready or 0), 0)
    seconds = dict(by) | {"step": kept, "lost": by["step"] - kept, "other": max(duration - raw.accounted, 0.0)}
    if raw.ready is None:
        seconds["init"], seconds["other"] = seconds["init"] + seconds["other"], 0.0
    return Attempt(
        id=raw.name, begin=raw.begin, started=raw.started, last_seen=raw.last_seen, offset=offset, duration=duration,
        ready=raw.ready, last_step=last_step, lost_steps=lost_steps, kept_step_seconds=kept, seconds=seconds,
        spent=raw.spent, ends=ends, is_last=is_last,
    )  # fmt: skip


def _step_seconds_at(raw: _Raw, total: float, restart: int | None) -> float:
    """Seconds of `step` that had been spent when step `restart` was done; all of them without a restart."""
    if restart is None:
        return total
    first = raw.ready or 0
    marks = [(first, 0.0)]
    marks += [(max(spent.step, first), spent.by["step"]) for spent in raw.spent if spent.step is not None]
    if restart >= marks[-1][0]:
        return total
    # Of several marks at one step the last one counts: time after it went into that step's saving and evaluation.
    right = bisect.bisect_right(marks, restart, key=lambda mark: mark[0])
    if right == 0:
        return 0.0
    (step, seconds), (next_step, next_seconds) = marks[right - 1], marks[right]
    share = (restart - step) / (next_step - step)
    return min(max(seconds + share * (next_seconds - seconds), 0.0), total)


def over_time(goodput: Goodput, bins: int) -> dict[str, np.ndarray]:
    """Seconds by category in each of `bins` equal stretches of the run's time line: float64 [bins] each."""
    edges = np.linspace(0.0, goodput.wall, bins + 1)
    result = {name: np.zeros(bins) for name in CATEGORIES}
    for attempt in goodput.attempts:
        inside = np.clip(edges - attempt.offset, 0.0, attempt.duration)
        times = np.array([0.0, *(min(spent.seconds, attempt.duration) for spent in attempt.spent), attempt.duration])
        known = np.zeros(bins + 1)
        for name in SPENT:
            last = attempt.spent[-1].by[name] if attempt.spent else 0.0
            values = np.interp(inside, times, [0.0, *(spent.by[name] for spent in attempt.spent), last])
            known += values
            if name == "step":
                result["lost"] += np.diff(np.maximum(values - attempt.kept_step_seconds, 0.0))
                values = np.minimum(values, attempt.kept_step_seconds)
            result[name] += np.diff(values)
        rest = np.diff(np.maximum.accumulate(np.maximum(inside - known, 0.0)))
        result["init" if attempt.ready is None else "other"] += rest
    taken = sum(result.values())
    result["down"] = np.maximum(np.diff(edges) - taken, 0.0)
    return result
