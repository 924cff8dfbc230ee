"""load_run: finding runs by name and by file, overrides, and what every mistake is answered with."""

import dataclasses
import re
import sys
from types import ModuleType

import pytest

from jaxcoder.config import Corpus, DataConfig, ModelConfig, RunConfig, Stage, fields
from jaxcoder.config.load import available_runs, load_run, with_store
from jaxcoder.config.overrides import apply_overrides
from jaxcoder.config.serialize import diff
from jaxcoder.config.variant import SWITCHES
from jaxcoder.errors import ConfigError

FILE = '''
from jaxcoder.config import ModelConfig, RunConfig

def _model() -> ModelConfig:
    return ModelConfig(num_layers=2, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=32)

def model(layers) -> ModelConfig:
    return _model()

def small() -> RunConfig:
    """A small run."""
    return RunConfig(name="small", model=_model(), num_steps=10, global_batch_size=2)
'''


@pytest.fixture
def file(tmp_path):
    def write(text=FILE, name="my_run.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A `jaxcoder_configs` of our own with the runs small and large."""
    (tmp_path / "models.py").write_text(FILE + FILE.replace("small", "large"))
    package = ModuleType("jaxcoder_configs")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "jaxcoder_configs", package)
    monkeypatch.delitem(sys.modules, "jaxcoder_configs.models", raising=False)
    yield
    sys.modules.pop("jaxcoder_configs.models", None)


RUN = RunConfig(
    name="x",
    model=ModelConfig(num_layers=1, embed_dim=4, num_heads=2, head_dim=2, mlp_dim=8),
    num_steps=3,
    global_batch_size=2,
)


# --- names and files -------------------------------------------------------------------------------------------------


def test_by_name(installed):
    assert load_run("large").name == "large"
    assert available_runs() == {"small": "A small run.", "large": "A large run."}


@pytest.mark.parametrize(("name", "near"), [("smal", "small"), ("Large", "large")])
def test_unknown_name_suggests(installed, name, near):
    expected = rf"no run called '{name}' \(did you mean `{near}`\?\)\. Choose one of small, large, or"
    with pytest.raises(ConfigError, match=expected):
        load_run(name)


def test_by_file(file):
    path = file()
    assert load_run(path).name == load_run(f"{path}:small").name == "small"
    assert load_run(path, ["--model.num_layers", "7"]).model.num_layers == 7


TWO = FILE + "def tiny() -> RunConfig:\n    return small()\n"


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        (FILE, ":smal", r"has no function 'smal'.*did you mean `small`"),
        (TWO, "", r"has 2 functions that return a RunConfig \(small, tiny\): choose one, as in .*my_run.py:small"),
        ("x = 1", "", "has 0 functions.*write one"),
        ("def run(", "", "fails when imported: SyntaxError"),
        ("import nothing_of_this_name", "", "fails when imported: ModuleNotFoundError"),
        ("raise SystemExit(3)", "", "fails when imported: SystemExit: 3"),
        ("def run(): exit(4)", "", "fails: SystemExit: 4"),
        ("def run(): return 1", "", "returns int: it must return a RunConfig"),
        ("def run(): raise KeyError('k')", "", "fails: KeyError"),
        (FILE.replace("mlp_dim", "mlp_dims"), "", r"argument 'mlp_dims' \(did you mean `mlp_dim`\?\)"),
        (FILE.replace("num_steps=10", "num_steps='10'"), "", "num_steps is '10', but must be an integer"),
        (FILE.replace("small()", "small(layers)"), "", "needs the arguments layers"),
        ("def run(layers, width): ...", "", "the run .* needs the arguments layers, width: give each of"),
        ("def run(layers): ...", ":run", "the run .* needs the arguments layers"),
        ("def model(layers) -> int: ...", "", "has 0 functions.*write one"),
    ],
)
def test_files_that_do_not_work(file, text, suffix, expected):
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        load_run(file(text) + suffix)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("no/such/file.py", "there is no file"), ("some/where", "is not a Python file"), ("x.py", "no file")],
)
def test_paths_that_are_not_there(name, expected):
    with pytest.raises(ConfigError, match=expected):
        load_run(name)


def test_a_file_may_define_dataclasses_and_postpone_annotations(file):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 2\n"
    )
    assert load_run(file(text + FILE.replace("num_steps=10", "num_steps=A().x"))).num_steps == 2


