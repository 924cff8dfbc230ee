"""What a run tells of itself: events and the account of time over restarts, a profile on a signal, bad batches,
hashes."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.config import CheckpointConfig, MeshConfig, RunConfig
from jaxcoder.errors import Interrupted, TrainingError
from jaxcoder.record.events import read_events
from jaxcoder.record.metrics import read_metrics
from jaxcoder.train.loop import train


@pytest.fixture(autouse=True, scope="module")
def one_device():
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


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


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> RunConfig:
    """SIGTERM in the fifth step, then to the end, with a SIGUSR1 on the way."""
    run = config(tmp_path_factory.mktemp("story"), num_steps=12)

    def terminate(step, batch):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    def ask_for_profile(step, batch):
        if step == 9:
            os.kill(os.getpid(), signal.SIGUSR1)
        return batch

    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Interrupted) as stopped:
        train(run, alter_batch=terminate)
    assert stopped.value.exit_code == 143
    assert train(run, alter_batch=ask_for_profile).step == 12
    assert signal.getsignal(signal.SIGUSR1) == before
    return run


def steps_of(run: RunConfig) -> dict[int, dict]:
    return {r["step"]: r for r in read_metrics(f"{run.output_dir}/metrics.jsonl") if "loss" in r}


def test_two_attempts_tell_what_they_did(story):
    events = read_events(f"{story.output_dir}/events.jsonl")
    first, second = dict.fromkeys(event["attempt"] for event in events)
    for attempt in (first, second):
        kinds = [e["event"] for e in events if e["attempt"] == attempt and e["event"] != "spent"]
        assert kinds[:2] == ["begin", "ready"] and kinds[-1] == "end"
        begin = next(e for e in events if e["attempt"] == attempt)
        assert begin["processes"] == 1 and begin["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
        last = [e for e in events if e["attempt"] == attempt and e["event"] == "spent"][-1]
        assert {"init", "restore", "compile", "step", "data_wait", "save"} <= set(last["seconds"])
        assert 0 < sum(last["seconds"].values()) <= last["time"] - begin["process_started"] + 0.1
    ends = [e for e in events if e["event"] == "end"]
    stopped_at = ends[0]["step"]
    assert [(e["step"], e["reason"]) for e in ends] == [(stopped_at, "SIGTERM"), (12, "finished")]
    assert "which is saved" in ends[0]["message"] and 3 <= stopped_at <= 6
    assert [e["step"] for e in events if e["event"] == "ready"] == [0, stopped_at]
    saved = {e["step"]: e for e in events if e["event"] == "saved"}
    assert {3, stopped_at, 9, 12} <= saved.keys()
    assert all(0 <= e["blocked"] <= e["seconds"] and e["bytes"] > 1_000_000 for e in saved.values())
    (profile,) = [e for e in events if e["event"] == "profile"]
    assert 7 <= profile["first"] <= 9 and profile["last"] == profile["first"] + 2
    assert any(os.scandir(profile["directory"]))


def test_a_step_with_large_gradients_is_skipped_and_many_end_the_run(tmp_path, caplog):
    caplog.set_level("INFO", "jaxcoder")
    run = config(tmp_path, optimizer={"skip_grad_norm_above": 1e-6, "max_skipped_steps": 3})
    message = r"gradient norm was above 1e-06 in 3 steps in a row \(1 to 3\)"
    with pytest.raises(TrainingError, match=message):
        train(run)
    assert "step 1: skipped, its gradient norm" in caplog.text
    records = [r for r in read_metrics(f"{run.output_dir}/metrics.jsonl") if "loss" in r]
    assert [r["skipped"] for r in records] == [1, 1, 1] and records[0]["loss"] == pytest.approx(6.24, abs=0.2)


def test_bad_batches_are_skipped_and_usual_ones_are_not(tmp_path, story):
    """One that gives NaN, and one whose targets make the gradient norm jump beyond the limit."""

    def alter(step, batch):
        if step == 4:
            return batch._replace(loss_mask=batch.loss_mask * np.float32(np.nan))
        wrong = np.where(np.arange(batch.inputs.shape[1]) % 2, 7, batch.targets).astype(np.int32)
        return batch._replace(targets=wrong) if step == 6 else batch

    usual = max(record["grad_norm"] for record in steps_of(story).values())
    limited = config(tmp_path, num_steps=8, optimizer={"skip_grad_norm_above": 1.15 * usual})
    train(limited, alter_batch=alter)
    records = steps_of(limited)
    assert [step for step, r in records.items() if r["skipped"]] == [4, 6] and records[8]["skipped_steps"] == 2


def test_batches_have_hashes_of_their_own(story):
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
    hashes = [record["batch_hash"] for record in steps_of(story).values()]
    assert len(hashes) == len(set(hashes)) == 12 and all(isinstance(h, int) and 0 <= h < 2**32 for h in hashes)
