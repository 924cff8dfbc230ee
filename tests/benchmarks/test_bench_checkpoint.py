"""`jaxcoder bench checkpoint` at a tiny size."""

import json

import pytest

from jaxcoder.benchmarks.checkpoint import plain_write
from jaxcoder.cli.main import main

COMMAND = ["bench", "checkpoint", "--config", "smoke", "--runs", "1"]


def figures(command, output):
    assert main([*command, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_a_save(tmp_path):
    (saving,) = figures([*COMMAND, "--no-restart", "--directory", str(tmp_path)], tmp_path / "figures.json")
    plain, save = saving["rows"]
    assert 0 < save["blocked"] <= save["total"] and plain["total"] > 0 and save["peak"] > 1
    assert list(tmp_path.iterdir()) == [tmp_path / "figures.json"]


@pytest.mark.slow
def test_starting_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    _, starting = figures([*COMMAND, "--seq-len", "32"], tmp_path / "figures.json")
    assert len(starting["rows"]) == 3 and all(row["seconds"] > 0 for row in starting["rows"])


def test_a_plain_write_leaves_nothing(tmp_path):
    assert plain_write(tmp_path / "file", 40 << 20) > 0 and not list(tmp_path.iterdir())
