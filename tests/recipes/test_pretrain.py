"""Infilling as an evaluation of training runs: metrics, meshes, tokenizers without FIM tokens."""

import dataclasses
import json

import jax
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.config import DataConfig, EvalConfig, MeshConfig, RunConfig
from jaxcoder.data.build import build_store
from jaxcoder.errors import ConfigError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.recipes.pretrain import evaluations, pretrain
from jaxcoder.record.metrics import read_metrics
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.tokenizer.train import train_tokenizer
from jaxcoder.train.state import initial_state

LINE = "    return compute_the_answer(value)\n"


def make_store(root, tokenizer, texts) -> str:
    write_documents([Document.from_text(text) for text in texts], root / "d.parquet")
    return build_store(root / "d.parquet", tokenizer, root / "store", seed=0).path


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """Files whose only suitable line is LINE."""
    texts = [f"x{n} = {n}\n" + LINE + "# end\n" for n in range(40)]
    return make_store(tmp_path_factory.mktemp("store"), train_tokenizer([*texts, json.__doc__], 400), texts)


def config(output_dir, store: str, **changes) -> RunConfig:
    run = smoke()
    defaults = dict(
        output_dir=str(output_dir),
        data=DataConfig(store=store, eval_store=store),
        num_steps=4,
        compute=dataclasses.replace(run.compute, dtype="float32"),
        eval=EvalConfig(every_steps=2, num_windows=4, infill_gaps=6),
    )
    return dataclasses.replace(run, **(defaults | changes))


def test_infilling_is_a_metric(store, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO", "jaxcoder")
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    run = config(tmp_path / "run", store)
    result = pretrain(run)
    records = [r for r in read_metrics(f"{run.output_dir}/metrics.jsonl") if "eval/loss" in r]
    assert [(r["step"], r["eval/infill/count"]) for r in records] == [(2, 6), (4, 6)]
    assert all(0 <= r["eval/infill/edit_similarity"] <= 1 for r in records)
    assert result.eval_metrics["eval/infill/exact_match"] == records[-1]["eval/infill/exact_match"]
    assert "infilled lines exact 0.0%" in caplog.text


def test_every_mesh_gives_the_same_metrics(store, tmp_path, monkeypatch):
    run = config(tmp_path, store)
    (infilling,) = evaluations(run)
    metrics = []
    devices = jax.devices()
    for size, mesh in ((1, MeshConfig(data=1, fsdp=1, tensor=1)), (8, MeshConfig(data=2, fsdp=2, tensor=2))):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_, size=size: devices[:size])
            with jax.set_mesh(make_mesh(mesh)):
                metrics.append(infilling(jax.jit(lambda: initial_state(run))().model))
    assert metrics[0] == metrics[1]


def test_error_without_fim_tokens(tmp_path):
    train_tokenizer([LINE], 300).save(tmp_path / "tokenizer")
    text = (tmp_path / "tokenizer" / "tokenizer.json").read_text().replace("<fim_", "<another_")
    tokenizer = Tokenizer(text.encode())
    store = make_store(tmp_path, tokenizer, [LINE * 50])
    with pytest.raises(
        ConfigError, match="eval.infill_gaps is 6, but the tokenizer of .* has no FIM tokens: set it to 0"
    ):
        pretrain(config(tmp_path / "run", store))
    assert not (tmp_path / "run").exists()
