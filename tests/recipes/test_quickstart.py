"""The quickstart as a user runs it: a process of its own, interrupted and continued."""

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
from jaxcoder.recipes.quickstart import Paths, check_claim, claim, quickstart

PACKAGES = ("json", "email", "xml", "logging", "unittest", "importlib", "collections", "http", "html", "wsgiref")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small tree of real code, ten packages."""
    root = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, root / package)
    return root


def command(source: Path, output: Path, *extra: str) -> list[str]:
    steps = [] if "--steps" in extra else ["--steps", "6"]
    base = [
        sys.executable,
        "-m",
        "jaxcoder.cli.main",
        "quickstart",
        "--source",
        str(source),
        "--output-dir",
        str(output),
    ]
    return [*base, *steps, *extra]


def environment() -> dict[str, str]:
    """One CPU device, as a laptop has."""
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )


def weights(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("quickstart") / "run"
    finished = run(source, output)
    assert finished.returncode == 0, finished.stdout
    return output, finished.stdout


def test_the_whole_road(undisturbed):
    output, said = undisturbed
    report = json.loads((output / "report.json").read_text())
    held_out = report["held_out"]
    assert 0 < held_out["eval/loss"] < 9 and 1 < held_out["xz_bits_per_byte"] < 4
    assert held_out["eval/bits_per_byte"] == pytest.approx(held_out["eval/loss"] / np.log(2) / 2.8, rel=0.5)
    assert 0 <= report["infill"]["edit_similarity"] <= 1 and report["infill"]["count"] == 64
    assert len(report["completions"]) == len(report["infills"]) == 2
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    for piece in (
        "mesh of data 1 x fsdp 1 x tensor 1",
        "bits per byte",
        "xz -9e",
        "edit similarity",
        "complete",
        "inspect",
    ):
        assert piece in said, piece
    for path in (output, output / "hf"):
        _, config, tokenizer = load_model(path)
        assert config.vocab_size == tokenizer.vocab_size == 4096


def test_run_again_shows_the_same(undisturbed, source):
    output, said = undisturbed
    again = run(source, output)
    assert again.returncode == 0, again.stdout
    assert again.stdout.split("what it learned")[1] == said.split("what it learned")[1]


def test_interrupted_while_training_it_goes_on(undisturbed, source, tmp_path):
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
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "quickstart --source" in said.split("stopped after step")[1]
    assert run(source, tmp_path / "run").returncode == 0
    expected, got = weights(undisturbed[0] / "hf"), weights(tmp_path / "run" / "hf")
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_another_quickstart_in_the_directory_is_refused(undisturbed, source, tmp_path):
    refused = run(source, undisturbed[0], "--steps", "7")
    assert refused.returncode == 2 and "Traceback" not in refused.stdout
    assert f"with other arguments (--source {source}, --steps 6)" in refused.stdout
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds something else" in run(source, tmp_path).stdout


def test_a_misspelt_source_does_not_claim_the_directory(source, tmp_path):
    paths = Paths(root=tmp_path / "run")
    with pytest.raises(DataError, match="does not exist: check the spelling"):
        quickstart(paths.root, source=source / "jsn", num_steps=2, progress=SILENT)
    settings = {"source": str(source), "num_steps": 3}
    check_claim(paths, settings)
    claim(paths, settings)
    (paths.root / "corpus").mkdir()
    check_claim(paths, settings)
    with pytest.raises(ConfigError, match=re.escape(f"(--source {source}, --steps 3)")):
        check_claim(paths, settings | {"num_steps": 4})


@pytest.mark.slow
def test_ten_random_kills(undisturbed, source, tmp_path):
    """SIGKILL at any moment of any stage, ten times; then the same weights as undisturbed."""
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
            shutil.rmtree(output)  # It was faster than the kill: start over.
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    final = run(source, output)
    assert final.returncode == 0, final.stdout
    expected, got = weights(undisturbed[0] / "hf"), weights(output / "hf")
    assert all(np.array_equal(got[name], expected[name]) for name in expected)
    held_out = [json.loads((path / "report.json").read_text())["held_out"] for path in (undisturbed[0], output)]
    assert held_out[0] == held_out[1]
