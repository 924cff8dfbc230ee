"""Foreign weights are held to their format: shards and index, tying, prefixes, dtypes, values that are not finite."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcoder.convert.from_hf import from_hf
from jaxcoder.convert.hf_weights import open_hf_weights
from jaxcoder.convert.to_hf import to_hf
from jaxcoder.errors import ConversionError, DataError
from jaxcoder.tokenizer.train import train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "failing_inputs" / "weights"
WTE, LN = "transformer.wte.weight", "transformer.h.1.ln_2.bias"


@pytest.fixture
def directory(tmp_path) -> Path:
    """A copy of the multi-query golden."""
    shutil.copytree(GOLDEN / "hf" / "mqa", tmp_path / "hf")
    (tmp_path / "hf" / "outputs.npz").unlink()
    return tmp_path / "hf"


def rewrite(directory: Path, change) -> dict[str, np.ndarray]:
    path = directory / "model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    path.unlink()
    tensors = change(tensors) or tensors
    save_file(tensors, path)
    return tensors


def configure(directory: Path, remove=(), **keys) -> None:
    path = directory / "config.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps(old | keys))


def shard(directory: Path, change_map=lambda m: m, change_shards=lambda shards: None) -> None:
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    shards = {file: {name: tensors[name] for name in names[i::2]} for i, file in enumerate(files)}
    weight_map = {name: file for file, held in shards.items() for name in held}
    change_shards(shards)
    for file, held in shards.items():
        save_file(held, directory / file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": change_map(weight_map)}))


def test_shards_that_match_their_index(directory):
    expected = dict(open_hf_weights(directory).arrays())
    shard(directory)
    for name, array in open_hf_weights(directory).arrays():
        np.testing.assert_array_equal(array, expected[name])


def test_shards_that_do_not_match_their_index(directory, tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    def twice(shards):
        shards[second][LN] = shards[first].get(LN, shards[second].get(LN))
        shards[first][LN] = shards[second][LN]

    def gone(shards):
        for held in shards.values():
            held.pop(LN, None)

    cases = [
        (dict(change_shards=twice), f"{LN} is in both {first} and {second}"),
        (dict(change_shards=gone), f"{LN} is not in model-0000"),
        (
            dict(change_map=lambda m: m | {LN: second if m[LN] == first else first}),
            "but the index has it in model-0000",
        ),
        (dict(change_map=lambda m: m | {"x": "model-00003-of-00003.safetensors"}), "lacks model-00003-of-00003"),
    ]
    for i, (changes, words) in enumerate(cases):
        copy = tmp_path / str(i)
        shutil.copytree(directory, copy)
        shard(copy, **changes)
        with pytest.raises(ConversionError, match=words):
            open_hf_weights(copy)


def test_an_untied_head(directory):
    configure(directory, tie_word_embeddings=False)
    rewrite(directory, lambda t: t.pop("lm_head.weight", None) and None)
    with pytest.raises(ConversionError, match=r"tie_word_embeddings to false, but the weights have no lm_head\.weight"):
        open_hf_weights(directory)
    rewrite(directory, lambda t: t | {"lm_head.weight": t[WTE].copy()})
    assert open_hf_weights(directory).config.num_layers == 2  # equal to the embedding
    rewrite(directory, lambda t: t | {"lm_head.weight": t[WTE] + 1})
    with pytest.raises(ConversionError, match="differs from transformer.wte.weight"):
        open_hf_weights(directory)


@pytest.mark.parametrize(
    ("prefix", "words"), [("module.", "Distributed"), ("_orig_mod.", "torch.compile"), ("base_model.model.", "PEFT")]
)
def test_prefixes_of_other_programs_are_named(directory, prefix, words):
    rewrite(directory, lambda t: {prefix + name: array for name, array in t.items()})
    with pytest.raises(ConversionError, match=f"have the prefix `{prefix}` of {words}"):
        open_hf_weights(directory)


def test_santacoders_first_format_is_named(directory):
    def split(tensors):
        fused = tensors.pop("transformer.h.0.attn.c_attn.weight")
        tensors["transformer.h.0.attn.q_attn.weight"] = fused[:24].copy()
        tensors["transformer.h.0.attn.kv_attn.weight"] = fused[24:].copy()

    rewrite(directory, split)
    with pytest.raises(ConversionError, match="q_attn and kv_attn: use its GPTBigCode form"):
        open_hf_weights(directory)


def test_alias_keys(directory):
    expected = open_hf_weights(directory).config
    keys = json.loads((directory / "config.json").read_text())
    aliases = {
        "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }  # fmt: skip
    configure(directory, remove=aliases.values(), **{alias: keys[key] for alias, key in aliases.items()})
    assert open_hf_weights(directory).config == expected
    configure(directory, n_layer=3)
    with pytest.raises(ConversionError, match="n_layer 3 and its alias num_hidden_layers 2"):
        open_hf_weights(directory)


def test_ten_million_layers_are_refused_at_once(directory):
    configure(directory, n_layer=10_000_000)
    with pytest.raises(ConversionError, match="10,000,000 layers, but the weights have only"):
        open_hf_weights(directory)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda d: np.dtype(d).name)
def test_weights_come_back_in_their_own_dtype(directory, tmp_path, dtype):
    original = rewrite(directory, lambda t: {name: array.astype(dtype) for name, array in t.items()})
    from_hf(directory, tmp_path / "jax")
    to_hf(tmp_path / "jax", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == original.keys() - {"lm_head.weight"}
    for name, array in back.items():
        assert array.dtype == dtype and array.tobytes() == original[name].tobytes(), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == np.dtype(dtype).name
    to_hf(tmp_path / "jax", tmp_path / "fp32", dtype="float32")
    assert load_file(tmp_path / "fp32" / "model.safetensors")[WTE].dtype == np.float32


def test_values_that_are_not_finite(directory, tmp_path, caplog):
    def spoil(tensors):
        tensors[WTE][3, :2] = np.nan
        tensors[LN][0] = -np.inf

    rewrite(directory, spoil)
    with pytest.raises(ConversionError, match=rf"NaN or infinite: {WTE} has 2; {LN} has 1\. .*--allow-non-finite"):
        from_hf(directory, tmp_path / "jax")
    assert not (tmp_path / "jax").exists()
    from_hf(directory, tmp_path / "jax", allow_non_finite=True)
    assert f"{WTE} has 2" in caplog.text
    with pytest.raises(ConversionError, match=f"{LN} has 1 in float32"):
        to_hf(tmp_path / "jax", tmp_path / "back")
    to_hf(tmp_path / "jax", tmp_path / "back", allow_non_finite=True)
    assert np.isnan(load_file(tmp_path / "back" / "model.safetensors")[WTE][3, :2]).all()


def test_overflow_of_a_smaller_dtype_is_reported(directory, tmp_path):
    rewrite(directory, lambda t: t | {LN: np.full_like(t[LN], 1e6)})
    from_hf(directory, tmp_path / "jax")
    with pytest.raises(ConversionError, match=f"{LN} has 24 in float16"):
        to_hf(tmp_path / "jax", tmp_path / "back", dtype="float16")


def test_a_tokenizer_larger_than_the_embedding(directory, tmp_path):
    train_tokenizer(["some text " * 50], 280).save(directory)
    with pytest.raises(DataError, match="ids but the model only 97 rows"):
        from_hf(directory, tmp_path / "jax")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared folder of failing inputs")
def test_files_that_the_safetensors_library_refuses(directory):
    files = sorted(SHARED.glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        shutil.copy(file, directory / "model.safetensors")
        os.chmod(directory / "model.safetensors", 0o644)
        with pytest.raises(ConversionError, match="not a valid safetensors file"):
            open_hf_weights(directory)
        os.remove(directory / "model.safetensors")


def test_the_settings_of_a_tokenizer_survive(directory, tmp_path):
    """StarChat's end token, chat template and added tokens come back as they were."""
    tokenizer = train_tokenizer(["some text " * 50], 280)
    spec = json.loads(tokenizer.files()["tokenizer.json"])
    end = max(spec["model"]["vocab"].values()) + 1
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": end, "content": "<|end|>"})
    settings = {
        "eos_token": {"content": "<|end|>", "lstrip": False}, "pad_token": "<fim_pad>", "bos_token": "<|endoftext|>",
        "chat_template": "{{ messages }}", "additional_special_tokens": ["<|end|>"], "model_max_length": 8192,
    }  # fmt: skip
    configure(directory, vocab_size=end + 1)
    rewrite(
        directory, lambda t: {n: np.resize(a, (end + 1, 24)) if n == WTE else a for n, a in t.items() if "lm_" not in n}
    )
    for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", settings)):
        (directory / name).write_text(json.dumps(content))
    from_hf(directory, tmp_path / "jax")
    to_hf(tmp_path / "jax", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert {key: back[key] for key in settings if key != "additional_special_tokens"} == {
        key: value for key, value in settings.items() if key != "additional_special_tokens"
    }
    assert "<|end|>" in back["additional_special_tokens"]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == end
    assert config["pad_token_id"] == 4 and config["bos_token_id"] == 0


def test_a_hub_id_is_accepted_wherever_a_model_is(directory, monkeypatch, tmp_path):
    from jaxcoder.inference.load import load_model
    from jaxcoder.recipes.initial_weights import open_weights

    asked = []

    def snapshot_download(hub_id, allow_patterns):
        asked.append(hub_id)
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    expected = open_hf_weights(directory).config
    assert load_model("someone/tiny")[1] == open_weights("someone/tiny").model == expected
    from_hf("someone/tiny", tmp_path / "jax")
    assert set(asked) == {"someone/tiny"}
    (tmp_path / "someone").mkdir()
    shutil.copytree(directory, tmp_path / "someone" / "tiny")  # a directory of that name comes first
    asked.clear()
    assert load_model("someone/tiny")[1] == expected and not asked


def test_what_is_no_model_is_named(tmp_path):
    from jaxcoder.errors import CheckpointError
    from jaxcoder.inference.load import load_model

    for name, words in (
        ("tokens/zarr.json", "a token store"),
        ("train.parquet", "a corpus"),
        ("tokenizer.json", "a tok"),
    ):
        (tmp_path / words / name).parent.mkdir(parents=True)
        (tmp_path / words / name).touch()
        with pytest.raises(CheckpointError, match=f"is {words}.*, not a model: give a run's directory"):
            load_model(tmp_path / words)
