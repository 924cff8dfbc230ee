"""SIGTERM, SIGHUP and Ctrl-C: a stop after a complete step, the same in all processes of a run."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from jaxcoder.errors import EXIT_CTRL_C, EXIT_SIGHUP, EXIT_SIGTERM
from jaxcoder.runtime.process_group import ProcessGroup

STOP_SIGNALS = {
    signal.SIGINT: ("Ctrl-C", EXIT_CTRL_C),
    signal.SIGTERM: ("SIGTERM", EXIT_SIGTERM),
    signal.SIGHUP: ("SIGHUP", EXIT_SIGHUP),  # the terminal was closed
}
"""Signal -> (name, exit code)."""


def stop_signals() -> list[signal.Signals]:
    """The signals to handle: without SIGHUP under `nohup`, which ignores it."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and ignores_hangup)]


def exit_on_ctrl_c() -> None:
    """Makes Ctrl-C exit at once, without a traceback: for a program that has not started its work."""

    def stop(*_: object) -> None:
        os.write(2, b"\njaxcoder: stopped by Ctrl-C.\n")
        os._exit(EXIT_CTRL_C)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


class GracefulStop:
    """A signal of STOP_SIGNALS requests a stop, for which the loop polls; a second Ctrl-C raises KeyboardInterrupt.

        with GracefulStop() as stop:
            for step in ...:
                ...
                if stop.requested is not None:
                    save(); raise Interrupted(..., exit_code=stop.exit_code)

    Only the main thread can handle signals: elsewhere no handler is installed and `requested` stays None. The previous
    handlers are restored at the end.
    """

    def __init__(self, notice: str = "finishing this step and saving; Ctrl-C again stops at once"):
        self.notice = notice
        self.requested: int | None = None
        """The first signal, or None."""
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 129 after SIGHUP, 130 after Ctrl-C, 0 without a request."""
        return 0 if self.requested is None else STOP_SIGNALS[signal.Signals(self.requested)][1]

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in stop_signals()}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler is not a Python one and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = number
        name, _ = STOP_SIGNALS[signal.Signals(number)]
        # os.write, because the handler may interrupt a print that has the lock of the stream.
        with contextlib.suppress(OSError):
            os.write(2, f"\njaxcoder: {name}: {self.notice}\n".encode())


@contextlib.contextmanager
def on_signal(number: int, call: Callable[[], object]) -> Iterator[None]:
    """Inside the block the signal calls `call` in the main thread. Has no effect in other threads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if previous is None else previous)


Poll = Callable[[], None]


class StopRequested(Exception):
    """Ends work between two steps after a stop was requested."""


class CoordinatedStop:
    """A stop of all processes of a run after the same step, whichever of them received the signal.

    The process with the signal posts a step that none of them can have started: a process waits for the metrics of a
    step, which all compute together, before it starts the step after the next.
    """

    LEAD = 3  # steps
    _KEY = "stop/after_step"

    def __init__(self, stop: GracefulStop, group: ProcessGroup):
        self._stop, self._group = stop, group
        self._after: int | None = None
        self.interrupted_work = False
        """Whether a function of `during` has raised StopRequested."""

    @property
    def exit_code(self) -> int:
        """Of this process's signal; 143 if another process received it."""
        return self._stop.exit_code or EXIT_SIGTERM

    def during(self, work: str) -> "Poll":
        """For long work between two steps: a function to call between its batches, equally often in every process.

        Once a stop was requested it raises StopRequested, in all processes at the same call; `is_due` is then true.
        """
        calls = itertools.count(1)

        def poll() -> None:
            number = next(calls)
            if self._group.count == 1:
                is_requested = self._stop.requested is not None
            else:
                if self._stop.requested is not None:
                    self._group.post_first(f"stop/{work}", str(number + self.LEAD))
                after = self._group.read(f"stop/{work}")
                is_requested = after is not None and number >= int(after)
            if is_requested:
                self._after, self.interrupted_work = 0, True
                raise StopRequested

        return poll

    def is_due(self, step: int) -> bool:
        """Whether to stop after `step`. Call it after every step in every process."""
        if self._group.count == 1:
            return self._stop.requested is not None
        if self._after is None and self._stop.requested is not None:
            self._group.post_first(self._KEY, str(step + self.LEAD))
        if self._after is None:
            after = self._group.read(self._KEY)
            if after is None:
                return False
            self._after = int(after)
        return step >= self._after


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP outside a `GracefulStop`; handled like Ctrl-C by all code that cleans up after Ctrl-C."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__()
        self.number = number


def signal_of(error: KeyboardInterrupt) -> tuple[str, int]:
    """(name, exit code) of the signal that raised `error`."""
    return STOP_SIGNALS[signal.Signals(error.number if isinstance(error, Terminated) else signal.SIGINT)]


@contextlib.contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise `Terminated` and Ctrl-C KeyboardInterrupt, so that files are closed and
    temporary ones removed.

    A signal is sent again where an exception would be lost or do harm: Python drops an exception that a handler raises
    inside certain callbacks (JAX has one on every garbage collection), and inside an import it can abort the process in
    C++ code.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            send_again(number, after=0.1)
        else:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    def send_again(number: int, after: float) -> None:
        again = threading.Timer(after, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if isinstance(error, KeyboardInterrupt):
            send_again(error.number if isinstance(error, Terminated) else signal.SIGINT, after=0.05)
        else:
            previous_hook(unraisable)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in stop_signals() if signal.getsignal(number) != signal.SIG_IGN]
    previous, previous_hook = {number: signal.signal(number, handle) for number in handled}, sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def stop_signals_deferred() -> Iterator[None]:
    """Signals that come inside the block are sent again after it: to start processes without losing track of one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if received:
            os.kill(os.getpid(), received[0])


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
