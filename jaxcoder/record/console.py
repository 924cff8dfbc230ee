"""Messages and progress on the console.

The package logs to `logging.getLogger("jaxcoder")` and its children and configures nothing, like any library. The
command line calls `configure_logging`, which prints to stderr; stdout is for results.

A record logged with `extra=PROGRESS` replaces the one before it. On a terminal it is drawn in place (rich), below the
other messages; elsewhere it is printed every few seconds.
"""

import logging
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, TextIO

from jaxcoder.formatting import format_amount, format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.live import Live

PROGRESS = {"is_progress": True}
PLAIN_INTERVAL = 10.0  # seconds between two lines of progress in a log file
LIVE_INTERVAL = 0.1  # seconds between two redraws on a terminal

logger = logging.getLogger(__name__)


def configure_logging(level: str = "info", quiet: bool = False) -> None:
    """Prints the package's log from `level` on to stderr. quiet: warnings and errors only, and no progress."""
    package = logging.getLogger("jaxcoder")
    clear_live_line()
    for handler in _console_handlers():
        package.removeHandler(handler)
    package.addHandler(ConsoleHandler())
    package.setLevel(logging.WARNING if quiet else level.upper())
    package.propagate = False


def clear_live_line() -> None:
    """Removes the progress line from the terminal and shows the cursor again."""
    for handler in _console_handlers():
        handler.clear()


def _console_handlers() -> "list[ConsoleHandler]":
    return [handler for handler in logging.getLogger("jaxcoder").handlers if isinstance(handler, ConsoleHandler)]


class ConsoleHandler(logging.Handler):
    """Prints messages above one line of progress. Warnings get the prefix "jaxcoder: warning: "."""

    def __init__(self, stream: TextIO | None = None, interval: float = PLAIN_INTERVAL):
        """stream: default the current `sys.stderr`. interval: seconds between progress lines if it is no terminal."""
        super().__init__()
        self._stream, self._interval = stream, interval
        self._next = 0.0
        self._live: Live | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"jaxcoder: {record.levelname.lower()}: {text}"
            if getattr(record, "is_progress", False):
                self._show_progress(text)
            else:
                self._print(text)
        except Exception:
            self.handleError(record)

    def _show_progress(self, text: str) -> None:
        if time.monotonic() < self._next:
            return
        stream = self._stream or sys.stderr
        is_terminal = stream.isatty()
        self._next = time.monotonic() + (LIVE_INTERVAL if is_terminal else self._interval)
        if not is_terminal:
            self._print(text)
            return
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            self._live = Live(console=Console(file=stream), auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream or sys.stderr, flush=True)

    def clear(self) -> None:
        """Removes the line of progress; the next one is shown at once."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._next = 0.0


class ConsoleProgress:
    """`protocols.Progress` as log records: "Encoding  34%  1,204 of 3,541 files  2:10 left  lib/ast.py"."""

    def __init__(self) -> None:
        self._what, self._unit, self._note = "", "", ""
        self._total: float | None = None
        self._done, self._started, self._next = 0.0, 0.0, 0.0

    def start(self, what: str, total: float | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._started, self._next = 0.0, time.monotonic(), 0.0
        self.advance(0)

    def advance(self, amount: float, note: str = "") -> None:
        self._done += amount
        self._note = note
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LIVE_INTERVAL
            logger.info(self._text(), extra=PROGRESS)

    def finish(self, summary: str = "") -> None:
        self.close()
        took = format_duration(time.monotonic() - self._started)
        logger.info(f"{self._what}: {summary or self._amount()} ({took})")

    def close(self) -> None:
        """Removes an unfinished line from the terminal; call it in `finally`."""
        clear_live_line()

    def _amount(self) -> str:
        if self._total is None:
            return format_amount(self._done, self._unit)
        done = format_bytes(self._done) if self._unit == "bytes" else f"{self._done:,.0f}"
        return f"{done} of {format_amount(self._total, self._unit)}"

    def _text(self) -> str:
        parts = [self._what]
        if self._total:
            elapsed, share = time.monotonic() - self._started, min(self._done / self._total, 1.0)
            parts += [f"{100 * share:3.0f}%", self._amount()]
            if 0 < share < 1 and elapsed > 2:
                parts.append(f"{format_duration(elapsed * (1 - share) / share)} left")
        else:
            parts.append(self._amount())
        return "  ".join([*parts, self._note] if self._note else parts)


class TrainingProgress:
    """The progress of a training run: step, loss, bits per byte, tokens per second, time left.

    The time left comes from the last `window` updates, so that compilation and a slow start do not distort it.
    """

    def __init__(self, num_steps: int, window: int = 50):
        self._num_steps = num_steps
        self._marks: deque[tuple[float, int]] = deque(maxlen=window)

    def update(
        self,
        *,
        step: int,
        loss: float,
        bits_per_byte: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """Logs the newest metrics, those of the last step as an ordinary message that stays on the screen."""
        self._marks.append((time.monotonic(), step))
        parts = [f"step {step:>{len(f'{self._num_steps:,}')},}/{self._num_steps:,}", f"loss {loss:.3f}"]
        if bits_per_byte is not None:
            parts.append(f"{bits_per_byte:.3f} bits/byte")
        if tokens_per_second is not None:
            parts.append(f"{format_count(tokens_per_second)} tokens/s")
        if mfu is not None:
            parts.append(f"{mfu:.1%} MFU")
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{format_duration(left)} left")
        is_last = step == self._num_steps
        if is_last:
            clear_live_line()
        logger.info("  ".join(parts), extra=None if is_last else PROGRESS)

    def seconds_left(self) -> float | None:
        """From the speed of the last updates; None before there are two."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (end - start) / (last - first) * (self._num_steps - last) if last > first else None
