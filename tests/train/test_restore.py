"""Runs that begin with other weights: which are taken, which are refused, and before what."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, RunConfig
from jaxcoder.convert.to_hf import to_hf
from jaxcoder.data.build import build_store
from jaxcoder.errors import CheckpointError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.recipes.initial_weights import open_weights
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.tokenizer.train import train_tokenizer
from jaxcoder.train.loop import train
from jaxcoder.train.state import abstract_state, flatten_state

STILL = OptimizerConfig(peak_learning_rate=0.0, final_learning_rate=0.0, warmup_steps=0, decay_steps=9)
"""An optimizer that changes no weight: what a run ends with is what it began with."""


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:2]
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


def make_store(directory, vocab_size: int, text: str) -> str:
    documents = [Document.from_text(text)]
    write_documents(documents, directory.with_suffix(".parquet"))
    build_store(directory.with_suffix(".parquet"), train_tokenizer([text], vocab_size), directory, seed=0)
    return str(directory)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[str, str]:
    """Stores of two tokenizers with equally many ids."""
    root = tmp_path_factory.mktemp("stores")
    texts = [open(module.__file__, encoding="utf-8").read() for module in (json.decoder, dataclasses)]
    return tuple(make_store(root / name, 400, text) for name, text in zip(("one", "other"), texts))


def config(output_dir, store, **changes) -> RunConfig:
    run = smoke()
    defaults = dict(
        output_dir=str(output_dir),
        data=DataConfig(store=store),
        num_steps=2,
        mesh=MeshConfig(data=1, fsdp=2, tensor=1),
        compute=dataclasses.replace(run.compute, dtype="float32"),
        checkpoint=CheckpointConfig(save_every_steps=100),
        optimizer=STILL,
    )
    return dataclasses.replace(run, **(defaults | changes))


def arrays(run: RunConfig) -> dict[str, np.ndarray]:
    mesh = make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        checkpointer = Checkpointer(f"{run.output_dir}/checkpoints", run.checkpoint, run=run)
        found = checkpointer.restore(checkpointer.latest_step(), flatten_state(abstract_state(run, mesh)))
        return {name: np.asarray(array) for name, array in found.items()}


@pytest.fixture(scope="module")
def base(stores, tmp_path_factory) -> RunConfig:
    """A run of three steps that has learnt something."""
    optimizer = OptimizerConfig(peak_learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=0)
    run = config(tmp_path_factory.mktemp("base"), stores[0], optimizer=optimizer, num_steps=3)
    train(run)
    return run


def test_it_begins_with_those_weights_and_a_fresh_optimizer(base, stores, tmp_path):
    """From a run, from one of its checkpoints and from PyTorch format, on another mesh; step and data begin at 0."""
    to_hf(base.output_dir, tmp_path / "hf")
    expected = arrays(base)
    mesh = MeshConfig(data=1, fsdp=1, tensor=2)
    for number, source in enumerate((base.output_dir, f"{base.output_dir}/checkpoints/3", str(tmp_path / "hf"))):
        run = config(tmp_path / str(number), stores[0], init_from=source, mesh=mesh)
        assert train(run, open_weights=open_weights).step == 2
        found = arrays(run)
        for name in found:
            if name.startswith("params/"):
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert found["optimizer/count"] == found["step"] == 2  # and not 5
        lines = [json.loads(line) for line in (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()]
        assert [line["samples"] for line in lines if "loss" in line] == [8, 16]


def test_its_own_checkpoint_comes_first(base, stores, tmp_path):
    """Continued, a run goes on with its own weights, and no longer needs those that it began with."""
    run = config(tmp_path / "run", stores[0], init_from=base.output_dir)
    train(run)
    gone = dataclasses.replace(run, init_from=str(tmp_path / "moved"), num_steps=3)
    assert train(gone, accept_config_change=True).step == 3
    np.testing.assert_array_equal(arrays(gone)["params/wte"], arrays(base)["params/wte"])


def refused(run: RunConfig, expected: str, **options) -> None:
    with pytest.raises(CheckpointError, match=expected) as caught:
        train(run, **options)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(base, stores, tmp_path):
    run = config(tmp_path / "run", stores[0], init_from=base.output_dir)
    wider = dataclasses.replace(run.model, mlp_dim=128, num_kv_heads=4)
    refused(
        dataclasses.replace(run, model=wider),
        "whose model differs: model.mlp_dim is 128, of the weights 256; model.num_kv_heads is 4, of the weights 1. "
        "Give other weights, or `--model.mlp-dim 256 --model.num-kv-heads 1`|model.num_kv_heads is 4",
    )
    refused(dataclasses.replace(run, data=DataConfig(store=stores[1])), "trained with another tokenizer .fingerprint")
    refused(dataclasses.replace(run, init_from=str(tmp_path / "nothing")), "nothing`, which does not exist")
    (tmp_path / "empty").mkdir()
    refused(dataclasses.replace(run, init_from=str(tmp_path / "empty")), "holds no checkpoint of jaxcoder.*from-hf")
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_tokenizer_cannot_continue_a_run(base, stores, tmp_path):
    run = config(tmp_path / "run", stores[0])
    train(run)
    other = dataclasses.replace(run, data=DataConfig(store=stores[1]), num_steps=3)
    refused(other, "trained with another tokenizer", accept_config_change=True)
    assert (tmp_path / "run" / "config.json").read_text().count(stores[0]) == 1  # as it was


def test_damaged_checkpoints_of_its_own_do_not_fall_back_to_the_beginning(base, stores, tmp_path):
    run = config(tmp_path / "run", stores[0], init_from=base.output_dir)
    train(run)
    manifest = tmp_path / "run" / "checkpoints" / "2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("smoke", "smoky").replace('"step": 2', '"step": 3'))
    refused(run, "no checkpoint in .* is complete: delete that directory")
