"""The limit for a silent process is step_seconds in every phase."""

import json
import sys
import threading

import pytest

from jaxcoder.config import WatchdogConfig
from jaxcoder.runtime import Watchdog, watchdog

LIMITS = WatchdogConfig(step_seconds=1.5, start_seconds=60)


class ProcessGroup:
    """Of process 0; process 1 has answered once."""

    count, index = 2, 0

    def __init__(self, phase: str):
        self.other, self.posts = {"number": 1, "phase": phase, "step": 5, "busy": None}, []

    def name(self, index: int) -> str:
        return f"process {index}"

    def post(self, key: str, text: str) -> None:
        self.posts.append(json.loads(text))

    def posted(self, directory: str) -> dict[str, str]:
        return {"1": json.dumps(self.other)}

    def failed(self) -> dict:
        return {}

    def post_end(self, message: str, exit_code: int, *, absent: int) -> None:
        assert exit_code == 75 and absent == 1


def messages_of(phase: str, monkeypatch, tmp_path, seconds: float) -> list[str]:
    """Messages with which the watchdog of process 0 ends a save within so many seconds."""
    messages, has_ended = [], threading.Event()

    def leave_thread(code: int) -> None:
        has_ended.set()
        sys.exit(code)

    monkeypatch.setattr(watchdog.os, "_exit", leave_thread)
    monkeypatch.setattr(watchdog, "HEARTBEAT_INTERVAL", 0.1)
    group = ProcessGroup(phase)

    def stacks(step: int) -> str:
        return str(tmp_path / "stacks" / f"{step}.txt")

    with Watchdog(group, LIMITS, stacks=stacks, on_end=lambda message, _: messages.append(message)) as dog:
        dog.enter("save", 5)
        has_ended.wait(seconds)
    assert group.posts[-1]["phase"] == "left"
    return messages


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_silence_in_a_save(monkeypatch, tmp_path):
    (message,) = messages_of("save", monkeypatch, tmp_path, 10)
    expected = "the save of step 5 is blocked (watchdog.step_seconds 1.5): process 1 has not answered for"
    assert message.startswith(expected)
    assert (tmp_path / "stacks" / "5.txt").read_text().startswith(expected)


def test_a_process_that_has_left_need_not_answer(monkeypatch, tmp_path):
    assert messages_of("left", monkeypatch, tmp_path, 4) == []
