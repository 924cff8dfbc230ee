"""SIGTERM and Ctrl-C: a stop after a completed step, the same one in all processes of a run."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from jaxcoder.errors import EXIT_CTRL_C, EXIT_SIGTERM
from jaxcoder.runtime.process_group import ProcessGroup


class GracefulStop:
    """SIGTERM or Ctrl-C asks for a stop that the work polls for; a second Ctrl-C stops at once.

        with GracefulStop() as stop:
            for step in ...:
                ...
                if stop.requested is not None:
                    save(); raise Interrupted(..., exit_code=stop.exit_code)

    Only the main thread can take signals: elsewhere `requested` stays None and nothing is installed. The handlers found
    are put back at the end.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, notice: str = "finishing this step and saving; Ctrl-C again stops at once"):
        self.notice = notice
        self.requested: int | None = None
        """Number of the first signal that came, or None."""
        self._previous: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after Ctrl-C, 0 without a request."""
        return {None: 0, signal.SIGTERM: EXIT_SIGTERM, signal.SIGINT: EXIT_CTRL_C}[self.requested]

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # os.write and not print: a handler may interrupt a print that holds the stream's lock.
        with contextlib.suppress(OSError):
            os.write(2, f"\njaxcoder: {name}: {self.notice}\n".encode())


@contextlib.contextmanager
def on_signal(number: int, call: Callable[[], object]) -> Iterator[None]:
    """Inside the block the signal calls `call`, between two instructions of the main thread; elsewhere nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if previous is None else previous)


class CoordinatedStop:
    """A stop that all processes of a run make after the same step, whichever of them was asked, and when.

    The one that is asked tells the others, through JAX's coordination service, a step that none of them can have begun:
    a process waits for the metrics of a step, which all compute together, before it begins the step after the next.
    """

    LEAD = 3
    _KEY = "stop/after_step"

    def __init__(self, stop: GracefulStop, group: ProcessGroup):
        self._stop, self._group = stop, group
        self._after: int | None = None

    @property
    def exit_code(self) -> int:
        """Of this process's own signal; 143 where another process was asked."""
        return self._stop.exit_code or EXIT_SIGTERM

    def is_due(self, step: int) -> bool:
        """Whether to stop after `step`; asked after every step, in every process."""
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
    """SIGTERM outside a `GracefulStop`; treated like Ctrl-C by everything that cleans up after Ctrl-C."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM inside the block raises `Terminated`, so that files are closed and temporary ones removed.

    Neither it nor Ctrl-C is lost: Python drops an exception that a handler raises inside a callback that cannot fail
    (JAX has one on every garbage collection), and the signal is then sent once more.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            previous_hook(unraisable)
            return
        number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))  # by then the callback is over
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
