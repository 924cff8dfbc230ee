"""What a step's line says: times, rates and MFU by hand, memory; peaks by device name; and a profile of chosen
steps."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.config import DataConfig, RunConfig
from jaxcoder.errors import ConfigError
from jaxcoder.models.flops import training_flops_per_token
from jaxcoder.record.console import TrainingProgress
from jaxcoder.record.metrics import read_metrics
from jaxcoder.train import step_log
from jaxcoder.train.devices import Chip, find_chip
from jaxcoder.train.loop import train
from jaxcoder.train.profile import ProfileSteps
from jaxcoder.train.step_log import StepLog


class Records:
    def __init__(self):
        self.lines = []

    def write(self, step, metrics):
        self.lines.append((step, dict(metrics)))

    def close(self): ...


def test_rates_and_mfu(monkeypatch):
    # Of each fetch: when it was asked for, when it was there, and the end of the step.
    clock, told = iter([9.75, 10.0, 10.0, 10.25, 10.5, 10.5, 10.75, 12.5, 12.5]), []
    monkeypatch.setattr(step_log, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(step_log, "find_chip", lambda kind: Chip(name="toy", peak_flops=1e9))
    monkeypatch.setattr(step_log.jax, "device_count", lambda: 4)
    run, records = smoke(), Records()

    class Line:
        def update(self, **numbers):
            self.numbers = numbers

    line = Line()
    log = StepLog(run, records, line, lambda step, metrics: told.append(step))

    def record(step):
        scalars = {"loss": 3.0, "tokens": 500.0, "grad_norm": 1.0, "skipped": 0, "skipped_steps": 0}
        metrics = {name: jnp.asarray(value) for name, value in scalars.items()}
        log.record(step, metrics, samples=8 * step, batch_size=8, text_bytes=1000, data_wait=0.25, counts={})

    record(1)
    assert records.lines == []  # one step late
    record(2)
    record(3)
    assert told == [1, 2] and log.blocked == 0.5
    (_, first), (_, second) = records.lines
    assert "step_time" not in first and "mfu" not in first  # there was no step before it
    assert second["step_time"] == 0.5 and second["tokens_per_second"] == 1000.0
    assert second["bits_per_byte"] == pytest.approx(3.0 * 500 / 0.6931472 / 1000)
    flops = training_flops_per_token(run.model, 64) * 8 * 64 / 0.5 / 4
    assert second["flops_per_second_per_device"] == pytest.approx(flops) and second["mfu"] == pytest.approx(flops / 1e9)
    assert second["data_wait"] == 0.25 and second["samples"] == 16 and second["host_memory"] > 1e7
    assert line.numbers["mfu"] == second["mfu"]
    log.pause()
    log.flush()
    assert "step_time" not in records.lines[2][1]  # a save came between


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "TPU v4"), ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"), ("TPU7x", "TPU7x"), ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"), ("cpu", None), ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_peaks_by_device_name(kind, name):
    chip = find_chip(kind)
    assert (chip.name if chip else None) == name


def test_mfu_is_shown(caplog):
    caplog.set_level("INFO", "jaxcoder")
    TrainingProgress(10).update(step=1, loss=3.0, tokens_per_second=1000.0, mfu=0.4567)
    assert "1,000 tokens/s  45.7% MFU" in caplog.text


def synthetic(output_dir, **changes) -> RunConfig:
    return dataclasses.replace(smoke(), output_dir=str(output_dir), data=DataConfig(store="synthetic"), **changes)


def test_profile_of_some_steps(tmp_path, caplog):
    caplog.set_level("INFO", "jaxcoder")
    run = synthetic(tmp_path / "run", num_steps=6)
    train(run, profile_steps=ProfileSteps.parse("3:4"))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert f"Profile of steps 3 to 4: {tmp_path}/run/profile" in caplog.text
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 7))


@pytest.mark.parametrize("text", ["", "x", "4:3", "0:3", "1:2:3", "-1", "3:"])
def test_profile_steps_are_checked(text):
    with pytest.raises(ConfigError, match="--profile-steps is .*10:13"):
        ProfileSteps.parse(text)


def test_profile_steps():
    assert ProfileSteps.parse("10:13") == ProfileSteps(first=10, last=13)
    assert ProfileSteps.parse("10") == ProfileSteps(first=10, last=10)


def test_steps_that_never_come_are_refused(tmp_path):
    run = synthetic(tmp_path / "run")
    with pytest.raises(ConfigError, match="--profile-steps starts at step 21, but the run has 20"):
        train(run, profile_steps=ProfileSteps.parse("21:22"))
    assert not (tmp_path / "run").exists()
