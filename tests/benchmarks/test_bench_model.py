"""`jaxcoder bench train` and `decode`, and benchmarks/training, at tiny sizes; PyTorch where it is installed."""

import json
import sys

import pytest

from benchmarks import command as laboratory
from benchmarks.training import compile_step
from jaxcoder.benchmarks.measure import Report, Reports, time_in_turns
from jaxcoder.cli.main import main

WITH_TORCH = ["without torch", "with torch"]
COMMANDS = {
    "train": ["train", "--config", "smoke", "--seq-len", "32", "--matmul-size", "64", "--runs", "1"],
    "decode": ["decode", "--config", "smoke", "--prompt-len", "9", "--new-tokens", "5", "--matrix-size", "64"]
    + ["--batch-size", "1", "3", "--runs", "1"],
}


def figures(command, tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = [*command[1:], "--output", str(output)]
    run = (
        laboratory.main(compile_step, arguments) if command[0] == "compile" else main(["bench", command[0], *arguments])
    )
    assert run == 0
    return json.loads(output.read_text()), capsys.readouterr().out


@pytest.fixture(params=WITH_TORCH)
def has_torch(request, monkeypatch):
    if request.param == "with torch":
        pytest.importorskip("transformers", reason="torch is not installed: `pip install '.[bench]'`")
        return True
    monkeypatch.setitem(sys.modules, "torch", None)
    return False


def test_train(has_torch, tmp_path, capsys):
    found, output = figures([*COMMANDS["train"], "--peak-tflops", "0.1"], tmp_path, capsys)
    assert "124,480" not in output and "1 x 32 tokens, float32" in output and "MFU of 0.1 TFLOP/s" in output
    names = {row["name"]: row for row in found["rows"]}
    assert names["jaxcoder"]["tokens"] > 0 and names["matmul, JAX, 64 x 64"]["tflops"] > 0
    assert has_torch == ("matmul, PyTorch, 64 x 64" in names) == ("PyTorch: left out" not in output)
    if has_torch:
        losses = {row["loss"] for row in found["rows"] if "loss" in row}
        assert names.keys() >= {"PyTorch, sdpa", "PyTorch, eager"} and len(losses) == 1  # the same work


def test_decode(has_torch, tmp_path, capsys):
    found, output = figures(COMMANDS["decode"], tmp_path, capsys)
    assert ["1 prompt of 9 tokens" in found[0]["title"], "3 prompts of 9 tokens" in found[1]["title"]] == [True, True]
    for report in found:
        ours = report["rows"][0]
        assert ours["name"] == "jaxcoder" and ours["tokens"] > 0 and ours["first"] > 0
        if has_torch:
            assert report["settings"]["prompts with the same completion"] == "100 %"
    assert has_torch == ("PyTorch: left out" not in output)


def test_compile(tmp_path, capsys):
    found, output = figures(["compile", "--config", "smoke", "--devices", "2", "--start", "none"], tmp_path, capsys)
    (row,) = found[0]["rows"]
    assert row["devices"] == 2 and row["compile"] > 0 and 0 < row["state"] < 0.01 and "s to compile" in output


@pytest.mark.slow
def test_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    command = ["compile", "--config", "smoke", "--devices", "1", "--start", "smoke", "--start-seq-len", "32"]
    found, _ = figures(command, tmp_path, capsys)
    names = [row["name"] for row in found[1]["rows"]]
    assert names == ["without the cache", "empty cache", "cache filled by the previous run"]
    assert all(row["seconds"] > 0 for row in found[1]["rows"])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["train", "--batch-size", "0"], "--batch-size is 0: give at least 1."),
        (["decode", "--new-tokens", "1"], "--new-tokens is 1: give at least 2."),
        (["attention", "--length", "0"], "--length is 0: give at least 1."),
    ],
)
def test_refusals(arguments, expected, capsys):
    assert main(["bench", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_a_clock_of_choice():
    ticks = iter(range(100))
    assert time_in_turns({"a": int}, runs=3, clock=lambda: float(next(ticks))) == {"a": 1.0}


@pytest.mark.parametrize("met, is_test, code", [(True, True, 0), (False, True, 1), (False, False, 0)])
def test_exit_codes(met, is_test, code):
    report = Report(title="t", columns={"name": ""}, rows=[{"name": "x"}], targets={"target": met}, is_test=is_test)
    assert report.exit_code == code and Reports([report]).text() == report.text()
