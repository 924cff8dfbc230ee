"""The watchdog: a process that is stuck writes its stacks, names the process it waited for, and exits with code 75.

A process that is alive but stuck blocks all others forever, and JAX's heartbeat does not notice it. A thread measures
how long the main thread has been in one phase. Past the limit it writes the stacks of all threads, logs the step and
the silent process, and exits. The main thread cannot do this, because it waits inside XLA.

A second thread posts a heartbeat with the phase and the step every few seconds and reads those of the other processes.
It is separate because the posts go through process 0, which may be the stuck one.
"""

import faulthandler
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxcoder.config import WatchdogConfig
from jaxcoder.errors import EXIT_WATCHDOG
from jaxcoder.runtime.process_group import ProcessGroup, ended_error

STEP, DATA = "step", "data"
"""Phases of a step, which watchdog.step_seconds limits together; every other phase has watchdog.start_seconds. But for
a process to answer nothing step_seconds are enough in every phase."""

_LEFT = "left"  # the phase of a process that is done

_TICK = 0.5  # seconds between two looks at the clock
_ASLEEP = 5.0  # the thread itself was not run for so long: the process or the machine was stopped
_GRACE = 5.0  # a main thread that will notice by itself that another process has ended gets so long to do so
_LAST_WORDS = 10.0
_LEAVE = 3.0


class HostWork(NamedTuple):
    """Seconds a step that hosts work between two steps: the slowest process, its own, the median, how many answered."""

    slowest: int
    seconds: float
    median: float
    count: int


