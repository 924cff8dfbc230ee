"""From our checkpoints to their directories and back: bit-exact, bounded in memory, whole or not at all."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import errors as hub_errors
from safetensors.numpy import load_file

from jaxcoder.checkpoint.arrays import load_numpy
from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.checkpoint.discover import open_checkpoint
from jaxcoder.checkpoint.names import flatten_tree
from jaxcoder.cli.main import main
from jaxcoder.config import CheckpointConfig, ComputeConfig, ModelConfig, RunConfig
from jaxcoder.convert import hub
from jaxcoder.convert.from_hf import from_hf
from jaxcoder.convert.hf_names import entries, shape, to_hf_tensor, to_jax_arrays
from jaxcoder.convert.to_hf import to_hf
from jaxcoder.errors import CheckpointError, ConversionError
from jaxcoder.inference.load import load_model
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.tokenizer.train import train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "hf" / "mqa"
MODEL = ModelConfig(
    num_layers=3, embed_dim=24, num_heads=4, head_dim=6, mlp_dim=40, vocab_size=300, max_seq_len=16, activation="gelu",
    embed_dropout=0.0, residual_dropout=0.05, layer_norm_epsilon=1e-6,
)  # fmt: skip


def config_with(**changes) -> ModelConfig:
    return ModelConfig(**{**vars(MODEL), **changes})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 20, 280)


def make_run(directory: Path, config: ModelConfig = MODEL, *, tokenizer_files=None, steps=(5,)) -> Path:
    """A run with checkpoints: parameters that are random in every place, and something of an optimizer."""
    rng = np.random.default_rng(0)
    shapes = flatten_tree(jax.eval_shape(lambda: GPTBigCode(config, rngs=nnx.Rngs(0))), "params/")
    arrays = {
        name: jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape).astype(np.float32)) for name, leaf in shapes.items()
    }
    run = RunConfig(name="small", model=config, num_steps=10, global_batch_size=2)
    schedule = CheckpointConfig(keep_last=10)
    with Checkpointer(directory / "checkpoints", schedule, run=run, tokenizer_files=tokenizer_files) as checkpointer:
        for step in steps:
            checkpointer.save(step, arrays | {"optimizer/count": jax.numpy.int32(step)}, {"samples": 10}, force=True)
    return directory


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_jax_to_hf_to_jax(tmp_path, tokenizer, num_kv_heads):
    config = config_with(num_kv_heads=num_kv_heads)
    run = make_run(tmp_path / "run", config, tokenizer_files=tokenizer.files())
    summary = to_hf(run, tmp_path / "theirs")
    from_hf(tmp_path / "theirs", tmp_path / "ours")
    (first, before), (second, after) = open_checkpoint(run), open_checkpoint(tmp_path / "ours")
    assert after.model == before.model == config
    names = {name: info for name, info in before.arrays.items() if name.startswith("params/")}
    assert dict(after.arrays) == names
    left, right = load_numpy(first, names), load_numpy(second, names)
    assert all(left[name].tobytes() == right[name].tobytes() for name in names)
    assert summary.num_parameters == sum(array.size for array in left.values())
    for path in (run, run / "checkpoints", run / "checkpoints" / "5", tmp_path / "theirs", tmp_path / "ours"):
        model, loaded, found = load_model(path, compute=ComputeConfig(dtype="float32"))
        assert loaded == config and found.fingerprint == tokenizer.fingerprint
        assert flatten_tree(model)["wte"].tobytes() == left["params/wte"].tobytes()


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 1), (4, 4), (1, 1), (6, 2)])
def test_the_table_is_its_own_inverse(num_heads, num_kv_heads):
    config = config_with(num_heads=num_heads, head_dim=24 // num_heads, num_kv_heads=num_kv_heads)
    rng = np.random.default_rng(0)
    for entry in entries(config):
        theirs = rng.normal(size=shape(entry.hf_dims, config)).astype(np.float32)
        ours = to_jax_arrays(entry, theirs, config)
        assert {name: array.shape for name, array in ours.items()} == {
            name: shape(dims, config) for name, dims in entry.jax_dims.items()
        }
        np.testing.assert_array_equal(to_hf_tensor(entry, list(ours.values()), config), theirs)


def test_the_table_names_every_array_of_the_model():
    for config in (MODEL, config_with(num_layers=101), config_with(num_kv_heads=4)):
        model = flatten_tree(jax.eval_shape(lambda: GPTBigCode(config, rngs=nnx.Rngs(0))), "params/")
        table = {name: shape(dims, config) for entry in entries(config) for name, dims in entry.jax_dims.items()}
        assert table == {name: leaf.shape for name, leaf in model.items()}


def test_shards_have_an_index(tmp_path):
    run = make_run(tmp_path / "run")
    to_hf(run, tmp_path / "one")
    summary = to_hf(run, tmp_path / "many", max_shard_bytes=20_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert summary.num_files == len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(path.stat().st_size for path in files)[-2] < 24_000  # wte alone is larger
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {path.name: load_file(path) for path in files}
    assert sorted(index["weight_map"]) == sorted(whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name, tensor in whole.items():
        assert parts[index["weight_map"][name]][name].tobytes() == tensor.tobytes()


def test_tokenizer_files_are_carried_unchanged(tmp_path, tokenizer):
    run = make_run(tmp_path / "run", tokenizer_files=tokenizer.files())
    to_hf(run, tmp_path / "theirs")
    tokenizer.save(tmp_path / "expected")
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "theirs" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("convert", [to_hf, from_hf])
def test_output_directories(tmp_path, convert, monkeypatch):
    source = make_run(tmp_path / "run") if convert is to_hf else GOLDEN
    out = tmp_path / "out"
    out.mkdir()
    convert(source, out)  # an empty one is fine
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ConversionError, match="not empty.*--overwrite"):
        convert(source, out)
    convert(source, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="is a file"):
        convert(source, tmp_path / "file")
    # A failure in the middle leaves what was there, and nothing half-written beside it.
    module = sys.modules[convert.__module__]
    culprit = "write_safetensors" if convert is to_hf else "write_manifest"

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, culprit, fail)
    for target in (out, tmp_path / "new"):
        with pytest.raises(ConversionError, match="No space left on device"):
            convert(source, target, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == before
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"] + ["run"] * (convert is to_hf)


def test_nothing_but_a_converted_model_is_overwritten(tmp_path, monkeypatch, tokenizer):
    run = make_run(tmp_path / "run", tokenizer_files=tokenizer.files())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for out in (run, run / "checkpoints" / "5", *map(Path, ("thesis", "tokenizer", ".", "thesis/.."))):
        for convert, source in ((to_hf, run), (from_hf, GOLDEN)):
            with pytest.raises(
                ConversionError, match="contains other files than a converted model|is the source itself"
            ):
                convert(source, out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    from_hf(GOLDEN, tmp_path / "ours")
    with pytest.raises(ConversionError, match="is the source itself"):
        to_hf(tmp_path / "ours", tmp_path / "ours", overwrite=True)
    to_hf(tmp_path / "ours", tmp_path / "model")
    from_hf(GOLDEN, tmp_path / "model", overwrite=True)
    to_hf(tmp_path / "ours", tmp_path / "model", overwrite=True)


def test_from_hf_does_not_overwrite_its_source(tmp_path):
    with pytest.raises(ConversionError, match="is the source itself"):
        from_hf(GOLDEN, GOLDEN, overwrite=True)
    assert (GOLDEN / "model.safetensors").exists()


def test_models_that_the_format_cannot_hold(tmp_path):
    run = make_run(tmp_path / "run", config_with(num_kv_heads=2))
    with pytest.raises(ConversionError, match="2 key/value heads for 4 query heads"):
        to_hf(run, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_what_is_no_model_is_refused_in_one_sentence(tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "contains no model"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_model(path)
        with pytest.raises(CheckpointError):
            to_hf(path, tmp_path / "out")
    unfinished = make_run(tmp_path / "run") / "checkpoints" / "5"
    (unfinished / "manifest.json").unlink()
    for path in (tmp_path / "run", unfinished.parent):
        with pytest.raises(CheckpointError, match="no checkpoint in .* is complete"):
            load_model(path)
        assert "not finished" in caplog.text
    with pytest.raises(CheckpointError):
        load_model(unfinished)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_hub_ids():
    assert all(map(hub.is_hub_id, ("bigcode/starcoder", "gpt2", "a/b-c_d.e")))
    assert not any(map(hub.is_hub_id, ("", "/a/b", "a/b/c", "./a", "../a", "a b", "~/x", "a/")))


def test_fetches_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        return str(GOLDEN)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    from_hf("someone/tiny", tmp_path / "out")
    assert len(asked) == 1 and asked[0][0] == "someone/tiny" and "model*.safetensors" in asked[0][1]
    assert load_model(tmp_path / "out")[1].vocab_size == 97


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    headers, request, status_code = {}, None, 403


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: hub_errors.GatedRepoError("no", response=Response()), "is gated: accept its terms at https://"),
        (lambda: hub_errors.RepositoryNotFoundError("no", response=Response()), "there is no model someone/x"),
        (lambda: hub_errors.LocalEntryNotFoundError("offline"), "could not be downloaded from the hub (offline)"),
        (lambda: OSError("network unreachable\nmore"), "could not be downloaded from the hub (network unreachable)"),
    ],
)
def test_hub_errors_are_one_sentence(tmp_path, monkeypatch, error, words):
    def snapshot_download(*arguments, **options):
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConversionError) as refusal:
        from_hf("someone/x", tmp_path / "out")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_offline_hub_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "jaxcoder.cli.main", "convert", "from-hf", "someone/x", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    assert (
        done.stderr.count("\n") == 1 and "someone/x is not a local directory and could not be downloaded" in done.stderr
    )


# --- the command line -------------------------------------------------------------------------------------------------


def test_command_line_there_and_back(tmp_path, tokenizer, capsys):
    run = make_run(tmp_path / "run", tokenizer_files=tokenizer.files(), steps=(4, 5))
    assert main(["convert", "to-hf", str(run), str(tmp_path / "theirs"), "--step", "4"]) == 0
    output = capsys.readouterr().out
    assert "of step 4 to" in output and "with its tokenizer" in output
    assert main(["convert", "from-hf", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert main(["convert", "from-hf", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["checkpoint", "inspect", str(tmp_path / "ours"), "--verify"]) == 0
    output = capsys.readouterr().out
    assert "step         0" in output and "files match their checksums" in output


def test_inspect(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=(4, 5))
    (run / "checkpoints" / "6" / "state").mkdir(parents=True)
    assert main(["checkpoint", "inspect", str(run), "--verify"]) == 0
    output = capsys.readouterr().out
    model = flatten_tree(jax.eval_shape(lambda: GPTBigCode(MODEL, rngs=nnx.Rngs(0))))
    parameters = sum(leaf.size for leaf in model.values())
    for words in (
        "step         5   (other steps: 4, 6 (unfinished))",
        f"parameters   {parameters:,}",
        "name=small",
        "samples      10",
        "params/h/00..02/attn/kv/kernel",
        "24x2x1x6",
        "optimizer/count",
        "files match their checksums",
    ):
        assert words in output, words
    largest = max((run / "checkpoints" / "5").rglob("*"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["checkpoint", "inspect", str(run)]) == 0
    assert main(["checkpoint", "inspect", str(run), "--verify"]) == 2
    assert "was altered" in capsys.readouterr().err
    for arguments in ([str(run), "--step", "7"], [str(tmp_path)], [str(run / "nowhere")]):
        assert main(["checkpoint", "inspect", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Fourteen more layers, 147 MB of weights, need little more memory, neither way (in a fresh process)."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    script = """
        import json, sys, threading
        from pathlib import Path
        import numpy as np
        from jaxcoder.checkpoint import arrays
        from jaxcoder.config import ModelConfig
        from jaxcoder.convert import hf_config, hf_names, safetensors
        from jaxcoder.convert.from_hf import from_hf
        from jaxcoder.convert.to_hf import to_hf

        arrays.CHUNK_BYTES = 16 * 2**20

        def make(directory, num_layers):
            config = ModelConfig(num_layers=num_layers, embed_dim=512, num_heads=8, head_dim=64, mlp_dim=2048,
                                 vocab_size=1024, max_seq_len=64)
            directory.mkdir(parents=True)
            shapes = {e.hf_name: hf_names.shape(e.hf_dims, config) for e in hf_names.entries(config)}
            rng = np.random.default_rng(0)
            tensors = ((name, rng.random(size, np.float32)) for name, size in shapes.items())
            safetensors.write_safetensors(directory / "model.safetensors", shapes, tensors)
            (directory / "config.json").write_text(json.dumps(hf_config.hf_config(config, end_of_text=0)))

        def peak(work, *arguments):
            highest, done = [0], threading.Event()
            def watch():
                while not done.wait(0.002):
                    # Not the pages of the memory-mapped source, which the kernel may drop at any time.
                    now = open("/proc/self/status").read().split("RssAnon:")[1].split()[0]
                    highest[0] = max(highest[0], int(now) / 1024)
            thread = threading.Thread(target=watch)
            thread.start()
            work(*arguments)
            done.set()
            thread.join()
            return highest[0]

        for num_layers in (4, 18):
            directory = Path(sys.argv[1]) / str(num_layers)
            make(directory / "theirs", num_layers)
            reading = peak(from_hf, directory / "theirs", directory / "ours")
            print(reading, peak(to_hf, directory / "ours", directory / "back"))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    # One heap: with one per thread, glibc keeps much of what was freed.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    small, large = (list(map(float, line.split())) for line in done.stdout.splitlines())
    assert large[0] - small[0] < 90 and large[1] - small[1] < 90, done.stdout
