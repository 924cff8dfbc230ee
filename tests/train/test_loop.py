"""The training loop end to end on a tiny model: exact resuming, meshes, microbatches, evaluation, interruption."""

import dataclasses
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.config import CheckpointConfig, DataConfig, EvalConfig, MeshConfig, RunConfig
from jaxcoder.data.build import build_store
from jaxcoder.errors import CheckpointError, ConfigError, DataError, Interrupted
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.record.metrics import read_metrics
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.tokenizer.train import train_tokenizer
from jaxcoder.train.loop import train
from jaxcoder.train.state import abstract_state, flatten_state

ONE_DEVICE = MeshConfig(data=1, fsdp=1, tensor=1)


@pytest.fixture(scope="session")
def stores(tmp_path_factory) -> tuple[str, str]:
    """Token stores of some real code, to train on and held out, and their tokenizer inside."""
    root = tmp_path_factory.mktemp("stores")
    names = ("argparse", "ast", "json.decoder", "textwrap", "shlex", "string", "heapq", "bisect")
    texts = [open(__import__(name, fromlist=["x"]).__file__, encoding="utf-8").read() for name in names]
    tokenizer = train_tokenizer(texts, 512)
    for name, part in (("train", texts[:6]), ("held_out", texts[6:])):
        documents = [Document.from_text(text, path=str(i)) for i, text in enumerate(part)]
        write_documents(documents, root / f"{name}.parquet")
        build_store(root / f"{name}.parquet", tokenizer, root / name, seed=0)
    return str(root / "train"), str(root / "held_out")


def config(output_dir, stores=None, **changes) -> RunConfig:
    run = smoke()
    model = dataclasses.replace(run.model, embed_dropout=0.1, residual_dropout=0.1, attention_dropout=0.1)
    data = DataConfig(store=stores[0], eval_store=stores[1]) if stores else DataConfig(store="synthetic")
    defaults = dict(
        output_dir=str(output_dir),
        model=model,
        data=data,
        num_steps=10,
        optimizer=dataclasses.replace(run.optimizer, warmup_steps=1),
        mesh=ONE_DEVICE,
        compute=dataclasses.replace(run.compute, dtype="float32"),
        checkpoint=CheckpointConfig(save_every_steps=100),
        eval=EvalConfig(every_steps=5, num_windows=13),
    )
    return dataclasses.replace(run, **(defaults | changes))


@pytest.fixture
def run_on_mesh(monkeypatch):
    """`train` with as many devices as the run's mesh has, so that one process can try several meshes."""
    everything = jax.devices()

    def run(config, **options):
        size = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
        monkeypatch.setattr(jax, "devices", lambda *_: everything[:size])
        try:
            return train(config, **options)
        finally:
            monkeypatch.setattr(jax, "devices", lambda *_: everything)

    return run


