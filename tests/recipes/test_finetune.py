"""Fine-tuning a tiny model: metrics of every language before and after, interruptions, errors."""

import dataclasses
import json

import jax
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.cli.main import main
from jaxcoder.config import DataConfig, EvalConfig, OptimizerConfig
from jaxcoder.convert.to_hf import to_hf
from jaxcoder.data.build import build_store
from jaxcoder.errors import ConfigError, DataError, JaxcoderError
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.recipes import finetune as finetune_module
from jaxcoder.recipes.finetune import LanguageChange, compare, finetune, table
from jaxcoder.tokenizer.train import train_tokenizer
from jaxcoder.train.loop import train

PYTHON = [
    f"def f{i}(x, y):\n    if x > {i}:\n        return y * {i}\n    return [x + {i} for x in range(y)]\n\n\n" * 4
    for i in range(60)
]
C = [
    f"static int f{i}(int x, int y)\n{{\n\tif (x > {i}) {{\n\t\treturn y * {i};\n\t}}\n\treturn x + {i};\n}}\n\n" * 4
    for i in range(60)
]
OVERRIDES = [
    "--global-batch-size=8", "--eval.num-windows=16", "--eval.every-steps=10", "--optimizer.peak-learning-rate=1e-2",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Stores of Python and C, and a base run on both, as a checkpoint and in Hugging Face format."""
    root = tmp_path_factory.mktemp("finetune")
    tokenizer = train_tokenizer(PYTHON + C, 400)
    texts = {"Python": PYTHON, "C": C}
    documents = {lang: [Document.from_text(text, lang=lang) for text in texts[lang]] for lang in texts}
    subsets = {
        "both": documents["Python"][:50] + documents["C"][:50],
        "python": documents["Python"][:50],
        "held_out": documents["Python"][50:] + documents["C"][50:],
        "held_out_c": documents["C"][50:],
    }
    for name, selected in subsets.items():
        write_documents(selected, root / f"{name}.parquet")
        build_store(root / f"{name}.parquet", tokenizer, root / name, seed=0)
    write_documents(documents["C"], root / "c.parquet")
    build_store(root / "c.parquet", train_tokenizer(C, 300), root / "other_tokenizer", seed=0)
    run = dataclasses.replace(
        smoke(),
        output_dir=str(root / "base"),
        num_steps=40,
        data=DataConfig(store=str(root / "both")),
        compute=dataclasses.replace(smoke().compute, dtype="float32"),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2),
        eval=EvalConfig(every_steps=1000),
    )
    train(run)
    to_hf(run.output_dir, root / "hf")
    return root


def test_languages_before_and_after_a_python_fine_tune(root, capsys):
    """From Hugging Face format; a second call computes nothing and prints the same table."""
    output = root / "tuned"
    command = ["finetune", str(root / "hf"), "--data", str(root / "python"), "--output-dir", str(output), *OVERRIDES]
    command += ["--steps", "40", "--held-out", str(root / "held_out"), "--held-out", str(root / "held_out_c")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    report = json.loads((output / "retention.json").read_text())
    python, c = report["languages"]
    assert (python["name"], python["is_trained_on"], c["name"], c["is_trained_on"]) == ("Python", True, "C", False)
    assert python["after"] < python["before"] and c["change"] > python["change"]
    assert report["before"]["eval/lang/C/tokens"] == report["after"]["eval/lang/C/tokens"] == c["tokens"]
    assert (
        (output / "retention.txt").read_text() in printed and "Python*" in printed and "of 1 other languages" in printed
    )
    evaluated = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in evaluated if "eval/lang/C/bits_per_byte" in line]
    assert steps == [10, 20, 30, 40]

    assert main(command) == 0
    assert capsys.readouterr().out.strip().startswith("language")
    assert json.loads((output / "retention.json").read_text())["languages"] == report["languages"]


def test_resumes_after_an_interruption_between_stages(root, tmp_path, monkeypatch):
    """After the first evaluation: it is not repeated, and the result equals that of an uninterrupted run."""
    stores = dict(store=str(root / "python"), held_out=[str(root / "held_out")])
    arguments = dict(**stores, num_steps=40, overrides=OVERRIDES)
    expected = finetune(str(root / "base"), output_dir=str(tmp_path / "uninterrupted"), **arguments)
    interrupted = dict(output_dir=str(tmp_path / "interrupted"), **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "pretrain", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(str(root / "base"), **interrupted)
    assert not (tmp_path / "interrupted" / "retention.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(finetune_module, "HeldOut", lambda *_: pytest.fail("evaluated again"))
        assert finetune(str(root / "base"), **interrupted) == expected


def test_errors_before_anything_is_written(root, tmp_path):
    base, output = str(root / "base"), tmp_path / "run"
    stores = dict(store=str(root / "python"), held_out=[str(root / "held_out")])
    arguments = dict(**stores, output_dir=str(output), num_steps=2)
    for changes, error, expected in (
        (dict(held_out=[]), ConfigError, "there is no held-out store: give `--held-out STORE`"),
        (dict(held_out=[str(root / "missing")]), DataError, "There is no token store at"),
        (dict(held_out=[str(root / "other_tokenizer")]), JaxcoderError, "trained with another tokenizer"),
        (dict(num_steps=0), ConfigError, "--steps is 0"),
        (dict(overrides=["--seed", "-1"]), ConfigError, "seed is -1"),
    ):
        with pytest.raises(error, match=expected):
            finetune(base, **(arguments | changes))
    with pytest.raises(JaxcoderError, match="missing`, which does not exist"):
        finetune("./missing", **arguments)
    assert not output.exists()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="contains other files"):
        finetune(base, **(arguments | dict(output_dir=str(tmp_path))))


def test_fields_that_have_an_option_of_the_command(capsys):
    base = ["finetune", "x", "--data", "a", "--held-out", "b"]
    assert main([*base, "--num-steps", "3"]) == 2 and "--num-steps is set by --steps" in capsys.readouterr().err
    assert main([*base, "--data.store", "c"]) == 2 and "--data.store is set by --data" in capsys.readouterr().err


def test_the_table():
    before = {f"eval/lang/{name}/{what}": value for name, bits in (("Python", 1.0), ("C", 1.2), ("Go", 1.5))
              for what, value in (("bits_per_byte", bits), ("tokens", 1000.0))}  # fmt: skip
    after = before | {"eval/lang/Python/bits_per_byte": 0.9, "eval/lang/C/bits_per_byte": 1.26}
    languages = compare(before, after, {"Python"})
    assert [language.name for language in languages] == ["Python", "C", "Go"]
    assert languages[1] == LanguageChange(name="C", is_trained_on=False, tokens=1000, before=1.2, after=1.26)
    lines = table(languages)
    assert lines[1].split() == ["Python*", "1,000", "1.0000", "0.9000", "-10.0%"]
    assert lines[-1] == "1 of 2 other languages got worse; largest change: C, +5.0%."


def test_help_and_missing_options(capsys):
    assert main(["finetune", "x", "--help"]) == 0
    assert "--optimizer.peak-learning-rate" in capsys.readouterr().out
    assert main(["finetune", "x"]) == 2 and "no training data: give `--data STORE`" in capsys.readouterr().err
