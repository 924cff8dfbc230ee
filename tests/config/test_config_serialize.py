"""JSON of configs: the golden, exact round trips, strict reading, fingerprints and differences."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcoder.config import Corpus, DataConfig, ModelConfig, OptimizerConfig, RunConfig, Stage
from jaxcoder.config.serialize import diff, fingerprint, from_json, model_fingerprint, to_dict, to_json
from jaxcoder.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden" / "run.json"

RUN = RunConfig(
    name="golden",
    model=ModelConfig(
        num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=256, vocab_size=512, max_seq_len=128
    ),
    num_steps=100,
    global_batch_size=16,
    optimizer=OptimizerConfig(peak_learning_rate=1e-3, max_grad_norm=1),
)


def test_golden():
    """The file on disk is an interface: checkpoints written today are read by later versions. A new field changes this
    golden deliberately, and needs a default that keeps the behaviour of older runs."""
    assert to_json(RUN) == GOLDEN.read_text()
    assert from_json(GOLDEN.read_text()) == RUN
    assert fingerprint(RUN) == "5336cb0d9d60876f"
    assert model_fingerprint(RUN.model) == "f605472006fdca20"


def test_a_field_that_a_file_lacks_has_its_default():
    plain = to_dict(RUN)
    del plain["watchdog"], plain["seed"], plain["optimizer"]["max_skipped_steps"]
    assert from_json(json.dumps(plain)) == RUN


MIXED = dataclasses.replace(
    RUN,
    data=DataConfig(
        corpora=(Corpus(store="a", weight=1), Corpus(store="b", weight=0.5, max_epochs=2)),
        stages=(Stage(from_sample=0), Stage(from_sample=640, weights=(0, 1), global_batch_size=32)),
    ),
)


def test_mixtures_round_trip():
    again = from_json(to_json(MIXED))
    assert again == MIXED and again.data.stages[1].weights == (0.0, 1.0) and fingerprint(again) == fingerprint(MIXED)
    heavier = dataclasses.replace(MIXED.data.corpora[1], weight=2.0)
    changed = dataclasses.replace(MIXED, data=dataclasses.replace(MIXED.data, corpora=(MIXED.data.corpora[0], heavier)))
    assert diff(MIXED, changed) == ["data.corpora.1.weight: 0.5 -> 2.0"]
    assert fingerprint(changed) != fingerprint(MIXED)
    assert diff(RUN, MIXED)[:2] == ["data.corpora: () -> (absent)", "data.stages: () -> (absent)"]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda data: data.update(corpora=3), "data.corpora is 3, but must be a tuple"),
        (lambda data: data["corpora"][1].pop("store"), "data.corpora.1.store is missing"),
        (lambda data: data["corpora"].append("c"), 'data.corpora.2 is "c", but must be an object'),
        (lambda data: data["stages"][1].update(weights=["x"]), "data.stages.1.weights is"),
        (lambda data: data["stages"][1].update(until=3), "data.stages.1.until is unknown"),
    ],
)
def test_strict_reading_of_mixtures(edit, expected):
    plain = to_dict(MIXED)
    edit(plain["data"])
    with pytest.raises(ConfigError) as caught:
        from_json(json.dumps(plain))
    assert expected in str(caught.value)


def test_model_alone():
    assert from_json(to_json(RUN.model), ModelConfig) == RUN.model


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        OptimizerConfig,
        peak_learning_rate=st.floats(allow_nan=False, allow_infinity=False),
        warmup_steps=st.integers(),
        decay_steps=st.none() | st.integers(),
        weight_decay=st.integers(0, 3),
    ),
    st.text(),
)
def test_round_trip(optimizer, name):
    config = dataclasses.replace(RUN, optimizer=optimizer, name=name)
    text = to_json(config)
    assert from_json(text) == config and to_json(from_json(text)) == text
    assert fingerprint(from_json(text)) == fingerprint(config)


def test_one_and_one_point_zero_are_one_config():
    whole = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, max_grad_norm=1))
    point = dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, max_grad_norm=1.0))
    assert fingerprint(whole) == fingerprint(point) and to_json(whole) == to_json(point)


def edited(edit):
    plain = to_dict(RUN)
    edit(plain)
    return json.dumps(plain)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "the content is \\[\\], but must be an object"),
        (edited(lambda plain: plain.pop("num_steps")), "num_steps is missing"),
        (edited(lambda plain: plain["model"].pop("mlp_dim")), "model.mlp_dim is missing"),
        (edited(lambda plain: plain.update(sede=1)), "sede is unknown"),
        (edited(lambda plain: plain["mesh"].update(context=1)), "mesh.context is unknown"),
        (edited(lambda plain: plain.update(seed="1")), 'seed is "1", but must be an integer'),
        (edited(lambda plain: plain.update(seed=1.5)), "seed is 1.5, but must be an integer"),
        (edited(lambda plain: plain.update(tensorboard=0)), "tensorboard is 0, but must be true or false"),
        (edited(lambda plain: plain.update(model=None)), "model is null, but must be an object with fields"),
        (edited(lambda plain: plain["compute"].update(remat="all")), 'compute.remat is "all", but must be "none" or'),
    ],
)
def test_strict_reading_names_what_is_wrong(text, expected):
    with pytest.raises(ConfigError, match=f"runs/x/config.json.*{expected}"):
        from_json(text, source="runs/x/config.json")


def test_every_problem_is_named_at_once():
    def edit(plain):
        del plain["num_steps"], plain["model"]["mlp_dim"]
        plain["new"] = plain["eval"]["new"] = 1

    with pytest.raises(ConfigError) as caught:
        from_json(edited(edit))
    assert all(name in str(caught.value) for name in ("num_steps is", "model.mlp_dim is", "new is", "eval.new is"))


def test_numbers_that_json_lacks_are_refused():
    bad = dataclasses.replace(RUN, optimizer=OptimizerConfig(peak_learning_rate=float("nan")))
    with pytest.raises(ConfigError, match=r"optimizer\.peak_learning_rate must be a finite number"):
        to_json(bad)


def test_diff_is_readable():
    new = dataclasses.replace(
        RUN, optimizer=dataclasses.replace(RUN.optimizer, peak_learning_rate=3e-4), microbatch_size=8, name="other"
    )
    assert diff(RUN, new) == [
        "name: golden -> other",
        "microbatch_size: None -> 8",
        "optimizer.peak_learning_rate: 0.001 -> 0.0003",
    ]
    assert diff(RUN, RUN) == []


def test_fingerprint_sees_every_field():
    assert fingerprint(RUN) != fingerprint(dataclasses.replace(RUN, seed=RUN.seed + 1))
    deep = dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, activation="gelu"))
    assert fingerprint(RUN) != fingerprint(deep)
    assert model_fingerprint(RUN.model) != model_fingerprint(deep.model)
