"""`jaxcoder train NAME --dry-run`: every run, without data and devices; it reports what exists and writes nothing."""

import dataclasses
import re

import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.cli.main import main
from jaxcoder.config import Corpus, DataConfig, MeshConfig, RunConfig
from jaxcoder.config.load import available_runs
from jaxcoder.data.build import build_store
from jaxcoder.errors import ConfigError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.models.flops import num_parameters
from jaxcoder.tokenizer.train import train_tokenizer
from jaxcoder.train.dry_run import dry_run, planned_devices
from jaxcoder.train.loop import train


def report(config: RunConfig, num_devices: int = 1, **options) -> str:
    """The lines as one, so that wrapping does not matter."""
    return " ".join(" ".join(dry_run(config, num_devices=num_devices, **options)).split())


@pytest.fixture
def run(tmp_path) -> RunConfig:
    return dataclasses.replace(
        smoke(),
        output_dir=str(tmp_path / "run"),
        num_steps=2,
        data=DataConfig(store="synthetic"),
        optimizer=dataclasses.replace(smoke().optimizer, warmup_steps=1),
    )


@pytest.mark.parametrize("name", available_runs())
def test_every_run(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Devices that every run's sizes divide by, and that are not here.
    assert main(["train", name, "--dry-run", "--mesh.data", "1", "--mesh.fsdp", "32", "--global-batch-size", "64"]) == 0
    lines = capsys.readouterr().out
    for piece in ("parameters", "FLOPs", "multiply-add", "cost", "32 devices (8 here)", "weights, fp32", "writes to"):
        assert piece in lines, piece
    assert max(map(len, lines.splitlines())) <= 112
    assert not list(tmp_path.iterdir())


def test_figures_of_a_run(run):
    text = report(run, cost="a cent.")
    assert f"parameters {num_parameters(run.model):,}" in text
    assert "tokens 1,024 in 2 steps; 16 windows of 64" in text and "cost a cent (of the unchanged" in text
    assert "data 1 x fsdp 1 x tensor 1: 1 device (1 here)" in text
    assert "it is empty: the run starts at step 0" in text


@pytest.mark.parametrize(
    ("mesh", "here", "expected"),
    [
        (MeshConfig(), 8, 8),
        (MeshConfig(data=2, fsdp=32), 1, 64),
        (MeshConfig(fsdp=4), 8, 4),
        (MeshConfig(tensor=4), 1, 4),
        (MeshConfig(tensor=4), 8, 8),
    ],
)
def test_devices_that_a_mesh_means(mesh, here, expected):
    assert planned_devices(mesh, here) == expected


def test_what_cannot_work_is_refused(run):
    with pytest.raises(ConfigError, match="(?s)num_steps is 0.*not a multiple of mesh.data x mesh.fsdp .64 devices"):
        report(dataclasses.replace(run, num_steps=0, mesh=MeshConfig(fsdp=64)))


def test_data_that_is_there_and_that_is_not(run, tmp_path):
    text = "".join(f"x{i} = {i}\n" for i in range(3000))
    write_documents([Document.from_text(text)], tmp_path / "documents.parquet")
    store = build_store(tmp_path / "documents.parquet", train_tokenizer([text], 300), tmp_path / "store", seed=0)
    there, gone = str(tmp_path / "store"), str(tmp_path / "gone")
    one = report(dataclasses.replace(run, data=DataConfig(store=there, eval_store=gone)))
    epochs = float(re.search(r"the run reads ([\d.]+) epochs", one)[1])
    assert epochs == pytest.approx(16 / (store.num_tokens / 64), rel=0.1)
    assert f"{store.num_tokens:,} tokens, 1 document;" in one and f"NOT READY: There is no token store at {gone}" in one
    mixed = DataConfig(corpora=(Corpus(store=there, max_epochs=0.01), Corpus(store=there, max_epochs=0.01)))
    assert "NOT READY: the caps of data.corpora allow" in report(dataclasses.replace(run, data=mixed))
    assert "NOT READY: data.store is not set" in report(dataclasses.replace(run, data=DataConfig()))


def test_what_is_in_the_directory(run, tmp_path):
    train(dataclasses.replace(run, mesh=MeshConfig(fsdp=8)))
    assert "it contains this run, finished at step 2" in report(run)
    longer = dataclasses.replace(run, num_steps=9)
    assert "it contains a run with another configuration: num_steps: 2 -> 9 (--accept-config-change" in report(longer)
    again = dataclasses.replace(run, output_dir=str(tmp_path / "next"), init_from=run.output_dir)
    assert f"init from the weights of {run.output_dir}/checkpoints/2, with a new optimizer state" in report(again)
    wider = dataclasses.replace(again, model=dataclasses.replace(run.model, mlp_dim=128))
    assert "NOT READY: the run cannot be initialized from" in report(wider)
    assert "NOT READY: init_from is `nowhere`" in report(dataclasses.replace(again, init_from="nowhere"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    strange = dataclasses.replace(run, output_dir=str(tmp_path / "thesis"))
    assert "CANNOT START: it already contains thesis.tex" in report(strange)
    old = tmp_path / "run" / "config.json"
    old.write_text(old.read_text().replace('"seed"', '"sede"'))
    assert "sede is unknown. Use the version that wrote it" in report(run)
