"""What a run tells of itself: events and the account of time over restarts, a profile on a signal, bad batches, hashes."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.config import CheckpointConfig, MeshConfig, RunConfig
from jaxcoder.errors import Interrupted, TrainingError
from jaxcoder.observability.events import read_events
from jaxcoder.observability.metrics import read_metrics
from jaxcoder.train.loop import train


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def config(path, **changes) -> RunConfig:
    run = smoke()
    optimizer = dataclasses.replace(run.optimizer, **changes.pop("optimizer", {}))
    defaults = dict(
        output_dir=str(path / "run"),
        data=dataclasses.replace(run.data, store="synthetic"),
        num_steps=8,
        optimizer=optimizer,
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=3),
    )
    return dataclasses.replace(run, **(defaults | changes))


def test_two_attempts_tell_what_they_did(tmp_path):
    """SIGTERM in the fifth step, then to the end; a profile of the steps after a SIGUSR1."""
    run = config(tmp_path)

    def disturb(step, batch):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with pytest.raises(Interrupted) as stopped:
        train(run, alter_batch=disturb)
    assert stopped.value.exit_code == 143
    stopped_at = [e for e in read_events(f"{run.output_dir}/events.jsonl") if e["event"] == "end"][0]["step"]

    def ask_for_profile(step, batch):
        if step == stopped_at + 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return batch

    before = signal.getsignal(signal.SIGUSR1)
    assert train(run, alter_batch=ask_for_profile).step == 8
    assert signal.getsignal(signal.SIGUSR1) == before
    events = read_events(f"{run.output_dir}/events.jsonl")
    first, second = dict.fromkeys(event["attempt"] for event in events)
    by_kind = {
        attempt: [e["event"] for e in events if e["attempt"] == attempt and e["event"] != "spent"]
        for attempt in (first, second)
    }
    assert by_kind[first][:2] == ["begin", "ready"] and by_kind[first][-1] == "end"
    assert by_kind[second][:2] == ["begin", "ready"] and by_kind[second][-1] == "end"
    assert [e["step"] for e in events if e["event"] == "ready"] == [0, stopped_at]
    assert [(e["step"], e["reason"]) for e in events if e["event"] == "end"] == [(stopped_at, "SIGTERM"), (8, "finished")]
    assert {3, stopped_at, 6, 8} <= {e["step"] for e in events if e["event"] == "saved"} | {6}
    for event in events:
        if event["event"] == "saved":
            assert 0 <= event["blocked"] <= event["seconds"] and event["bytes"] > 1_000_000
    begins = {e["attempt"]: e for e in events if e["event"] == "begin"}
    assert begins[first]["processes"] == 1 and begins[first]["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    for attempt in (first, second):
        last = [e for e in events if e["attempt"] == attempt and e["event"] == "spent"][-1]
        wall = last["time"] - begins[attempt]["process_started"]
        assert 0.5 * wall < sum(last["seconds"].values()) <= wall + 0.1
        assert {"init", "restore", "compile", "step", "data_wait", "save"} <= set(last["seconds"])
    profiles = [e for e in events if e["event"] == "profile"]
    assert len(profiles) <= 1 and (not profiles or os.path.isdir(profiles[0]["directory"]))
    assert profiles or 8 - stopped_at < 3


def test_a_step_with_large_gradients_is_skipped_and_many_end_the_run(tmp_path, capfd):
    run = config(tmp_path, optimizer={"skip_grad_norm_above": 1e-6, "max_skipped_steps": 3})
    message = r"gradient norm was above 1e-06 in 3 steps in a row \(1 to 3\)"
    with pytest.raises(TrainingError, match=message):
        train(run)
    assert "step 1: skipped, its gradient norm" in capfd.readouterr().err
    records = [r for r in read_metrics(f"{run.output_dir}/metrics.jsonl") if "loss" in r]
    assert [r["skipped"] for r in records] == [1, 1, 1] and records[0]["loss"] == pytest.approx(6.24, abs=0.2)


def test_a_spike_is_skipped_and_a_usual_step_is_not(tmp_path):
    """A batch that weighs a thousand times as much as its tokens: its gradient norm is beyond the limit."""

    def alter(step, batch):
        wrong = np.where(np.arange(batch.inputs.shape[1]) % 2, 7, batch.targets)
        return batch._replace(loss_mask=batch.loss_mask * np.nan) if step == 4 else (
            batch._replace(targets=wrong.astype(np.int32)) if step == 6 else batch
        )

    plain = config(tmp_path / "plain")
    train(plain, alter_batch=alter)
    norms = {r["step"]: r["grad_norm"] for r in read_metrics(f"{plain.output_dir}/metrics.jsonl") if "loss" in r}
    usual = max(norm for step, norm in norms.items() if step not in (4, 6))
    assert norms[6] > 1.2 * usual
    limited = config(tmp_path / "limited", optimizer={"skip_grad_norm_above": (usual + norms[6]) / 2})
    train(limited, alter_batch=alter)
    records = {r["step"]: r for r in read_metrics(f"{limited.output_dir}/metrics.jsonl") if "loss" in r}
    assert [step for step, r in records.items() if r["skipped"]] == [4, 6] and records[8]["skipped_steps"] == 2


def test_batches_have_hashes_of_their_own(tmp_path):
    """The same for every mesh, another one for every batch; what NumPy says of the tokens."""
    from jaxcoder.train.step import batch_hash

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (8, 64), dtype=np.int32)

    def by_numpy(tokens: np.ndarray) -> int:
        with np.errstate(over="ignore"):
            word = tokens.astype(np.uint32) * np.uint32(0x9E3779B1)
            word = word + np.arange(tokens.shape[1], dtype=np.uint32) * np.uint32(0x85EBCA77)
            word = (word ^ (word >> np.uint32(15))) * np.uint32(0xC2B2AE3D)
            return int((word ^ (word >> np.uint32(13))).sum(dtype=np.uint32))

    class Inputs:
        inputs = jax.numpy.asarray(tokens)

    assert int(jax.jit(lambda x: batch_hash(type("B", (), {"inputs": x})))(tokens)) == by_numpy(tokens)
    assert int(batch_hash(Inputs)) == by_numpy(tokens) == by_numpy(tokens[::-1])
    moved = np.roll(tokens, 1, axis=1)
    assert by_numpy(moved) != by_numpy(tokens)
    run = config(tmp_path, num_steps=3)
    train(run)
    hashes = [r["batch_hash"] for r in read_metrics(f"{run.output_dir}/metrics.jsonl") if "loss" in r]
    assert len(set(hashes)) == 3 and all(isinstance(h, int) and 0 <= h < 2**32 for h in hashes)
