"""Tracing: what is found backwards equals what reading the whole run forwards finds."""

import argparse
import json

import numpy as np
import pytest
from hostile import hostile_documents

from jaxcoder.cli import data as data_command
from jaxcoder.config.schema import Corpus, DataConfig, ModelConfig, RunConfig, Stage
from jaxcoder.config.serialize import to_json
from jaxcoder.data.build import build_store
from jaxcoder.data.open import open_stream
from jaxcoder.data.schedule import StepHistory
from jaxcoder.data.stream import SampleStream
from jaxcoder.data.trace import Tracer, describe_batch
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents

NUM_STEPS = 60


@pytest.fixture(scope="module")
def config(store, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("second")
    own = [Document.from_text("x = 1\n" * n, repo_name="own", path=f"src/{n}.py", lang="python") for n in (3, 200)]
    write_documents(hostile_documents(150, seed=9) + own, root / "documents.jsonl")
    second = build_store(root / "documents.jsonl", tokenizer, root / "store", seed=2)
    return RunConfig(
        name="traced",
        model=ModelConfig(
            num_layers=1, embed_dim=8, num_heads=1, head_dim=8, mlp_dim=8, vocab_size=store.vocab_size, max_seq_len=48
        ),
        num_steps=NUM_STEPS,
        global_batch_size=8,
        data=DataConfig(
            corpora=(Corpus(store=store.path, weight=0.7), Corpus(store=second.path, weight=0.3, max_epochs=3.0)),
            stages=(Stage(from_sample=0), Stage(from_sample=100, global_batch_size=20)),
        ),
    )


@pytest.fixture(scope="module")
def tracer(config):
    history = StepHistory(config.global_batch_size, config.data.stages)
    return Tracer(open_stream(config), history, config.num_steps)


@pytest.fixture(scope="module")
def forwards(tracer):
    """(step, row, sample, repo_name, path) of everything that the run reads."""
    return [
        (step, traced.row, traced.sample, document.repo_name, document.path)
        for step in range(1, NUM_STEPS + 1)
        for traced in tracer.batch(step)
        for document in traced.documents
    ]


def test_documents_of_a_row_are_what_its_tokens_say(tracer):
    stream = tracer.stream
    for traced in [row for step in (1, 13, 20) for row in tracer.batch(step)]:
        window, store = stream.raw_window(traced.sample), stream.stores[traced.place.corpus]
        assert sum(document.stop - document.start for document in traced.documents) == len(window)
        assert [d.start for d in traced.documents[1:]] == [d.stop for d in traced.documents[:-1]]
        ends = np.flatnonzero(window == stream.end_id) + 1
        assert set(ends) <= {document.stop for document in traced.documents}
        first = np.searchsorted(store.document_offsets, traced.place.start, side="right") - 1
        assert traced.documents[0].path == store.documents["path"][int(first)].as_py()


def test_steps_of_a_file_are_those_that_reading_everything_finds(tracer, forwards):
    paths = {path for *_, path in forwards}
    for path in [*sorted(paths)[::97], "src/3.py", "src/200.py"]:
        readings = tracer.readings(tracer.find(path=path))
        expected = sorted({(step, row, sample) for step, row, sample, _, other in forwards if other == path})
        assert [(r.step, r.row, r.sample) for r in readings] == expected


def test_steps_of_a_repository(tracer, forwards):
    for name in ("own", "repo3"):
        readings = tracer.readings(tracer.find(repo_name=name))
        expected = sorted({(step, row, sample) for step, row, sample, other, _ in forwards if other == name})
        assert [(r.step, r.row, r.sample) for r in readings] == expected and expected
        assert {r.epoch for r in readings} != {0}
    both = tracer.readings(tracer.find(path="own/src/200.py"))
    assert both == tracer.readings(tracer.find(path="src/200.py", repo_name="own"))


def test_what_is_not_there(tracer):
    with pytest.raises(DataError, match="has the file 'lib/200.py': it has src/200.py"):
        tracer.find(path="lib/200.py")
    with pytest.raises(DataError, match="has the repository 'nobody': check the spelling"):
        tracer.find(repo_name="nobody")
    with pytest.raises(DataError, match="the steps 1 to 60, not step 61"):
        list(tracer.batch(61))
    with pytest.raises(DataError, match="rows 0 to 7, not row 8"):
        tracer.row(1, 8)


def test_the_loop_can_print_a_step(tracer):
    lines = list(describe_batch(tracer, 14, most_rows=3))
    assert lines[0] == "step 14: samples 104 to 123" and lines[-1] == "and 17 more rows"
    assert sum(line.startswith("row ") for line in lines) == 3


# --- the command -----------------------------------------------------------------------------------------------------


def run(*words):
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)
    return data_command.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def run_directory(config, tmp_path_factory):
    """A run of which 20 steps are done, the first ten of them at another batch size."""
    root = tmp_path_factory.mktemp("run")
    (root / "config.json").write_text(to_json(config))
    lines = [{"step": step, "loss": 1.0, "samples": 4 * step} for step in range(1, 11)]
    lines += [{"step": step, "loss": 1.0, "samples": 40 + 8 * (step - 10)} for step in range(11, 18)]
    lines += [{"step": 17, "eval/loss": 1.0}]
    lines += [{"step": step, "loss": 1.0, "samples": 96 + 8 + 20 * (step - 18)} for step in range(18, 21)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_trace_of_a_run_follows_its_log(run_directory, capsys, tracer):
    run("trace", run_directory, "--step", 10)
    printed = capsys.readouterr().out
    assert printed.startswith("step 10: samples 36 to 39\n") and printed.count("\nrow ") == 4
    run("trace", run_directory, "--step", 10, "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["sample"] for row in rows] == [36, 37, 38, 39]
    assert rows[0]["documents"] == [d._asdict() for d in tracer.row(5, 4).documents]
    run("trace", run_directory, "--step", 19, "--row", 2)
    assert capsys.readouterr().out.startswith("row 2: sample 106,")

    run("trace", run_directory, "--repository", "own", "--json")
    steps = {json.loads(line)["step"]: json.loads(line)["done"] for line in capsys.readouterr().out.splitlines()}
    assert set(steps.values()) == {True, False} and all(done == (step <= 20) for step, done in steps.items())
    for step in (min(steps), max(steps)):
        run("trace", run_directory, "--step", step)
        assert " own src/" in capsys.readouterr().out
    run("trace", run_directory, "--file", "src/3.py")
    assert "1 document in " in capsys.readouterr().out


def test_show(run_directory, capsys, tracer):
    run("show", run_directory, "--step", 1, "--row", 2)
    printed = capsys.readouterr().out
    assert printed.startswith("step 1 row 2: sample 2, tokens ") and "\x1b[" not in printed
    run("show", run_directory, "--step", 1)
    assert capsys.readouterr().out.count("\nstep 1 row ") == 3


def test_bad_commands(run_directory, tmp_path):
    for words in (("--step", 1, "--file", "x"), ()):
        with pytest.raises(ConfigError, match="give either --step, or --file or --repository"):
            run("trace", run_directory, *words)
    with pytest.raises(DataError, match="is not the directory of a run: it has no config.json"):
        run("trace", tmp_path, "--step", 1)
    with pytest.raises(ConfigError, match="data.store is not set"):
        run("show", "smoke", "--step", 1)
    with pytest.raises(ConfigError, match="data.store is synthetic, which stands for no files"):
        run("show", "smoke", "--data", "synthetic", "--step", 1)
    with pytest.raises(ConfigError, match="there is no run called"):
        run("show", "smokee", "--step", 1)


def test_names_from_data_cannot_forge_output(tokenizer, tmp_path):
    text = "def f(x):\n    return x\n" * 40
    write_documents(
        [Document.from_text(text, repo_name="evil\x1b[2J", path="a\n    9,999 tokens  b", lang="py\x1b[31m")],
        tmp_path / "d.parquet",
    )
    store = build_store(tmp_path / "d.parquet", tokenizer, tmp_path / "store", seed=0)
    stream = SampleStream(store, tokenizer, DataConfig(fim_rate=0.0), seq_len=64, seed=0)
    lines = list(describe_batch(Tracer(stream, StepHistory(2, ()), 3), 1))
    assert any("evil\\x1b[2J a\\n    9,999 tokens  b" in line for line in lines)
    assert all(line.isprintable() for line in lines)
    with pytest.raises(DataError) as error:
        Tracer(stream, StepHistory(2, ()), 3).find(path="9,999 tokens  b/")
    assert str(error.value).isprintable()