def weights(config: RunConfig) -> dict[str, np.ndarray]:
    """The arrays of a run's last checkpoint."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        abstract = flatten_state(abstract_state(config, mesh))
        checkpointer = Checkpointer(f"{config.output_dir}/checkpoints", config.checkpoint, run=config)
        arrays = checkpointer.restore(checkpointer.latest_step(), abstract)
        return {name: np.asarray(array) for name, array in arrays.items()}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_and_continued_equals_undisturbed(
    run_on_mesh, tmp_path, stores, monkeypatch, at_step, number, exit_code
):
    """5 + 5 steps equal 10, bit for bit: weights, moments, data, dropout, and the metrics file."""
    whole, parts = config(tmp_path / "whole", stores), config(tmp_path / "parts", stores)
    result = run_on_mesh(whole)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted) as caught:
            run_on_mesh(parts)
    assert caught.value.exit_code == exit_code and caught.value.resume_command
    resumed = run_on_mesh(parts)
    assert resumed.step == result.step == 10
    assert_same(weights(whole), weights(parts))
    kept = [
        [
            (record["step"], record.get("loss"), record.get("eval/loss"))
            for record in read_metrics(run.output_dir + "/metrics.jsonl")
            if "loss" in record or "eval/loss" in record
        ]
        for run in (whole, parts)
    ]
    assert kept[0] == kept[1]
    assert [step for step, loss, _ in kept[0] if loss is not None] == list(range(1, 11))


def test_a_finished_run_is_left_as_it_is(run_on_mesh, tmp_path, stores):
    run = config(tmp_path / "run", stores, num_steps=2)
    first = run_on_mesh(run)
    before, lines = weights(run), (tmp_path / "run/metrics.jsonl").read_bytes()
    again = run_on_mesh(run)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == lines
    assert again.eval_metrics == first.eval_metrics and again.eval_metrics["eval/tokens"] == 13 * 64
    assert (first.first_step, first.step) == (0, 2) and (again.first_step, again.step) == (2, 2)
    assert_same(before, weights(run))


def test_microbatches_equal_the_whole_batch(run_on_mesh, tmp_path, stores):
    whole = config(tmp_path / "whole", stores, num_steps=3)
    pieces = config(tmp_path / "pieces", stores, num_steps=3, microbatch_size=2)
    run_on_mesh(whole)
    run_on_mesh(pieces)
    expected, got = weights(whole), weights(pieces)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=2e-5, err_msg=name)


def test_meshes_agree_and_checkpoints_move_between_them(run_on_mesh, tmp_path, stores):
    """The same losses, dropout on, on every mesh; and a run may be continued on another one."""
    losses = {}
    for shape in ((1, 1, 1), (1, 4, 2)):
        mesh = MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])
        run = config(tmp_path / str(shape), stores, num_steps=4, mesh=mesh, microbatch_size=4)
        run_on_mesh(run)
        losses[shape] = [r["loss"] for r in read_metrics(run.output_dir + "/metrics.jsonl") if "loss" in r]
    for shape in losses:
        np.testing.assert_allclose(losses[shape], losses[1, 1, 1], rtol=2e-5, err_msg=str(shape))
    moved = config(tmp_path / str((1, 4, 2)), stores, num_steps=6, microbatch_size=4)
    stayed = config(tmp_path / str((1, 1, 1)), stores, num_steps=6, microbatch_size=4)
    for run in (moved, stayed):
        run_on_mesh(run, accept_config_change=True)
    after = [
        [r["loss"] for r in read_metrics(run.output_dir + "/metrics.jsonl") if "loss" in r] for run in (moved, stayed)
    ]
    assert len(after[0]) == 6
    np.testing.assert_allclose(after[0], after[1], rtol=2e-5)


def test_it_learns(run_on_mesh, tmp_path, stores):
    run = config(tmp_path / "run", stores, num_steps=60, eval=EvalConfig(every_steps=1000, num_windows=8))
    result = run_on_mesh(run)
    losses = [r["loss"] for r in read_metrics(run.output_dir + "/metrics.jsonl") if "loss" in r]
    assert losses[0] == pytest.approx(np.log(512), rel=0.05)
    assert np.mean(losses[-5:]) < losses[0] - 0.7
    assert result.eval_metrics["eval/loss"] < losses[0] - 0.5
    ratio = result.eval_metrics["eval/loss"] / result.eval_metrics["eval/bits_per_byte"]
    assert np.log(2) < ratio < 6 * np.log(2)  # nats per token over bits per byte: ln 2 times the bytes per token


def test_bad_runs_are_refused_before_anything_is_written(run_on_mesh, tmp_path, stores):
    with pytest.raises(ConfigError, match="data.store is not set.*--data synthetic"):
        run_on_mesh(config(tmp_path / "a", data=DataConfig()))
    with pytest.raises(DataError, match="vocab_size"):
        model = dataclasses.replace(smoke().model, vocab_size=300)
        run_on_mesh(config(tmp_path / "a", stores, model=model))
    with pytest.raises(DataError):
        run_on_mesh(config(tmp_path / "a", (str(tmp_path / "nothing"), None)))
    for place in (0, 1):  # the store that it trains on, the held-out one
        altered = [shutil.copytree(store, tmp_path / f"{place}{number}") for number, store in enumerate(stores)]
        shard = bytearray((altered[place] / "tokens/c/0").read_bytes())
        shard[100] ^= 1
        (altered[place] / "tokens/c/0").write_bytes(shard)
        with pytest.raises(DataError, match=f"{altered[place]} is damaged: tokens/c/0 was altered"):
            run_on_mesh(config(tmp_path / "a", tuple(map(str, altered))))
    assert not (tmp_path / "a").exists()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="contains other files .thesis.tex."):
        run_on_mesh(config(tmp_path / "strange"))


def test_a_model_that_does_not_fit_the_checkpoint_leaves_the_run_as_it_was(run_on_mesh, tmp_path):
    run = config(tmp_path / "run", num_steps=1)
    run_on_mesh(run)
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, mlp_dim=128), num_steps=2)
    with pytest.raises(CheckpointError, match="holds another model"):
        run_on_mesh(other, accept_config_change=True)
    assert run_on_mesh(run).step == 1


def test_a_stop_after_the_last_step_is_handed_on(run_on_mesh, tmp_path, monkeypatch, at_step):
    run = config(tmp_path / "run", num_steps=2)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = run_on_mesh(run)
    assert (result.step, result.late_stop) == (2, 143)
    assert run_on_mesh(run).late_stop == 0


def test_what_a_killed_process_left_is_no_stranger(run_on_mesh, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.tmp123").write_text("{")
    assert run_on_mesh(config(tmp_path / "run", num_steps=1)).step == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file: give another --output-dir"):
        run_on_mesh(config(tmp_path / "file"))


def test_another_configuration_is_refused_with_the_difference(run_on_mesh, tmp_path):
    run_on_mesh(config(tmp_path / "run", num_steps=1))
    with pytest.raises(ConfigError, match="num_steps: 1 -> 2.*--accept-config-change"):
        run_on_mesh(config(tmp_path / "run", num_steps=2))
    assert run_on_mesh(config(tmp_path / "run", num_steps=2), accept_config_change=True).step == 2
