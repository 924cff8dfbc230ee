"""The watchdog: a stuck process writes its stacks, logs the silent process, and exits with code 75.

A process that is alive but stuck blocks all others, and JAX's heartbeat does not detect it. A thread measures how long
the main thread, which may wait inside XLA, has been in one phase. Past the limit it writes the stacks of all threads
and exits.

A second thread posts a heartbeat with phase and step every few seconds and reads those of the other processes. It is
separate because the posts go through process 0, which may be stuck.
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
from dataclasses import dataclass
from typing import Any

from jaxcoder.config import WatchdogConfig
from jaxcoder.errors import EXIT_WATCHDOG
from jaxcoder.runtime.process_group import ProcessGroup, process_ended_error

STEP, DATA = "step", "data"
"""Phases of a step, limited together by watchdog.step_seconds; other phases are limited by watchdog.start_seconds. The
limit for silence of another process is step_seconds in every phase."""

_LEFT = "left"  # the phase of a process that has ended

# Seconds.
HEARTBEAT_INTERVAL = 2.0
_TICK = 0.5  # between two checks
_ASLEEP = 5.0  # without a check: the process or the machine was stopped
_GRACE = 5.0  # for the main thread to detect by itself that another process has ended
_WRITE_TIMEOUT = 10.0
_HEARTBEAT_TIMEOUT = 3.0


@dataclass(frozen=True)
class HostWork:
    """Host time per step of the processes."""

    slowest: int
    """The slowest process."""
    seconds: float
    """Its seconds per step."""
    median: float
    """Median of all processes, in seconds per step."""
    count: int
    """Number of processes that reported."""


class Watchdog:
    """A context manager around the training loop, which reports its phases by `enter`.

    stacks: step -> path of the file for this process's stacks. on_end: called with (message, step) before the process
    exits.
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
        self._interval = max(HEARTBEAT_INTERVAL, group.count / 32)  # process 0 answers all processes
        self._phase: tuple[str, int, float] = ("start", 0, time.monotonic())
        self._host_seconds = math.nan
        self._beats: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = {}
        self._failed: dict[int, dict[str, Any]] = {}
        self._last_read = time.monotonic()
        self._stop = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def enter(self, phase: str, step: int) -> None:
        """The main thread enters a phase. `DATA` and `STEP` of one step are measured together."""
        before, before_step, since = self._phase
        is_same = before_step == step and {before, phase} <= {DATA, STEP}
        self._phase = (phase, step, since if is_same else time.monotonic())

    def record_host_work(self, seconds: float) -> None:
        """seconds: host time of a step, including waits for data, without waits for devices."""
        self._host_seconds = seconds if math.isnan(self._host_seconds) else 0.9 * self._host_seconds + 0.1 * seconds

    def host_work(self) -> HostWork | None:
        """From the latest heartbeats; None in a single process or before the first."""
        busy = {index: beat["busy"] for index, beat in self._beats.items() if beat["busy"] is not None}
        if self._group.count == 1 or not busy:
            return None
        slowest = max(busy, key=busy.__getitem__)
        return HostWork(slowest, busy[slowest], statistics.median(busy.values()), len(busy))

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._check_limits, daemon=True, name="watchdog").start()
        if self._group.count > 1:
            self._heartbeat = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
            self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._heartbeat is not None:
            self._heartbeat.join(_HEARTBEAT_TIMEOUT)  # it posts that this process has left

    # --- the two threads ---------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(self._interval if number else 0):
            number += 1
            phase, step, _ = self._phase
            busy = None if math.isnan(self._host_seconds) else self._host_seconds
            beat = {"number": number, "phase": phase, "step": step, "busy": busy}
            try:
                self._group.post(f"beat/{self._group.index}", json.dumps(beat))
                beats = {int(index): json.loads(text) for index, text in self._group.posted("beat").items()}
                self._failed = self._group.failed()
            except Exception:  # process 0 does not answer, which the other thread detects
                continue
            now = time.monotonic()
            for index, beat in beats.items():
                if beat != self._beats.get(index):
                    self._changed[index] = now
            self._beats, self._last_read = beats, now
            if self._failed and not self._stop.wait(_GRACE):
                index, end = next(iter(self._failed.items()))
                error = process_ended_error(self._group.name(index), end)
                self._end(str(error), error.exit_code, with_stacks=False)
        try:
            last_beat = json.dumps({"phase": _LEFT, "step": self._phase[1], "busy": None})
            self._group.post(f"beat/{self._group.index}", last_beat)
        except Exception:  # process 0 has exited
            pass

    def _check_limits(self) -> None:
        asleep, last, measured = 0.0, time.monotonic(), 0.0
        woken = last
        while not self._stop.wait(_TICK):
            now = time.monotonic()
            phase, step, since = self._phase
            if since != measured:
                measured, asleep = since, 0.0
            if now - last > _ASLEEP:  # time during which the machine was stopped does not count
                asleep += now - last
                woken = now  # heartbeats of that time were not read yet
            last = now
            step_limit, name, limit = self._limits.step_seconds, "start_seconds", self._limits.start_seconds
            if phase in (STEP, DATA):
                name, limit = "step_seconds", step_limit
            if limit is not None and now - since - asleep > limit:
                problem = f"has taken longer than {limit:g} seconds (watchdog.{name})"
            elif (
                step_limit is not None
                and now - woken > step_limit
                and any(self._silent_seconds(index) > step_limit for index in self.silent_processes())
            ):
                problem = f"is blocked (watchdog.step_seconds {step_limit:g})"
            else:
                continue
            message = f"{_activity(phase, step)} {problem}: {self._suspect(phase, step)}"
            self._end(message, EXIT_WATCHDOG, with_stacks=True)

    def _suspect(self, phase: str, step: int) -> str:
        if self._group.count == 1:
            return "this process is stuck."
        for index, end in self._failed.items():
            return f"{self._group.name(index)} has ended ({end['message']})."
        silent = self.silent_processes()
        if silent:
            names = " and ".join(self._group.name(index) for index in silent[:4])
            more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
            return f"{names}{more} has not answered for {self._silent_seconds(silent[0]):.0f} seconds."
        behind = [index for index, beat in sorted(self._beats.items()) if beat["step"] < step]
        waiting = [index for index, beat in sorted(self._beats.items()) if beat["phase"] == DATA]
        for indices, what in ((behind, "is behind, in"), (waiting, "waits for its data in")):
            if indices and indices != list(range(self._group.count)):
                first = self._beats[indices[0]]
                return f"{self._group.name(indices[0])} {what} {first['phase']} of step {first['step']:,}."
        return "all processes answer and are in this step: the devices or the network between them are stuck."

    def silent_processes(self) -> list[int]:
        """Processes without a recent heartbeat; process 0 if the coordination service does not answer."""
        timeout = 2.5 * self._interval + 1
        if time.monotonic() - self._last_read > timeout and self._group.index != 0:
            return [0]
        left = {index for index, beat in self._beats.items() if beat["phase"] == _LEFT}
        others = set(range(self._group.count)) - left - {self._group.index}
        return sorted(index for index in others if self._silent_seconds(index) > timeout)

    def _silent_seconds(self, index: int) -> float:
        """Seconds since the last heartbeat of a process."""
        since = self._changed.get(index, self._last_read)
        return time.monotonic() - (min(since, self._last_read) if index == 0 else since)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self, message: str, code: int, *, with_stacks: bool) -> None:
        """Exits the process."""
        silent = self.silent_processes()
        step = self._phase[1]
        # In threads with a timeout: the file system may hang too.
        writing = threading.Thread(target=self._write_end, args=(message, step, with_stacks), daemon=True)
        writing.start()
        writing.join(_WRITE_TIMEOUT)
        if 0 not in silent:  # posts go through process 0
            posting = threading.Thread(
                target=self._group.post_end, args=(message, code), kwargs={"absent": len(silent)}, daemon=True
            )
            posting.start()
            posting.join(_WRITE_TIMEOUT + 2)
        os._exit(code)

    def _write_end(self, message: str, step: int, with_stacks: bool) -> None:
        print(f"\njaxcoder: error: {self._group.name(self._group.index)}: {message}", file=sys.stderr, flush=True)
        if with_stacks:
            try:
                path = self._stacks(step)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w", encoding="utf-8") as file:
                    print(message, file=file, flush=True)
                    faulthandler.dump_traceback(file)
                print(f"jaxcoder: the stacks are in {path}", file=sys.stderr, flush=True)
            except OSError:
                faulthandler.dump_traceback()
        self._on_end(message, step)


def _activity(phase: str, step: int) -> str:
    return {
        STEP: f"step {step:,}", DATA: f"the wait for the batch of step {step:,}",
        "save": f"the save of step {step:,}", "evaluate": f"the evaluation of step {step:,}",
        "start": f"the start before step {step + 1:,}",
    }.get(phase, f"{phase} at step {step:,}")  # fmt: skip
