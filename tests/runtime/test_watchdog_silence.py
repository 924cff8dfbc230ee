"""The limit for a silent process is step_seconds in every phase."""

import json
import threading

from jaxcoder.config import WatchdogConfig
from jaxcoder.runtime import Watchdog

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


def ends(phase: str, monkeypatch, seconds: float) -> list[str]:
    """Messages of the watchdog of process 0 in a save."""
    messages, is_over = [], threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self, message, *_, **__: (messages.append(message), is_over.set()))
    group = ProcessGroup(phase)
    watchdog = Watchdog(group, LIMITS, stacks=str, on_end=lambda *_: None)
    watchdog._interval = 0.1
    with watchdog:
        watchdog.enter("save", 5)
        is_over.wait(seconds)
    assert group.posts[-1]["phase"] == "left"
    return messages


def test_silence_in_a_save(monkeypatch):
    (message, *_) = ends("save", monkeypatch, 10)
    expected = "the save of step 5 is blocked (watchdog.step_seconds 1.5): process 1 has not answered for"
    assert message.startswith(expected)


def test_a_process_that_has_left_need_not_answer(monkeypatch):
    assert ends("left", monkeypatch, 4) == []
