"""`jaxcoder bench train`, `decode` and `compile` at tiny sizes; PyTorch's rows where torch is installed."""

import json
import sys

import pytest

from jaxcoder.benchmarks.measure import Report, Reports, side_by_side
from jaxcoder.cli.main import main

WITH_TORCH = ["without torch", "with torch"]
COMMANDS = {
    "train": ["train", "--config", "smoke", "--seq-len", "32", "--matmul-size", "64", "--runs", "1"],
    "decode": ["decode", "--config", "smoke", "--prompt-len", "9", "--new-tokens", "5", "--matrix-size", "64"]
    + ["--batch-size", "1", "3", "--runs", "1"],
}


def figures(command, tmp_path, capsys):
    output = tmp_path / "figures.json"
    assert main(["bench", *command, "--output", str(output)]) == 0
    return json.loads(output.read_text()), capsys.readouterr().out


@pytest.fixture(params=WITH_TORCH)
def has_torch(request, monkeypatch):
    if request.param == "with torch":
        pytest.importorskip("transformers", reason="torch is not installed: `pip install 'jaxcoder[bench]'`")
        return True
    monkeypatch.setitem(sys.modules, "torch", None)
    return False


def test_train(has_torch, tmp_path, capsys):
    found, said = figures([*COMMANDS["train"], "--peak-tflops", "0.1"], tmp_path, capsys)
    assert "124,480" not in said and "1 x 32 tokens, float32" in said and "MFU of 0.1 TFLOP/s" in said
    ways = {row["way"]: row for row in found["rows"]}
    assert ways["jaxcoder"]["tokens"] > 0 and ways["matmul, JAX, 64 x 64"]["tflops"] > 0
    assert has_torch == ("matmul, PyTorch, 64 x 64" in ways) == ("PyTorch: left out" not in said)
    if has_torch:
        losses = {row["loss"] for row in found["rows"] if "loss" in row}
        assert ways.keys() >= {"PyTorch, sdpa", "PyTorch, eager"} and len(losses) == 1  # the same work


def test_decode(has_torch, tmp_path, capsys):
    found, said = figures(COMMANDS["decode"], tmp_path, capsys)
    assert ["1 prompt of 9 tokens" in found[0]["title"], "3 prompts of 9 tokens" in found[1]["title"]] == [True, True]
    for report in found:
        ours = report["rows"][0]
        assert ours["way"] == "jaxcoder" and ours["tokens"] > 0 and ours["first"] > 0
        if has_torch:
            assert report["settings"]["prompts with the same answer"] == "100 %"
    assert has_torch == ("PyTorch: left out" not in said)


def test_compile(tmp_path, capsys):
    found, said = figures(["compile", "--config", "smoke", "--devices", "2", "--start", "none"], tmp_path, capsys)
    (row,) = found[0]["rows"]
    assert row["devices"] == 2 and row["compile"] > 0 and 0 < row["state"] < 0.01 and "s to compile" in said


@pytest.mark.slow
def test_start(tmp_path, capsys):
    command = ["compile", "--config", "smoke", "--devices", "1", "--start", "smoke", "--start-seq-len", "32"]
    found, _ = figures(command, tmp_path, capsys)
    ways = [row["way"] for row in found[1]["rows"]]
    assert ways == ["without the cache", "cache, empty", "cache, filled by the run before"]
    assert all(row["seconds"] > 0 for row in found[1]["rows"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["train", "--batch-size", "0"], "--batch-size is 0: give at least 1."),
        (["decode", "--new-tokens", "1"], "--new-tokens is 1: give at least 2."),
        (["compile", "--devices", "0"], "--devices and --runs take numbers of at least 1."),
        (["compile", "--config", "smok", "--devices", "1"], "smok"),
    ],
)
def test_refusals(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_clock_of_choice():
    ticks = iter(range(100))
    assert side_by_side({"a": int}, runs=3, least_seconds=0.0, clock=lambda: float(next(ticks))) == {"a": 1.0}


@pytest.mark.parametrize("met, is_test, code", [(True, True, 0), (False, True, 1), (False, False, 0)])
def test_exit_codes(met, is_test, code):
    report = Report("t", {}, {"way": "way"}, [{"way": "x"}], {"target": met}, {}, is_test=is_test)
    assert report.exit_code == code and Reports([report]).text() == report.text()
