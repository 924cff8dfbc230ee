"""SIGTERM and Ctrl-C: a stop after a complete step, the same in all processes of a run."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from jaxcoder.errors import EXIT_CTRL_C, EXIT_SIGTERM
from jaxcoder.runtime.process_group import ProcessGroup


class GracefulStop:
    """SIGTERM or Ctrl-C requests a stop, for which the loop polls; a second Ctrl-C raises KeyboardInterrupt.

        with GracefulStop() as stop:
            for step in ...:
                ...
                if stop.requested is not None:
                    save(); raise Interrupted(..., exit_code=stop.exit_code)

    Only the main thread can handle signals: elsewhere no handler is installed and `requested` stays None. The previous
    handlers are restored at the end.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, notice: str = "finishing this step and saving; Ctrl-C again stops at once"):
        self.notice = notice
        self.requested: int | None = None
        """The first signal, or None."""
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after Ctrl-C, 0 without a request."""
        if self.requested is None:
            return 0
        return EXIT_SIGTERM if self.requested == signal.SIGTERM else EXIT_CTRL_C

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
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
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
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
    """SIGTERM outside a `GracefulStop`, handled like Ctrl-C."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM inside the block raises `Terminated`, so that files are closed and temporary ones removed.

    Python drops an exception that a handler raises inside certain callbacks (JAX has one on every garbage collection):
    SIGTERM or Ctrl-C is then sent again.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            previous_hook(unraisable)
            return
        number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))  # after the callback
        again.daemon = True
        again.start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, previous_hook = signal.signal(signal.SIGTERM, handle), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
