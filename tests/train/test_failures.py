"""Failures during a run: nothing computed is lost, and the exit code tells whether a restart can help."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.checkpoint.discover import steps_in
from jaxcoder.config import CheckpointConfig, DataConfig, EvalConfig, MeshConfig, RunConfig
from jaxcoder.data.build import build_store
from jaxcoder.errors import EXIT_WATCHDOG, CheckpointError, ConfigError, Interrupted, JaxcoderError, TransientError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.record.metrics import JsonlWriter, read_metrics
from jaxcoder.tokenizer.train import train_tokenizer
from jaxcoder.train import loop, session
from jaxcoder.train.evaluate import HeldOut
from jaxcoder.train.loop import train
from jaxcoder.train.run_directory import RunDirectory


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("stores")
    text = Path(json.decoder.__file__).read_text() * 4
    tokenizer = train_tokenizer([text], 300)
    for name in ("train", "held_out"):
        write_documents([Document.from_text(text)], root / f"{name}.parquet")
        build_store(root / f"{name}.parquet", tokenizer, root / name, seed=0)
    return str(root / "train"), str(root / "held_out")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    everything = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *_: everything[:1])


def config(output_dir, stores=None, **changes) -> RunConfig:
    run = smoke()
    defaults = dict(
        output_dir=str(output_dir),
        data=DataConfig(store=stores[0], eval_store=stores[1]) if stores else DataConfig(store="synthetic"),
        num_steps=6,
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        compute=dataclasses.replace(run.compute, dtype="float32"),
        checkpoint=CheckpointConfig(save_every_steps=3),
        eval=EvalConfig(every_steps=3, num_windows=8),
    )
    return dataclasses.replace(run, **(defaults | changes))


def steps(run: RunConfig) -> list[int]:
    return sorted(int(path.name) for path in Path(run.output_dir, "checkpoints").iterdir())


def evaluated(run: RunConfig) -> dict[int, float]:
    records = [record for record in read_metrics(f"{run.output_dir}/metrics.jsonl") if "eval_seconds" in record]
    assert len({record["step"] for record in records}) == len(records)  # no step twice
    return {record["step"]: record["eval/loss"] for record in records}


@pytest.fixture(scope="module")
def undisturbed(stores, tmp_path_factory) -> dict[int, float]:
    everything = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: everything[:1])
        run = config(tmp_path_factory.mktemp("runs") / "run", stores)
        train(run)
    return evaluated(run)


def evaluate_with(monkeypatch, fault) -> list[int]:
    """Calls `fault(number of the evaluation)` before the batches of every evaluation; returns the calls."""
    original, calls = HeldOut.__call__, []

    def faulty(self, model, poll):
        calls.append(len(calls) + 1)

        def poll_and_fault():
            fault(calls[-1])
            poll()

        return original(self, model, poll_and_fault)

    monkeypatch.setattr(HeldOut, "__call__", faulty)
    return calls


def test_a_failed_evaluation_is_logged_and_the_run_continues(stores, tmp_path, monkeypatch, caplog, undisturbed):
    def fault(number):
        if number == 1:
            raise OSError(5, "Input/output error", "/held/out")

    evaluate_with(monkeypatch, fault)
    run = config(tmp_path / "run", stores)
    result = train(run)
    assert result.step == 6 and steps(run) == [3, 6]
    assert evaluated(run) == {6: undisturbed[6]} and result.eval_metrics["eval/loss"] == undisturbed[6]
    assert "step 3: the evaluation failed, and the run continues: OSError" in caplog.text
    events = [json.loads(line) for line in Path(run.output_dir, "events.jsonl").read_text().splitlines()]
    assert [(e["step"], "Input/output" in e["message"]) for e in events if e["event"] == "evaluation_failed"] == [
        (3, True)
    ]


def test_it_can_end_the_run_instead_after_saving(stores, tmp_path, monkeypatch, undisturbed):
    def fault(number):
        if number == 1:
            raise ValueError("a bad evaluation")

    calls = evaluate_with(monkeypatch, fault)
    run = config(
        tmp_path / "run",
        stores,
        eval=EvalConfig(every_steps=2, num_windows=8, stop_on_error=True),
        checkpoint=CheckpointConfig(save_every_steps=100),
    )
    with pytest.raises(ValueError, match="a bad evaluation"):
        train(run)
    assert steps(run) == [2]  # although no save was due
    train(run)  # evaluates step 2 first
    assert len(calls) == 4 and list(evaluated(run)) == [2, 4, 6]


def test_a_stop_during_an_evaluation_does_not_wait_for_it(stores, tmp_path, monkeypatch, undisturbed):
    def fault(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    calls = evaluate_with(monkeypatch, fault)
    run = config(tmp_path / "run", stores)
    with pytest.raises(Interrupted, match="stopped after step 3") as stopped:
        train(run)
    assert stopped.value.exit_code == 143 and steps(run) == [3] and evaluated(run) == {} and len(calls) == 1
    train(run)
    assert evaluated(run) == undisturbed


def test_a_stop_during_the_last_evaluation(stores, tmp_path, monkeypatch, undisturbed):
    def fault(number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    evaluate_with(monkeypatch, fault)
    run = config(tmp_path / "run", stores)
    with pytest.raises(Interrupted, match="stopped after step 6"):
        train(run)
    assert steps(run) == [3, 6] and list(evaluated(run)) == [3]
    assert train(run).eval_metrics["eval/loss"] == undisturbed[6]
    assert evaluated(run) == undisturbed


def test_killed_between_a_save_and_its_evaluation(stores, tmp_path, monkeypatch, undisturbed):
    def killed(session, evaluations):
        session.checkpointer.wait()
        raise KeyboardInterrupt

    run = config(tmp_path / "run", stores)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert steps(run) == [3]
    train(run)
    assert evaluated(run) == undisturbed


def test_an_output_directory_that_is_deleted_during_a_run(tmp_path, monkeypatch, at_step):
    run = config(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(session, "_DIRECTORY_EVERY", 0.0)
        at_step(patch, 2, lambda: (tmp_path / "run").rename(tmp_path / "deleted"))
        with pytest.raises(TransientError, match="was deleted during the run. Step 2 is saved") as ended:
            train(run)
    assert ended.value.exit_code == EXIT_WATCHDOG and steps(run) == [2]
    assert train(run).step == 6
    with monkeypatch.context() as patch:  # another run in its place is left alone
        patch.setattr(session, "_DIRECTORY_EVERY", 0.0)
        longer = dataclasses.replace(run, num_steps=9)
        at_step(patch, 1, lambda: ((tmp_path / "run").rename(tmp_path / "gone"), (tmp_path / "run").mkdir()))
        with pytest.raises(JaxcoderError, match="was replaced by another one during the run"):
            train(longer, accept_config_change=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_remote_output_directory_is_never_made_again_locally(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = config("memory://runs/remote")
    assert RunDirectory.of(run).recreate(run, []) and list(tmp_path.iterdir()) == []


def test_a_store_that_goes_away_ends_the_run_after_saving(stores, tmp_path, monkeypatch, at_step):
    monkeypatch.setattr("jaxcoder.data.store._CACHE_BYTES", 0)  # the tiny store would be read from memory
    store = tmp_path / "store"
    shutil.copytree(stores[0], store)
    data = DataConfig(store=str(store))
    run = config(tmp_path / "run", stores, data=data, num_steps=400, checkpoint=CheckpointConfig(save_every_steps=1000))
    move = lambda: store.rename(tmp_path / "moved")  # noqa: E731
    with monkeypatch.context() as patch:
        at_step(patch, 2, move)
        with pytest.raises(TransientError) as ended:
            train(run)
    (saved,) = steps(run)
    message = str(ended.value)
    assert ended.value.exit_code == EXIT_WATCHDOG and saved >= 2 and f"Step {saved} is saved" in message
    assert "delete" not in message and str(store) in message
    (tmp_path / "moved").rename(store)
    assert train(dataclasses.replace(run, num_steps=saved + 1), accept_config_change=True).step == saved + 1


def test_a_save_that_fails_may_succeed_later(tmp_path, monkeypatch):
    run = config(tmp_path / "run")

    def refused(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr("jaxcoder.checkpoint.arrays.save_async", refused)
        with pytest.raises(TransientError, match="The same command continues the run") as ended:
            train(run)
    assert ended.value.exit_code == EXIT_WATCHDOG
    assert train(run).step == 6


def test_metrics_that_cannot_be_written_end_the_run_after_saving(tmp_path, monkeypatch):
    run = config(tmp_path / "run")
    write = JsonlWriter.write

    def failing(self, step, metrics):
        if step >= 4:
            raise OSError(5, "Input/output error", self.path)
        write(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlWriter, "write", failing)
        with pytest.raises(TransientError, match="Input/output error.* Step 5 is saved") as ended:
            train(run)
    assert ended.value.exit_code == EXIT_WATCHDOG and steps(run) == [3, 5]
    assert train(run).step == 6


def test_fewer_steps_than_were_done_change_nothing(tmp_path):
    run = config(tmp_path / "run")
    train(run)
    before = Path(run.output_dir, "config.json").read_bytes()
    with pytest.raises(ConfigError, match="num_steps is 4, but .* has reached step 6"):
        train(dataclasses.replace(run, num_steps=4), accept_config_change=True)
    assert Path(run.output_dir, "config.json").read_bytes() == before


@pytest.mark.parametrize("at", [2, 10, 30, 45])
def test_a_clock_that_is_set_forward_does_not_fail_a_save(tmp_path, monkeypatch, at):
    now, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return now() + (3600.0 if calls[0] >= at else 0.0)

    with Checkpointer(tmp_path, CheckpointConfig(save_every_steps=1), run=config(tmp_path)) as checkpointer:
        monkeypatch.setattr(time, "time", jumping)
        checkpointer.save(1, {"params/wte": jnp.ones((64, 64))}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [1] and calls[0] > at


def test_the_clean_up_of_a_failed_save_does_not_raise(tmp_path, monkeypatch):
    def failing(path, arrays):
        (path / "state").mkdir()
        raise ValueError("the array server does not respond")

    def busy(path):
        raise OSError(39, "Directory not empty", str(path))

    def failing_and_busy(path, arrays):
        monkeypatch.setattr(type(path), "rmtree", busy)
        failing(path, arrays)

    monkeypatch.setattr("jaxcoder.checkpoint.arrays.save_async", failing_and_busy)
    with Checkpointer(tmp_path, CheckpointConfig(save_every_steps=1), run=config(tmp_path)) as checkpointer:
        with pytest.raises(CheckpointError, match="the array server does not respond"):
            checkpointer.save(1, {"params/wte": jnp.ones((4, 4))}, {})


def test_directories_with_other_names_than_steps_are_ignored(tmp_path):
    for name in ("3", "12", "0004", "0007", "\u0669", "007.tmp", "12x"):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [3, 12]


def test_the_same_store_by_another_path_is_the_same_run(stores, tmp_path, monkeypatch):
    shutil.copytree(stores[0], tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    run = config(tmp_path / "run", data=DataConfig(store="store"), num_steps=2)
    train(run)
    saved = json.loads(Path(run.output_dir, "config.json").read_text())
    assert saved["data"]["store"] == str(tmp_path / "store")  # holds in any working directory
    longer = dict(num_steps=2, checkpoint=CheckpointConfig(save_every_steps=1))
    for store in ("./store", str(tmp_path / "store")):
        assert train(dataclasses.replace(run, data=DataConfig(store=store), **longer)).step == 2
    (tmp_path / "store").rename(tmp_path / "moved")
    moved = dataclasses.replace(run, data=DataConfig(store="moved"))
    assert train(moved).step == 2
    assert json.loads(Path(run.output_dir, "config.json").read_text())["data"]["store"] == str(tmp_path / "moved")
    with pytest.raises(ConfigError, match="another configuration: data.store"):
        train(dataclasses.replace(run, data=DataConfig(store=stores[1])))
