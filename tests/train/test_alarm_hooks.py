"""What the loop does about bad steps and bad evaluations, each fault planted in a real run of a tiny model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.config import CheckpointConfig, Corpus, DataConfig, EvalConfig, MeshConfig, RunConfig, Stage
from jaxcoder.data.build import build_store
from jaxcoder.errors import TrainingError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.record.metrics import read_metrics
from jaxcoder.tokenizer.train import train_tokenizer
from jaxcoder.train import loop
from jaxcoder.train.loop import train
from jaxcoder.train.optimizer import num_updates


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, str]:
    """Token stores by one tokenizer: Python, C, both held out, and noise."""
    root = tmp_path_factory.mktemp("stores")
    python = [open(__import__(name).__file__, encoding="utf-8").read() for name in ("argparse", "ast", "shlex")]
    c = "".join(f"static int field_{n % 7} = table[{n % 5}];\n/* {n % 3} */\nreturn -EINVAL;\n" for n in range(900))
    noise = bytes(np.random.default_rng(0).integers(33, 127, 60_000, dtype=np.uint8)).decode()
    tokenizer = train_tokenizer([*python, c], 512)
    texts = {
        "python": [("python", text, f"lib/{number}.py") for number, text in enumerate(python[:2])],
        "c": [("c", c, "drivers/x.c")],
        "held_out": [("python", python[2], "shlex.py"), ("c", c[:1500], "y.c")],
        "noise": [("", noise, "vendor/blob.min.js")],
    }
    for name, documents in texts.items():
        parts = [Document.from_text(text, lang=lang, path=path) for lang, text, path in documents]
        write_documents(parts, root / f"{name}.parquet")
        build_store(root / f"{name}.parquet", tokenizer, root / name, seed=0)
    return {name: str(root / name) for name in texts}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def config(output_dir, data, **changes) -> RunConfig:
    run = smoke()
    model = dataclasses.replace(run.model, embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0)
    defaults = dict(
        output_dir=str(output_dir),
        model=model,
        data=data,
        num_steps=12,
        global_batch_size=4,
        optimizer=dataclasses.replace(run.optimizer, peak_learning_rate=3e-3, warmup_steps=1, decay_steps=1000),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        compute=dataclasses.replace(run.compute, dtype="float32"),
        checkpoint=CheckpointConfig(save_every_steps=1000),
    )
    return dataclasses.replace(run, **(defaults | changes))


def alarms(run: RunConfig) -> list[tuple[int, str, str]]:
    records = read_metrics(f"{run.output_dir}/metrics.jsonl")
    found = [(record["step"], name, text) for record in records for name, text in record.items()]
    return [(step, name.removeprefix("alarm/"), text) for step, name, text in found if name.startswith("alarm/")]


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the losses of some steps NaN; gives the weights before and after every step."""
    make, seen, bad = loop.make_train_step, [], set()

    def poisoning(config):
        step = make(config)

        def run(state, batch):
            number = int(state.step) + 1
            if number in bad:
                batch = batch._replace(loss_mask=batch.loss_mask * jnp.nan)
            before = jax.device_get(state.model)
            state, metrics = step(state, batch)
            seen.append((number, before, jax.device_get(state.model), int(num_updates(state.optimizer_state))))
            return state, metrics

        return run

    monkeypatch.setattr(loop, "make_train_step", poisoning)
    return bad, seen


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_step_that_is_not_finite_is_skipped(stores, tmp_path, poisoned, caplog):
    caplog.set_level("INFO", "jaxcoder")
    bad, seen = poisoned
    bad |= {3, 7, 8}
    run = config(tmp_path / "run", DataConfig(store=stores["python"]))
    train(run)
    for number, before, after, count in seen:
        assert same(before, after) == (number in bad)
        assert count == number - len([b for b in bad if b <= number])
    records = {r["step"]: r for r in read_metrics(f"{run.output_dir}/metrics.jsonl") if "loss" in r}
    assert [step for step, r in records.items() if r["skipped"]] == [3, 7, 8]
    assert all(math.isnan(r["loss"]) == (step in bad) for step, r in records.items())
    assert records[12]["skipped_steps"] == 3 and records[12]["samples"] == 48
    log = caplog.text
    assert "step 7: skipped, its loss is not finite (2 so far)" in log
    files = log.split("step 7: skipped")[1].split("step 8")[0]
    assert "samples 24 to 27" in files and "lib/" in files


def test_many_in_a_row_end_the_run(stores, tmp_path, poisoned):
    bad, _ = poisoned
    bad |= {2, 5, 6, 7, 8}
    run = config(tmp_path / "run", DataConfig(store=stores["python"]), checkpoint=CheckpointConfig(save_every_steps=4))
    limited = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, max_skipped_steps=3))
    message = r"not finite in 3 steps in a row \(5 to 7\).*data trace .* --step 5.*lower"
    with pytest.raises(TrainingError, match=message) as caught:
        train(limited)
    assert caught.value.exit_code == 2
    bad.clear()
    assert train(limited).step == 12  # from step 4
    records = [r for r in read_metrics(f"{run.output_dir}/metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records] == list(range(1, 13)) and records[-1]["skipped_steps"] == 1


def test_a_batch_of_noise_is_a_spike_and_its_files_are_named(stores, tmp_path, caplog):
    caplog.set_level("INFO", "jaxcoder")
    corpora = (Corpus(store=stores["python"], weight=1.0), Corpus(store=stores["noise"], weight=0.0))
    stages = (
        Stage(from_sample=0),
        Stage(from_sample=4 * 300, weights=(0.0, 1.0)),
        Stage(from_sample=4 * 301, weights=(1.0, 0.0)),
    )
    run = config(tmp_path / "run", DataConfig(corpora=corpora, stages=stages), num_steps=310)
    train(run)
    ((step, rule, message),) = alarms(run)
    assert (step, rule) == (301, "loss_spike") and message.startswith("the loss jumped to ")
    log = caplog.text.split("step 301: loss_spike")[1]
    assert "vendor/blob.min.js" in log and "lib/0.py" not in log


def test_a_learning_rate_that_is_too_high_is_noticed_by_the_gradients(stores, tmp_path):
    run = config(tmp_path / "run", DataConfig(store=stores["python"]), num_steps=115)
    train(run)
    assert alarms(run) == []
    much = dataclasses.replace(run.optimizer, peak_learning_rate=1.0)
    train(dataclasses.replace(run, num_steps=160, optimizer=much), accept_config_change=True)
    assert "unstable_gradients" in [rule for _, rule, _ in alarms(run)]


def test_a_language_that_is_no_longer_read_is_noticed(stores, tmp_path):
    corpora = tuple(Corpus(store=stores[name], weight=1.0) for name in ("python", "c"))
    stages = (Stage(from_sample=0), Stage(from_sample=4 * 40, weights=(1.0, 0.0)))
    data = DataConfig(corpora=corpora, stages=stages, eval_store=stores["held_out"], fim_rate=0.0)
    run = config(tmp_path / "run", data, num_steps=120, eval=EvalConfig(every_steps=20, num_windows=1000))
    train(run)
    step, rule, message = alarms(run)[-1]
    assert rule == "language_regression" and step > 40
    assert message.startswith("held-out bits per byte rise while the mean falls: c from ")
    (last,) = [r for r in read_metrics(f"{run.output_dir}/metrics.jsonl") if r["step"] == 120 and "eval/loss" in r]
    parts = [last[f"eval/lang/{name}/tokens"] for name in ("c", "python")]
    assert sum(parts) == last["eval/tokens"]
