"""`jaxcoder quickstart` in a subprocess, interrupted and resumed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from jaxcoder.errors import ConfigError, DataError
from jaxcoder.inference.load import load_model
from jaxcoder.protocols import SILENT
from jaxcoder.recipes.quickstart import Paths, check_directory, quickstart

PACKAGES = ("json", "email", "xml", "logging", "unittest", "importlib", "collections", "http", "html", "wsgiref")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Ten packages of the standard library."""
    root = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, root / package)
    return root


def command(source: Path, output: Path, *extra: str) -> list[str]:
    steps = [] if "--steps" in extra else ["--steps", "6"]
    program = [sys.executable, "-m", "jaxcoder.cli.main", "quickstart"]
    return [*program, "--source", str(source), "--output-dir", str(output), *steps, *extra]


def environment() -> dict[str, str]:
    """One CPU device, as on a laptop."""
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )


def weights(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("quickstart") / "run"
    finished = run(source, output)
    assert finished.returncode == 0, finished.stdout
    return output, finished.stdout


def test_all_stages(uninterrupted):
    output, printed = uninterrupted
    report = json.loads((output / "report.json").read_text())
    held_out = report["held_out"]
    assert 0 < held_out["eval/loss"] < 9 and 1 < held_out["xz_bits_per_byte"] < 4
    assert held_out["eval/bits_per_byte"] == pytest.approx(held_out["eval/loss"] / np.log(2) / 2.8, rel=0.5)
    assert 0 <= report["infill"]["edit_similarity"] <= 1 and report["infill"]["count"] == 64
    assert len(report["completions"]) == len(report["infills"]) == 2
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    messages = (
        "mesh of data 1 x fsdp 1 x tensor 1",
        "bits per byte",
        "xz -9e",
        "edit similarity",
        "complete",
        "inspect",
    )
    for text in messages:
        assert text in printed, text
    for path in (output, output / "hf"):
        _, config, tokenizer = load_model(path)
        assert config.vocab_size == tokenizer.vocab_size == 4096


def test_a_second_call_prints_the_same(uninterrupted, source):
    output, printed = uninterrupted
    again = run(source, output)
    assert again.returncode == 0, again.stdout
    assert again.stdout.split(" results ")[1] == printed.split(" results ")[1]


def test_resumes_after_sigterm_while_training(uninterrupted, source, tmp_path):
    process = subprocess.Popen(
        command(source, tmp_path / "run"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert "quickstart --source" in output.split("stopped after step")[1]
    assert run(source, tmp_path / "run").returncode == 0
    expected, got = weights(uninterrupted[0] / "hf"), weights(tmp_path / "run" / "hf")
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_a_directory_of_other_arguments_or_files_is_an_error(uninterrupted, source, tmp_path):
    failed = run(source, uninterrupted[0], "--steps", "7")
    assert failed.returncode == 2 and "Traceback" not in failed.stdout
    assert f"with other arguments (--source {source}, --steps 6)" in failed.stdout
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds other files" in run(source, tmp_path).stdout


def test_arguments_can_change_after_a_misspelt_source(source, tmp_path):
    paths = Paths(tmp_path / "run")
    with pytest.raises(DataError, match="does not exist: check the spelling"):
        quickstart(paths.root, source=source / "jsn", num_steps=2, progress=SILENT)
    settings = {"source": str(source), "num_steps": 3}
    check_directory(paths, settings)
    paths.settings.write_text(json.dumps(settings))
    (paths.root / "corpus").mkdir()
    check_directory(paths, settings)
    with pytest.raises(ConfigError, match=re.escape(f"(--source {source}, --steps 3)")):
        check_directory(paths, settings | {"num_steps": 4})


@pytest.mark.slow
def test_ten_random_kills(uninterrupted, source, tmp_path):
    """SIGKILL at ten random moments; the final weights equal those of an uninterrupted run."""
    draw, output = random.Random(0), tmp_path / "run"
    started = time.monotonic()
    assert run(source, tmp_path / "timed").returncode == 0
    duration = time.monotonic() - started
    kills = 0
    while kills < 10:
        process = subprocess.Popen(
            command(source, output), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, errors = process.communicate(timeout=draw.uniform(0.5, duration * 0.7))
            assert process.returncode == 0, errors.decode()
            shutil.rmtree(output)  # finished before the kill: start over
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    final = run(source, output)
    assert final.returncode == 0, final.stdout
    expected, got = weights(uninterrupted[0] / "hf"), weights(output / "hf")
    assert all(np.array_equal(got[name], expected[name]) for name in expected)
    held_out = [json.loads((path / "report.json").read_text())["held_out"] for path in (uninterrupted[0], output)]
    assert held_out[0] == held_out[1]
