"""What long work looks like in a terminal, and in a log.

On a terminal one live line is redrawn (rich). Elsewhere a plain line is printed every few seconds, so that a log stays
readable and shows that the work is alive. Everything goes to stderr: stdout belongs to results.
"""

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, TextIO

from jaxcoder.formatting import format_amount, format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.live import Live

PLAIN_INTERVAL = 10.0  # seconds between the lines of a log
LIVE_INTERVAL = 0.1  # seconds between two drawings of a live line


_drawn: "set[_Line]" = set()


def clear_live_lines() -> None:
    """Takes every live line off the screen and shows the cursor again: for an end that nobody foresaw."""
    for line in list(_drawn):
        line.clear()


class _Line:
    """One line of text that changes: drawn in place on a terminal, printed now and then elsewhere."""

    def __init__(self, stream: TextIO | None, interval: float):
        self.stream = sys.stderr if stream is None else stream
        self.is_live = self.stream.isatty()
        self._interval = LIVE_INTERVAL if self.is_live else interval
        self._next = 0.0
        self._live: Live | None = None

    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    def show(self, text: str) -> None:
        self._next = time.monotonic() + self._interval
        if not self.is_live:
            self.say(text)
            return
        from rich.text import Text

        if self._live is None:
            self._live = self._start_live()
        self._live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True)

    def _start_live(self) -> "Live":
        from rich.console import Console
        from rich.live import Live

        live = Live(console=Console(file=self.stream), auto_refresh=False, transient=True)
        live.start()
        _drawn.add(self)
        return live

    def say(self, text: str) -> None:
        """A line that stays, above the live one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        """The live line goes away; what was said stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            _drawn.discard(self)
        self._next = 0.0


class ConsoleProgress:
    """`protocols.Progress` for a person: "Encoding  34%  1,204 of 3,541 files  2:10 left  lib/ast.py"."""

    def __init__(self, stream: TextIO | None = None, interval: float = PLAIN_INTERVAL):
        self._line = _Line(stream, interval)
        self._what, self._unit, self._note = "", "", ""
        self._total: float | None = None
        self._done = 0.0
        self._started = 0.0

    def start(self, what: str, total: float | None, unit: str) -> None:
        self._what, self._total, self._unit, self._note = what, total, unit, ""
        self._done, self._started = 0.0, time.monotonic()
        self._line.show(self._text())

    def advance(self, amount: float, note: str = "") -> None:
        self._done += amount
        self._note = note
        if self._line.is_due():
            self._line.show(self._text())

    def finish(self, summary: str = "") -> None:
        self._line.clear()
        took = format_duration(time.monotonic() - self._started)
        self._line.say(f"{self._what}: {summary or self._amount()} ({took})")

    def close(self) -> None:
        """For a `finally`: takes an unfinished live line off the screen."""
        self._line.clear()

    def _amount(self) -> str:
        if self._total is None:
            return format_amount(self._done, self._unit)
        done = format_bytes(self._done) if self._unit == "bytes" else f"{self._done:,.0f}"
        return f"{done} of {format_amount(self._total, self._unit)}"

    def _text(self) -> str:
        parts = [self._what]
        elapsed = time.monotonic() - self._started
        if self._total:
            share = min(self._done / self._total, 1.0)
            parts.append(f"{100 * share:3.0f}%")
            parts.append(self._amount())
            if 0 < share < 1 and elapsed > 2:
                parts.append(f"{format_duration(elapsed * (1 - share) / share)} left")
        else:
            parts.append(self._amount())
        if self._note:
            parts.append(self._note)
        return "  ".join(parts)


class TrainingLine:
    """The live line of a training run: step, loss, bits per byte, tokens per second, time left.

        with TrainingLine(num_steps=1000) as line:
            line.update(step=1, loss=10.8, bits_per_byte=3.4, tokens_per_second=41_000)
            line.say("saved step 100")

    The time left comes from the last `window` updates, so that compiling and a slow start do not spoil it.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        stream: TextIO | None = None,
        interval: float = PLAIN_INTERVAL,
        window: int = 50,
    ):
        self._line = _Line(stream, interval)
        self._num_steps = num_steps
        self._marks: deque[tuple[float, int]] = deque(maxlen=window)

    def __enter__(self) -> "TrainingLine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def update(
        self,
        *,
        step: int,
        loss: float,
        bits_per_byte: float | None = None,
        tokens_per_second: float | None = None,
        mfu: float | None = None,
    ) -> None:
        """The newest numbers; drawn when a drawing is due, and always for the first and the last step."""
        self._marks.append((time.monotonic(), step))
        if self._line.is_due() or step == self._num_steps:
            self._line.show(self._text(step, loss, bits_per_byte, tokens_per_second, mfu))

    def say(self, text: str) -> None:
        """A line that stays, above the live one."""
        self._line.say(text)

    def status(self, text: str) -> None:
        """Replaces the live line until the next update ("compiling", "saving")."""
        self._line.show(text)

    def close(self) -> None:
        self._line.clear()

    def seconds_left(self) -> float | None:
        """By the pace of the last updates; None before there are two."""
        if len(self._marks) < 2:
            return None
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return (end - begin) / (last - first) * (self._num_steps - last) if last > first else None

    def _text(
        self, step: int, loss: float, bits_per_byte: float | None, tokens_per_second: float | None, mfu: float | None
    ) -> str:
        width = len(f"{self._num_steps:,}")
        parts = [f"step {step:>{width},}/{self._num_steps:,}", f"loss {loss:.3f}"]
        if bits_per_byte is not None:
            parts.append(f"{bits_per_byte:.3f} bits/byte")
        if tokens_per_second is not None:
            parts.append(f"{format_count(tokens_per_second)} tokens/s")
        if mfu is not None:
            parts.append(f"{mfu:.1%} MFU")
        left = self.seconds_left()
        parts.append(f"{format_duration(left)} left" if left is not None else "")
        return "  ".join(parts).rstrip()