def test_the_installed_configs_load():
    runs = available_runs()
    for name in runs:
        assert isinstance(load_run(name), RunConfig)
        assert runs[name], f"the run {name} has no docstring"


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", []),
        ("--num-steps 5", ["num_steps: 3 -> 5"]),
        ("--num_steps=5", ["num_steps: 3 -> 5"]),
        ("--num-steps 5 --num-steps 6", ["num_steps: 3 -> 6"]),
        ("--optimizer.peak-learning-rate 1e-3", ["optimizer.peak_learning_rate: 0.0003 -> 0.001"]),
        ("--optimizer.decay_steps 7 --mesh.fsdp=-1", ["optimizer.decay_steps: None -> 7"]),
        ("--microbatch-size None --tensorboard", ["tensorboard: False -> True"]),
        ("--data.document-mask --data.no-document-mask", []),
        (
            "--compute.attention blockwise --mesh.data -1",
            ["compute.attention: None -> blockwise", "mesh.data: 1 -> -1"],
        ),
        ("--data.store gs://a/b", ["data.store:  -> gs://a/b"]),
    ],
)
def test_overrides(overrides, expected):
    assert diff(RUN, apply_overrides(RUN, overrides.split())) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("--num-step 5", "no field `--num-step` (did you mean `--num-steps`?)"),
        ("--learning-rate 5", "(did you mean `--optimizer.peak-learning-rate`?)"),
        ("--num-layers 5", "(did you mean `--model.num-layers`?)"),
        ("--model.embeddim 5", "(did you mean `--model.embed-dim`?)"),
        ("--optimiser.beta1 5", "(did you mean `--optimizer.beta1`?)"),
        ("--zzz 5", "no field `--zzz`. See"),
        ("--model 5", "`--model` is a group of fields: set one of them, such as `--model.num-layers`"),
        ("--data.stages 5", "`--data.stages` is a list of Stage: write it in the run's Python function"),
        ("--num-steps five", "`--num-steps` is 'five', but must be an integer."),
        ("--num-steps 3.5", "`--num-steps` is '3.5', but must be an integer."),
        ("--num-steps", "`--num-steps` has no value: it must be an integer."),
        ("--num-steps --seed 3", "`--num-steps` has no value"),
        ("--optimizer.beta1 big", "but must be a number."),
        ("--microbatch-size x", "but must be an integer or None."),
        ("--compute.attention flash", 'but must be "reference" or "blockwise" or "flash_tpu" or "cudnn" or None.'),
        ("--tensorboard=True", "`--tensorboard` takes no value"),
        ("--tensorboard True", "unexpected argument 'True'"),
        ("num_steps=5", "unexpected argument 'num_steps=5': set a field as `--field value`"),
        ("5", "unexpected argument '5'"),
        ("-n 5", "unexpected argument '-n'"),
    ],
)
def test_wrong_overrides_are_one_sentence(overrides, expected, capfd):
    with pytest.raises(ConfigError) as caught:
        apply_overrides(RUN, overrides.split())
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_overrides_of_a_mixture():
    data = DataConfig(corpora=(Corpus(store="a"), Corpus(store="b")), stages=(Stage(from_sample=0),))
    mixed = dataclasses.replace(RUN, data=data)
    changed = apply_overrides(
        mixed, ["--data.corpora.1.max-epochs", "2", "--data.stages.0.weights", "1", "0.5", "--num-steps", "5"]
    )
    assert changed.data.corpora[1].max_epochs == 2 and changed.data.stages[0].weights == (1, 0.5)
    for overrides, expected in (
        ("--data.corpora.2.weight 1", "there is no field `--data.corpora.2.weight`"),
        (
            "--data.corpora a,b",
            "`--data.corpora` is a group of fields: set one of them, such as `--data.corpora.0.store`",
        ),
        ("--data.stages.0.weights 1 x", "`--data.stages.0.weights` is 'x', but must be a tuple, each item a number"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            apply_overrides(mixed, overrides.split())
    alone = with_store(mixed, "c").data
    assert (alone.store, alone.corpora, alone.stages) == ("c", (), (Stage(from_sample=0),))


def test_help_prints_the_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        apply_overrides(RUN, ["--num-steps", "5", "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert "--optimizer.peak-learning-rate FLOAT  (value: 0.0003)" in output and "Windows per optimizer step" in output
    assert "--num-steps INT  (value: 5)" in output and "--data.document-mask, --data.no-document-mask" in output


def test_a_variant_sets_every_switch_and_overrides_come_after_it(file):
    path = file(FILE)
    mended = load_run(path, variant="mended").data
    trained = load_run(path, ["--data.no-pad-in-loss"], variant="as_trained").data
    assert mended == load_run(path).data  # mended is the default
    changed = {name for name in SWITCHES if getattr(mended, name) != getattr(trained, name)}
    assert changed == set(SWITCHES) - {"pad_in_loss"} and not trained.pad_in_loss
    assert {name for name, doc in fields.docs(DataConfig).items() if doc.startswith("As trained:")} == set(SWITCHES)