class Watchdog:
    """A context manager around the loop, which reports its phases by `enter`.

    stacks: path of the file for this process's stacks at a step. on_end: called with (message, step) before the
    process exits.
    """

    def __init__(
        self,
        group: ProcessGroup,
        limits: WatchdogConfig,
        *,
        stacks: Callable[[int], str],
        on_end: Callable[[str, int], object],
    ):
        self._group, self._limits, self._stacks, self._on_end = group, limits, stacks, on_end
        self._interval = max(2.0, group.count / 32)  # process 0 answers all of them
        self._standing: tuple[str, int, float] = ("start", 0, time.monotonic())
        self._busy = math.nan
        self._beats: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = {}
        self._failed: dict[int, dict[str, Any]] = {}
        self._last_round = time.monotonic()
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def enter(self, phase: str, step: int) -> None:
        """The main thread enters a phase. Costs nothing; `DATA` and `STEP` of one step are measured together."""
        before, before_step, since = self._standing
        is_same = before_step == step and {before, phase} <= {DATA, STEP}
        self._standing = (phase, step, since if is_same else time.monotonic())

    def record_host_work(self, seconds: float) -> None:
        """The host worked so long on a step, waiting for data included and for devices not."""
        self._busy = seconds if math.isnan(self._busy) else 0.9 * self._busy + 0.1 * seconds

    def host_work(self) -> HostWork | None:
        """Of the processes that have answered lately; None in a single process or before there is anything."""
        busy = {index: beat["busy"] for index, beat in self._beats.items() if beat["busy"] is not None}
        if self._group.count == 1 or not busy:
            return None
        slowest = max(busy, key=busy.__getitem__)
        return HostWork(slowest, busy[slowest], statistics.median(busy.values()), len(busy))

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        if self._group.count > 1:
            self._heartbeat = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
            self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._heartbeat is not None:
            self._heartbeat.join(_LEAVE)  # so that nobody waits for its answers

    # --- the two threads ---------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(self._interval if number else 0):
            number += 1
            phase, step, _ = self._standing
            busy = None if math.isnan(self._busy) else self._busy
            beat = {"number": number, "phase": phase, "step": step, "busy": busy}
            try:
                self._group.post(f"beat/{self._group.index}", json.dumps(beat))
                beats = {int(index): json.loads(text) for index, text in self._group.posted("beat").items()}
                self._failed = self._group.failed()
            except Exception:  # process 0 is gone or does not answer; the other thread sees that this one is late
                continue
            now = time.monotonic()
            for index, beat in beats.items():
                if beat != self._beats.get(index):
                    self._changed[index] = now
            self._beats, self._last_round = beats, now
            if self._failed and not self._stop.wait(_GRACE):
                index, end = next(iter(self._failed.items()))
                error = ended_error(self._group.name(index), end)
                self._end(str(error), error.exit_code, with_stacks=False)
        try:
            farewell = json.dumps({"phase": _LEFT, "step": self._standing[1], "busy": None})
            self._group.post(f"beat/{self._group.index}", farewell)
        except Exception:  # process 0 has left before
            pass

    def _watch(self) -> None:
        asleep, last, measured = 0.0, time.monotonic(), 0.0
        woken = last
        while not self._stop.wait(_TICK):
            now = time.monotonic()
            phase, step, since = self._standing
            if since != measured:
                measured, asleep = since, 0.0
            if now - last > _ASLEEP:  # time that nobody had does not count
                asleep += now - last
                woken = now  # the others' answers of that time are still to be read
            last = now
            name = "step_seconds" if phase in (STEP, DATA) else "start_seconds"
            limit = self._limits.step_seconds if phase in (STEP, DATA) else self._limits.start_seconds
            if limit is not None and now - since - asleep > limit:
                self._end(self._sentence(phase, step, limit, name), EXIT_WATCHDOG, with_stacks=True)
            least = self._limits.step_seconds
            if (
                least is not None
                and now - woken > least
                and any(self._quiet(i) > least for i in self.silent_processes())
            ):
                sentence = f"{_place(phase, step)} cannot go on (watchdog.step_seconds {least:g}): "
                self._end(sentence + self._suspect(phase, step), EXIT_WATCHDOG, with_stacks=True)

    def _sentence(self, phase: str, step: int, limit: float, name: str) -> str:
        at = _place(phase, step)
        return f"{at} has taken longer than {limit:g} seconds (watchdog.{name}): {self._suspect(phase, step)}"

    def _suspect(self, phase: str, step: int) -> str:
        if self._group.count == 1:
            return "this process is stuck."
        for index, end in self._failed.items():
            return f"{self._group.name(index)} has ended ({end['message']})."
        silent = self.silent_processes()
        if silent:
            names = " and ".join(f"{self._group.name(index)}" for index in silent[:4])
            more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
            return f"{names}{more} has not answered for {self._quiet(silent[0]):.0f} seconds."
        behind = [index for index, beat in sorted(self._beats.items()) if beat["step"] < step]
        waiting = [index for index, beat in sorted(self._beats.items()) if beat["phase"] == DATA]
        for indices, what in ((behind, "is behind, in"), (waiting, "waits for its data in")):
            if indices and indices != list(range(self._group.count)):
                first = self._beats[indices[0]]
                return f"{self._group.name(indices[0])} {what} {first['phase']} of step {first['step']:,}."
        return "all processes answer, and all stand there: the devices or the network between them are stuck."

    def silent_processes(self) -> list[int]:
        """Processes that have posted nothing for a while; process 0 where nothing can be posted."""
        timeout = 2.5 * self._interval + 1
        if time.monotonic() - self._last_round > timeout and self._group.index != 0:
            return [0]
        left = {index for index, beat in self._beats.items() if beat["phase"] == _LEFT}
        others = set(range(self._group.count)) - left - {self._group.index}
        return sorted(index for index in others if self._quiet(index) > timeout)

    def _quiet(self, index: int) -> float:
        """Seconds since a process was last heard of."""
        since = self._changed.get(index, self._last_round)
        return time.monotonic() - (min(since, self._last_round) if index == 0 else since)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self, sentence: str, code: int, *, with_stacks: bool) -> None:
        """Does not return."""
        silent = self.silent_processes()
        step = self._standing[1]
        words = threading.Thread(target=self._last_words, args=(sentence, step, with_stacks), daemon=True)
        words.start()
        words.join(_LAST_WORDS)  # a file system may be what hangs
        if 0 not in silent:  # it keeps the board
            farewell = threading.Thread(
                target=self._group.say_end, args=(sentence, code), kwargs={"absent": len(silent)}, daemon=True
            )
            farewell.start()
            farewell.join(_LAST_WORDS + 2)
        os._exit(code)

    def _last_words(self, sentence: str, step: int, with_stacks: bool) -> None:
        print(f"\njaxcoder: error: {self._group.name(self._group.index)}: {sentence}", file=sys.stderr, flush=True)
        if with_stacks:
            try:
                path = self._stacks(step)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w", encoding="utf-8") as file:
                    print(sentence, file=file, flush=True)
                    faulthandler.dump_traceback(file)
                print(f"jaxcoder: its stacks are in {path}", file=sys.stderr, flush=True)
            except OSError:
                faulthandler.dump_traceback()
        self._on_end(sentence, step)


def _place(phase: str, step: int) -> str:
    return {
        STEP: f"step {step:,}", DATA: f"step {step:,}, which waits for its batch,",
        "save": f"the save of step {step:,}", "evaluate": f"the evaluation of step {step:,}",
        "start": f"the start, before step {step + 1:,},",
    }.get(phase, f"{phase} at step {step:,}")  # fmt: skip
