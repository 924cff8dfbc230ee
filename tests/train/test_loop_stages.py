"""Training in stages: batch sizes and mixtures that change on the way, interrupted anywhere."""

import dataclasses
import os
import signal

import jax
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.config import CheckpointConfig, Corpus, DataConfig, MeshConfig, RunConfig, Stage
from jaxcoder.data.build import build_store
from jaxcoder.data.open import open_stream
from jaxcoder.errors import ConfigError, DataError, Interrupted
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.record.metrics import read_metrics
from jaxcoder.tokenizer.train import train_tokenizer
from jaxcoder.train import loop
from jaxcoder.train.loop import train


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two token stores by one tokenizer, and one by another."""
    root = tmp_path_factory.mktemp("stores")
    texts = [open(__import__(name).__file__, encoding="utf-8").read() for name in ("argparse", "ast", "shlex")]
    stores = []
    for number, tokenizer in enumerate([train_tokenizer(texts, 512)] * 2 + [train_tokenizer(texts[:1], 500)]):
        document = Document.from_text(texts[number], repo_name="python", path=f"lib/{number}.py")
        write_documents([document], root / f"{number}.parquet")
        stores.append(build_store(root / f"{number}.parquet", tokenizer, root / str(number), seed=0).path)
    return stores


def config(output_dir, data, **changes) -> RunConfig:
    run = smoke()
    defaults = dict(
        output_dir=str(output_dir),
        data=data,
        num_steps=9,
        global_batch_size=4,
        optimizer=dataclasses.replace(run.optimizer, warmup_steps=1, decay_steps=100),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        compute=dataclasses.replace(run.compute, dtype="float32"),
        checkpoint=CheckpointConfig(save_every_steps=100),
    )
    return dataclasses.replace(run, **(defaults | changes))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture(autouse=True, scope="module")
def steps_are_compiled_once():
    """The runs here differ in what they read and for how long, and in the batch size alone in what they compute."""
    make, made = loop.make_train_step, {}

    def shared(config):
        if config.global_batch_size not in made:
            made[config.global_batch_size] = make(config)
        return made[config.global_batch_size]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", shared)
        yield


def last_manifest(run: RunConfig):
    checkpointer = Checkpointer(f"{run.output_dir}/checkpoints", run.checkpoint, run=run)
    return checkpointer.manifest(checkpointer.latest_step())


def losses(run: RunConfig) -> list[tuple]:
    records = read_metrics(run.output_dir + "/metrics.jsonl")
    return [(record["step"], record["loss"], record["samples"]) for record in records if "loss" in record]


def test_stages_interrupted_equal_undisturbed(corpora, tmp_path, monkeypatch):
    """Batches of 4, then 8, then 4, over a mixture that changes: the steps of 3 + 6 equal those of 9."""
    mixture = tuple(Corpus(store=store, weight=weight) for store, weight in zip(corpora[:2], (3.0, 1.0)))
    stages = (
        Stage(from_sample=0),
        Stage(from_sample=8, global_batch_size=8),
        Stage(from_sample=30, weights=(0.0, 1.0), global_batch_size=4),
    )
    data = DataConfig(corpora=mixture, stages=stages)
    whole, parts = (config(tmp_path / name, data) for name in ("whole", "parts"))
    train(whole)
    assert [samples for _, _, samples in losses(whole)] == [4, 8, 16, 24, 32, 36, 40, 44, 48]
    assert last_manifest(whole).metadata["samples"] == 48

    make, count = loop.make_train_step, [0]

    def counting(step_config):
        step = make(step_config)

        def run(*arguments):
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", counting)
        with pytest.raises(Interrupted):
            train(parts)
    assert last_manifest(parts).metadata["samples"] == 16
    train(parts)
    assert losses(parts) == losses(whole)


def test_the_batch_size_may_change_on_a_restart(corpora, tmp_path):
    """The data goes on behind the samples consumed, not behind step * batch size."""
    run = config(tmp_path / "run", DataConfig(store=corpora[0]), num_steps=3)
    train(run)
    train(dataclasses.replace(run, num_steps=5, global_batch_size=8), accept_config_change=True)
    assert [samples for _, _, samples in losses(run)] == [4, 8, 12, 20, 28]


def test_a_mixture_that_ends_with_the_run_is_read_to_its_end(corpora, tmp_path):
    data = DataConfig(corpora=(Corpus(store=corpora[0], max_epochs=1.0),))
    run = config(tmp_path / "run", data, num_steps=1)
    there = open_stream(run).mixture.num_samples
    assert there > 100
    # As many windows as 8 batches of 4: then the cap is reached with the last step.
    data = DataConfig(corpora=(Corpus(store=corpora[0], max_epochs=32 / there + 1e-6),))
    run = config(tmp_path / "run", data, num_steps=8)
    assert open_stream(run).mixture.num_samples == 32
    train(run)
    too_long = dataclasses.replace(run, num_steps=9, output_dir=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="caps of data.corpora allow 32 samples, but num_steps 9 reads 36"):
        train(too_long)


def test_bad_mixtures_are_refused_before_anything_is_written(corpora, tmp_path):
    for data, error, expected in (
        (DataConfig(corpora=tuple(Corpus(store=store) for store in corpora)), DataError, "different tokenizers"),
        (DataConfig(corpora=(Corpus(store=corpora[0], weight=-1.0),)), ConfigError, "weight is -1.0"),
        (DataConfig(store=corpora[0], corpora=(Corpus(store=corpora[1]),)), ConfigError, "give one or the other"),
        (DataConfig(corpora=(Corpus(store=str(tmp_path / "none")),)), DataError, "There is no token store"),
    ):
        with pytest.raises(error, match=expected):
            train(config(tmp_path / "run", data))
    assert not (tmp_path / "run").exists()
