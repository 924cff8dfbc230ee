"""Signals at any moment of a command: it saves or ends with a message and the right exit code, without a traceback."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

TRAIN = [sys.executable, "-m", "jaxcoder", "train", "smoke", "--data", "synthetic", "--steps", "100000"]


# A shell that starts the tests with `&` ignores SIGINT, which the child would inherit.
WITH_DEFAULTS = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
ENVIRONMENT = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}


def start(command) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WITH_DEFAULTS, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.mark.parametrize("seconds", [0.3, 1.6])
def test_ctrl_c_while_modules_are_imported(tmp_path, seconds):
    process = start([*TRAIN, "--output-dir", str(tmp_path / "run")])
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output and "stopped" in output, output


def test_a_closed_terminal_saves(tmp_path):
    process = start([*TRAIN, "--output-dir", str(tmp_path / "run")])
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 129 and "SIGHUP: finishing this step and saving" in output, output
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    (end,) = [e for line in (tmp_path / "run" / "events.jsonl").open() if (e := json.loads(line))["event"] == "end"]
    assert end["reason"] == "SIGHUP"


def test_tokenizer_training_stops_at_once(tmp_path):
    texts = tmp_path / "texts.jsonl"
    letters = random.Random(0)
    words = ("".join(letters.choices("abcdefghijklmnop", k=9)) for _ in range(900_000))  # many pairs to merge
    texts.write_text(json.dumps({"content": " ".join(words)}) + "\n")
    process = start(
        [
            sys.executable,
            "-m",
            "jaxcoder",
            "tokenizer",
            "train",
            str(texts),
            "--output-dir",
            str(tmp_path / "out"),
            "--vocab-size",
            "49152",
        ]
    )
    time.sleep(5)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGINT)
    since = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - since < 3 and not (tmp_path / "out").exists(), output
