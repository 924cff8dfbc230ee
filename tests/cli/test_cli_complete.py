"""`jaxcoder complete`: output streams and error messages."""

import io
import json
from types import SimpleNamespace

import pytest
from flax import nnx

from jaxcoder.cli.main import main
from jaxcoder.config import ComputeConfig, ModelConfig
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def loaded():
    # As in tests/inference, to share compiled programs.
    config = ModelConfig(
        num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64, vocab_size=304, max_seq_len=64, init_std=0.3
    )
    model = GPTBigCode(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(2))
    return model, config, train_tokenizer(["def area(radius):\n    return 3.14159 * radius ** 2\n"] * 3, 290)


@pytest.fixture
def complete(loaded, monkeypatch, capsys):
    """Runs the verb on a tiny model; returns (exit code, standard output, standard error)."""
    import jaxcoder.inference.load

    monkeypatch.setattr(jaxcoder.inference.load, "load_model", lambda path, *, compute, step: loaded)

    def run(*arguments, stdin=b""):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        code = main(["complete", "MODEL", *arguments])
        return code, *capsys.readouterr()

    return run


def test_only_the_completion_is_on_standard_output(complete):
    code, out, status = complete("--prefix", "def area(", "--max-new-tokens", "12")
    assert code == 0 and "MODEL: 2 layers" in status and "tokens in" in status
    code, as_json, _ = complete("--prefix", "def area(", "--max-new-tokens", "12", "--json")
    answer = json.loads(as_json)
    assert code == 0 and answer["text"] == out and answer["sample"] == 0
    assert set(answer) == {"text", "finish_reason", "tokens", "log_prob", "prompt_tokens", "sample"}


def test_samples_are_reproducible(complete):
    options = ("--prefix", "a", "--temperature", "1.5", "--seed", "5", "--max-new-tokens", "12", "--json")
    _, two, _ = complete(*options, "--num-samples", "2")
    _, one, _ = complete(*options)
    assert two.splitlines()[0] == one.strip() and two.splitlines()[1] != one.strip().replace(
        '"sample": 0', '"sample": 1'
    )
    _, plain, _ = complete(*options[:-1], "--num-samples", "2")
    assert plain.startswith("--- sample 0 ---\n") and "--- sample 1 ---\n" in plain


def test_text_from_files_is_exact(complete, tmp_path, loaded):
    before = tmp_path / "before.py"
    before.write_bytes("def größe(r):\r\n    ".encode())
    options = ("--max-new-tokens", "4", "--json")
    _, out, _ = complete("--prefix-file", str(before), "--suffix-file", "-", *options, stdin=b"  \n")
    _, same, _ = complete("--prefix", "def größe(r):\r\n    ", "--suffix", "  \n", *options)
    expected = len(loaded[2].encode("def größe(r):\r\n    ")) + len(loaded[2].encode("  \n")) + 3
    assert json.loads(out) == json.loads(same) and json.loads(out)["prompt_tokens"] == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "There is no prompt"),
        (["--prefix-file", "-", "--suffix-file", "-"], "cannot both be read"),
        (["--prefix", "a", "--prefix-file", "b"], "not allowed with"),
        (["--prefix-file", "no-such-file"], "No such file"),
        (["--prefix", "a", "--stop", ""], "stop string is empty"),
        (["--prefix", "a", "--num-samples", "0"], "--num-samples is 0"),
        (["--prefix", "a", "--num-samples", "2"], "no effect with greedy decoding"),
        (["--prefix", "a", "--top-p", "0.5"], "no effect with greedy decoding"),
        (["--prefix", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prefix", "a", "--temperature", "-1"], "temperature -1.0"),
        (["--prefix", "a", "--temperature", "hot"], "--temperature is 'hot', but must be a number"),
        (["--prefix", "a", "--seed", "-1"], "seed -1"),
        (["--prefix", "a", "--step", "-1"], "--step is -1"),
        (["--prefix", "a", "--dtype", "float16"], "cannot be 'float16'"),
        (["--prefix", "a", "--tokenizer", "no-such-tokenizer"], "no-such-tokenizer"),
        (["--prefix", "a = 1\n" * 64], "context is 64"),
        (["--prefix", "\udcff"], "not UTF-8"),
    ],
)
def test_errors_are_one_sentence(complete, arguments, message):
    code, out, error = complete(*arguments)
    assert code == 2 and out == "" and "Traceback" not in error
    assert message in error.splitlines()[-1]


def test_a_tokenizer_of_another_model_is_warned_of(complete, tmp_path, loaded):
    options = ("--prefix", "a", "--max-new-tokens", "2", "--tokenizer", str(tmp_path))
    loaded[2].save(tmp_path)
    assert "warning" not in complete(*options)[2]
    train_tokenizer(["something else altogether"], 280).save(tmp_path)
    code, _, status = complete(*options)
    assert code == 0 and f"warning: {tmp_path} differs from the tokenizer of the model" in status


def test_a_prompt_that_is_too_long_may_be_cut(complete):
    code, _, status = complete("--prefix", "a = 1\n" * 64, "--truncate", "--max-new-tokens", "4")
    assert code == 0 and "4 tokens in" in status and "after a prompt of 60" in status  # 64 positions, 4 new
