"""Progress in a log file and on a terminal, and messages."""

import io
import logging

import pytest

from jaxcoder.record import console
from jaxcoder.record.console import PROGRESS, ConsoleHandler, ConsoleProgress, TrainingProgress, configure_logging

logger = logging.getLogger("jaxcoder.test")


class Clock:
    """A fake `time.monotonic`."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def logged_to(stream, level="INFO"):
    """Sends the package's log to `stream`; a fixture of conftest.py undoes it."""
    package = logging.getLogger("jaxcoder")
    package.addHandler(ConsoleHandler(stream))
    package.setLevel(level)
    return stream


def test_progress_in_a_log_file(clock):
    log, progress = logged_to(io.StringIO()), ConsoleProgress()
    progress.start("Encoding", 400, "files")
    for _ in range(40):
        clock.now += 1
        progress.advance(10, "lib/ast.py")
    progress.finish("400 files, 1.2 million tokens")
    assert log.getvalue().splitlines() == [
        "Encoding    0%  0 of 400 files",
        "Encoding   25%  100 of 400 files  30 s left  lib/ast.py",
        "Encoding   50%  200 of 400 files  20 s left  lib/ast.py",
        "Encoding   75%  300 of 400 files  10 s left  lib/ast.py",
        "Encoding  100%  400 of 400 files  lib/ast.py",
        "Encoding: 400 files, 1.2 million tokens (40 s)",
    ]


def test_unknown_totals_and_bytes(clock):
    log, progress = logged_to(io.StringIO()), ConsoleProgress()
    progress.start("Reading", None, "bytes")
    progress.advance(3 << 20)
    progress.finish()
    progress.start("Writing", 2048, "bytes")
    progress.advance(4096)  # more than the total
    progress.finish()
    progress.start("Nothing", 0, "files")
    progress.finish()
    assert "Reading: 3.0 MiB (0.0 s)" in log.getvalue() and "Writing: 4.0 KiB of 2.0 KiB" in log.getvalue()


def test_training_line_in_a_log(clock):
    log, line = logged_to(io.StringIO()), TrainingProgress(1000)
    for step in range(1, 1001):
        clock.now += 0.5
        line.update(step=step, loss=3.21999, bits_per_byte=1.25, tokens_per_second=41_234.5)
        if step == 500:
            logger.info("saved step 500")
    lines = log.getvalue().splitlines()
    assert lines[1] == "step    21/1,000  loss 3.220  1.250 bits/byte  41,234 tokens/s  8:10 left"
    assert lines[-1].startswith("step 1,000/1,000") and "saved step 500" in lines and 50 < len(lines) < 56


def test_time_left_ignores_a_slow_start(clock):
    line = TrainingProgress(100, window=5)
    assert line.seconds_left() is None
    clock.now += 60
    for step in range(1, 11):
        clock.now += 60 if step == 2 else 1
        line.update(step=step, loss=1.0)
    assert line.seconds_left() == pytest.approx(90)


def test_a_resumed_line_counts_its_own_steps(clock):
    line = TrainingProgress(100)
    for step in (91, 92):
        clock.now += 2
        line.update(step=step, loss=float("nan"))
    assert line.seconds_left() == pytest.approx(16)


def test_on_a_terminal_one_line_is_redrawn():
    terminal, line = logged_to(Terminal()), TrainingProgress(3)
    logger.info("compiling", extra=PROGRESS)
    for step in (1, 2, 3):
        line.update(step=step, loss=2.0, bits_per_byte=1.0, tokens_per_second=10)
    logger.info("saved [bold]step[/bold] 3")  # no markup
    shown = terminal.getvalue()
    assert "\x1b[" in shown and "step 3/3" in shown and "saved [bold]step[/bold] 3\n" in shown


def test_progress_on_a_terminal_leaves_its_summary():
    terminal, progress = logged_to(Terminal()), ConsoleProgress()
    progress.start("Encoding", 10, "files")
    progress.advance(10)
    progress.finish("done")
    progress.start("Broken", 10, "files")
    progress.close()
    assert "Encoding: done (" in terminal.getvalue()


def test_levels_of_configure_logging(capsys):
    def printed(**options) -> str:
        configure_logging(**options)
        logger.debug("detail")
        logger.info("message")
        logger.warning("trouble")
        return capsys.readouterr().err

    assert printed() == "message\njaxcoder: warning: trouble\n"
    assert printed(level="debug") == "detail\nmessage\njaxcoder: warning: trouble\n"
    assert printed(quiet=True) == "jaxcoder: warning: trouble\n"


def test_nothing_is_printed_without_configure_logging(capfd):
    logger.warning("trouble")
    TrainingProgress(3).update(step=1, loss=2.0)
    assert capfd.readouterr() == ("", "")
