"""validate: a run breaks every rule, all problems are reported at once, no garbage escapes as another error."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcoder.config import Corpus, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, Stage
from jaxcoder.config.fields import choices, hints, leaves, replace, walk
from jaxcoder.config.mesh import resolve_mesh
from jaxcoder.config.validate import validate
from jaxcoder.errors import ConfigError

GOOD = RunConfig(
    name="tiny",
    model=ModelConfig(
        num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=256, vocab_size=512, max_seq_len=128
    ),
    num_steps=100,
    global_batch_size=16,
    microbatch_size=8,
    optimizer=OptimizerConfig(warmup_steps=10),
)


def changed(name, value, config=GOOD):
    """`config` with the field of a dotted name replaced."""
    return replace(config, name, value)


def problems(config, num_devices=8):
    with pytest.raises(ConfigError) as caught:
        validate(config, num_devices)
    return str(caught.value)


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_a_good_run_passes(num_devices):
    validate(GOOD, num_devices)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_steps", 0, "num_steps is 0"),
        ("num_steps", 5, "optimizer.warmup_steps 10 is larger than num_steps 5"),
        ("global_batch_size", -8, "global_batch_size is -8"),
        ("global_batch_size", 12, "microbatch_size 8 does not divide global_batch_size 12"),
        ("global_batch_size", 20, "global_batch_size 20 is not a multiple of mesh.data x mesh.fsdp (8 devices)"),
        ("microbatch_size", 4, "microbatch_size 4 is not a multiple of mesh.data x mesh.fsdp (8 devices)"),
        ("microbatch_size", 0, "microbatch_size is 0"),
        ("seed", -1, "seed is -1"),
        ("seed", 2**63, "seed is 9223372036854775808, but must be from 0"),
        ("name", "", "name is '', but must be a non-empty string"),
        ("log_every_steps", 0, "log_every_steps is 0"),
        ("model.num_layers", 0, "model.num_layers is 0"),
        ("model.embed_dim", 72, "model.embed_dim is 72, but must equal model.num_heads 4 x model.head_dim 16 = 64"),
        ("model.num_kv_heads", 3, "model.num_heads 4 is not a multiple of model.num_kv_heads 3"),
        ("model.num_kv_heads", 0, "model.num_kv_heads is 0"),
        ("model.embed_dropout", 1.0, "model.embed_dropout is 1.0"),
        ("model.attention_dropout", -0.1, "model.attention_dropout is -0.1"),
        ("model.layer_norm_epsilon", 0.0, "model.layer_norm_epsilon is 0.0"),
        ("model.activation", "relu", 'model.activation is \'relu\', but must be "gelu_tanh" or "gelu"'),
        ("compute.loss_chunk_tokens", 0, "compute.loss_chunk_tokens is 0"),
        ("data.fim_rate", 1.5, "data.fim_rate is 1.5"),
        ("data.fim_spm_rate", -0.5, "data.fim_spm_rate is -0.5"),
        ("optimizer.peak_learning_rate", math.nan, "optimizer.peak_learning_rate is nan"),
        ("optimizer.peak_learning_rate", 1e-6, "optimizer.final_learning_rate 3e-05 is above"),
        ("optimizer.beta2", 1.0, "optimizer.beta2 is 1.0"),
        ("optimizer.decay_steps", 5, "optimizer.warmup_steps 10 is larger than optimizer.decay_steps 5"),
        ("optimizer.beta1", 1 - 1e-12, "optimizer.beta1 is 0.999999999999"),  # 1 in fp32
        (
            "optimizer.epsilon",
            1e-40,
            "optimizer.epsilon is 1e-40, but must be at least 1.2e-38, because it would be 0 in fp32",
        ),
        ("optimizer.peak_learning_rate", 1e39, "optimizer.peak_learning_rate is 1e+39, which is infinite in fp32"),
        ("num_steps", 2**31, "num_steps is 2147483648, but must be from 1 to 2147483647"),
        ("optimizer.max_grad_norm", 0.0, "optimizer.max_grad_norm is 0.0"),
        ("checkpoint.save_every_steps", 0, "checkpoint.save_every_steps is 0"),
        ("checkpoint.keep_last", 0, "checkpoint.keep_last is 0"),
        ("eval.num_windows", -1, "eval.num_windows is -1"),
        ("mesh.tensor", 3, "the mesh data 1 x fsdp -1 x tensor 3 does not fit 8 devices"),
        ("mesh.tensor", 0, "mesh.tensor is 0"),
        ("mesh.tensor", -1, "mesh.fsdp and mesh.tensor are both -1"),
        ("mesh.fsdp", 4, "the mesh data 1 x fsdp 4 x tensor 1 is 4 devices, but there are 8"),
        ("mesh.tensor", 8, "model.num_heads 4 is not a multiple of mesh.tensor (8 devices)"),
        ("num_steps", "100", "num_steps is '100', but must be an integer"),
        ("num_steps", True, "num_steps is True"),
        ("data.document_mask", 1, "data.document_mask is 1, but must be true or false"),
        ("model", None, "model is None, but must be a ModelConfig"),
    ],
)
def test_each_problem_is_named(name, value, expected):
    assert expected in problems(changed(name, value))


TWO = (Corpus(store="a", weight=1.0), Corpus(store="b", weight=3.0))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (dict(store="s", corpora=TWO), "data.store is 's' and data.corpora has 2 stores: give one or the other"),
        (dict(corpora=(Corpus(store=""),)), "data.corpora.0.store is '', but"),
        (dict(corpora=(Corpus(store="a", weight=-1.0),)), "data.corpora.0.weight is -1.0, but must be 0 or larger"),
        (
            dict(corpora=(Corpus(store="a", weight=math.nan),)),
            "data.corpora.0.weight is nan, but must be a finite number",
        ),
        (
            dict(corpora=(Corpus(store="a", weight=0.0),)),
            "the weights of data.corpora are all 0, so nothing would be read",
        ),
        (dict(corpora=(*TWO, Corpus(store="c"))), "a weight for some stores and None for others"),
        (dict(corpora=(Corpus(store="a", max_epochs=0.0),)), "data.corpora.0.max_epochs is 0.0"),
        (dict(corpora=(Corpus(store="a", max_epochs=math.inf),)), "data.corpora.0.max_epochs is inf"),
        (dict(stages=(Stage(from_sample=3),)), "data.stages.0.from_sample is 3, but the first stage must begin at 0"),
        (dict(stages=(Stage(from_sample=0), Stage(from_sample=0))), "data.stages.1.from_sample is 0, but the stage"),
        (dict(corpora=TWO, stages=(Stage(from_sample=0, weights=(1.0,)),)), "has 1 weights for 2 data.corpora"),
        (dict(corpora=TWO, stages=(Stage(from_sample=0, weights=(1.0, -2.0)),)), "data.stages.0.weights[1] is -2.0"),
        (
            dict(corpora=TWO, stages=(Stage(from_sample=0, weights=(0.0, 0.0)),)),
            "the weights of data.stages.0 are all 0",
        ),
        (
            dict(corpora=TWO, stages=(Stage(from_sample=0, weights=(1.0, math.nan)),)),
            "data.stages.0.weights[1] is nan",
        ),
        (dict(stages=(Stage(from_sample=0, global_batch_size=0),)), "data.stages.0.global_batch_size is 0"),
        (
            dict(stages=(Stage(from_sample=0, global_batch_size=4),)),
            "does not divide data.stages.0.global_batch_size 4",
        ),
        (dict(stages=(Stage(from_sample=0, global_batch_size=20),)), "20 is not a multiple of mesh.data x mesh.fsdp"),
        (dict(corpora=("a",)), "data.corpora is ('a',), but must be a tuple, each item a Corpus"),
        (dict(corpora=(Corpus(store=3),)), "data.corpora.0.store is 3, but must be a string"),
    ],
)
def test_each_problem_of_a_mixture_is_named(data, expected):
    assert expected in problems(dataclasses.replace(GOOD, data=DataConfig(**data)))


def test_a_good_mixture_passes():
    stages = (Stage(from_sample=0), Stage(from_sample=1000, weights=(1.0, 0.0), global_batch_size=32))
    validate(dataclasses.replace(GOOD, data=DataConfig(corpora=TWO, stages=stages)), 8)


def test_sizes_that_do_not_divide_name_axis_and_sizes():
    wrong = dict(num_heads=2, head_dim=33, embed_dim=66, mlp_dim=30, vocab_size=511, max_seq_len=62)
    model = dataclasses.replace(GOOD.model, **wrong)
    found = problems(dataclasses.replace(GOOD, model=model, mesh=MeshConfig(fsdp=-1, tensor=4)), 16)
    assert "model.num_heads 2 is not a multiple of mesh.tensor (4 devices)" in found
    assert "model.mlp_dim 30 is not a multiple of mesh.tensor (4 devices)" in found
    assert "model.vocab_size 511 is not a multiple of mesh.tensor (4 devices)" in found
    assert "model.max_seq_len 62 is not a multiple of mesh.tensor (4 devices): use 64" in found
    assert "model.embed_dim 66 is not a multiple of mesh.fsdp (4 devices)" in found


def test_fsdp_and_tensor_stay_in_a_slice():
    found = problems(dataclasses.replace(GOOD, mesh=MeshConfig(data=2, fsdp=4, num_slices=4)), 8)
    assert "mesh.data 2 is not a multiple of 4 slices" in found and "use --mesh.data 4" in found
    validate(dataclasses.replace(GOOD, mesh=MeshConfig(data=4, fsdp=2, num_slices=2)), 8)


def test_several_kv_heads_are_split_and_one_is_not():
    mesh = MeshConfig(fsdp=-1, tensor=4)
    validate(dataclasses.replace(GOOD, mesh=mesh), 8)
    assert "model.num_kv_heads 2" in problems(dataclasses.replace(changed("model.num_kv_heads", 2), mesh=mesh))


def test_all_problems_at_once():
    bad = changed("seed", -3, changed("data.fim_rate", 2.0, changed("mesh.tensor", 3, changed("num_steps", 0))))
    found = problems(bad)
    assert (
        len(found.splitlines()) == 5
        and "seed" in found
        and "fim_rate" in found
        and "mesh" in found
        and "num_steps" in found
    )


@pytest.mark.parametrize(
    ("mesh", "num_devices", "expected"),
    [
        (MeshConfig(), 8, (1, 8, 1)),
        (MeshConfig(fsdp=2, data=-1, tensor=2), 8, (2, 2, 2)),
        (MeshConfig(fsdp=1, tensor=-1), 1, (1, 1, 1)),
        (MeshConfig(data=-1, fsdp=2, num_slices=2), 8, (4, 2, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 2)),
    ],
)
def test_resolve_mesh(mesh, num_devices, expected):
    resolved = resolve_mesh(mesh, num_devices)
    assert (resolved.data, resolved.fsdp, resolved.tensor) == expected and resolved.num_slices == mesh.num_slices


def test_resolve_mesh_refuses():
    with pytest.raises(ConfigError, match="fsdp 4 x tensor 1 is 4 devices, but there are 8"):
        resolve_mesh(MeshConfig(fsdp=4), 8)


def numbers(config):
    """The dotted names of the fields of a config that may hold a number; mesh sizes may be -1."""
    for leaf in walk(config):
        if not leaf.name.startswith("mesh.") and {int, float} & set(choices(leaf.hint)):
            yield leaf.name


@pytest.mark.parametrize("name", [*numbers(GOOD)])
@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, -math.inf, 1e300])
def test_no_field_takes_a_negative_or_infinite_number(name, value):
    found = problems(changed(name, value))
    assert name in found and f"{value}" in found


@pytest.mark.parametrize("name", [*numbers(Corpus(store="a"))])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_no_number_of_a_corpus_is_negative_or_infinite(name, value):
    corpora = (Corpus(store="a", weight=1.0), changed(name, value, Corpus(store="b", weight=1.0)))
    assert f"data.corpora.1.{name} is {value}" in problems(dataclasses.replace(GOOD, data=DataConfig(corpora=corpora)))


def test_a_warm_up_longer_than_the_run_is_refused_whatever_the_decay():
    long = changed("optimizer.decay_steps", 600, changed("optimizer.warmup_steps", 200))
    assert "optimizer.warmup_steps 200 is larger than num_steps 100" in problems(long)
    validate(changed("optimizer.decay_steps", 600), 8)


def test_one_device_is_one():
    found = problems(changed("mesh.fsdp", 64), 1)
    assert "data 1 x fsdp 64 x tensor 1 is 64 devices, but there is 1: set one axis to -1" in found
    found = problems(changed("mesh.tensor", 2), 1)
    assert "does not fit 1 device: 1 is not a multiple of 2" in found


GARBAGE = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.none(),
    st.booleans(),
    st.just([1]),
    st.just({}),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([name for name, _ in leaves(GOOD)]), GARBAGE, max_size=4), st.integers(1, 9))
def test_garbage_never_escapes_as_another_error(values, num_devices):
    config = GOOD
    for name, value in values.items():
        config = changed(name, value, config)
    try:
        validate(config, num_devices)
    except ConfigError as error:
        assert str(error).startswith("the run configuration is invalid:")


def test_every_field_of_the_schema_is_walked():
    names = {leaf.name for leaf in walk(GOOD)}
    assert {"name", "model.num_layers", "data.corpora", "watchdog.step_seconds"} <= names
    assert {name for name in names if name.startswith("mesh.")} == {f"mesh.{name}" for name in hints(MeshConfig)}
