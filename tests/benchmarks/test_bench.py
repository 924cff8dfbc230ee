"""`jaxcoder bench`: reports of fim, encode, loader and attention; timing; the options in docs and README."""

import json

import pytest

from jaxcoder.benchmarks.measure import stdlib_sources, time_in_turns
from jaxcoder.cli.bench import BENCHMARKS
from jaxcoder.cli.main import main

SMALL = ["--code-megabytes", "0.4", "--vocab-size", "800", "--runs", "1"]


@pytest.mark.parametrize(
    "arguments, rows",
    [(["fim", "--windows", "3", "--seq-len", "1024", *SMALL], 4), (["encode", "--megabytes", "0.1", *SMALL], 3)],
)
def test_a_benchmark_reports(arguments, rows, tmp_path, capsys):
    output = tmp_path / "figures.json"
    assert main(["bench", *arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert len(figures["rows"]) == rows and all(row["name"] in printed for row in figures["rows"])
    assert all(row["ratio"] > 0 for row in figures["rows"])
    assert figures["environment"].keys() >= {"processor", "cores", "python", "jaxcoder", "tiktoken", "tokenizers"}
    assert all(target in printed for target in figures["targets"])


def test_every_benchmark_has_a_line_in_the_help(capsys):
    assert main(["bench", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed and summary in printed for name, summary in BENCHMARKS.items())


def test_medians_of_runs_in_turn():
    calls = []
    calls_by_name = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = time_in_turns(calls_by_name, runs=3)
    assert set(seconds) == {"a", "b"} and all(value >= 0 for value in seconds.values())
    assert calls[2:] == ["a", "b"] * 3  # after each was called once


def test_real_code():
    texts = stdlib_sources(500_000)
    assert 500_000 <= sum(len(text.encode()) for text in texts) < 3_000_000 and any("def " in text for text in texts)


def test_attention_backends_of_this_machine(tmp_path):
    output = tmp_path / "figures.json"
    options = ["--length", "64", "--kernel", "forward", "--num-heads", "2", "--runs", "1"]
    assert main(["bench", "attention", *options, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert {row["name"] for row in rows} == {"blockwise", "reference"} and all(row["ms"] > 0 for row in rows)
