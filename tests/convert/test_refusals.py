"""Foreign directories that do not fit are refused by name, and nothing of theirs is ever run."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcoder.convert.from_hf import from_hf
from jaxcoder.convert.hf_weights import open_hf_weights
from jaxcoder.convert.torch_file import read_torch_file
from jaxcoder.errors import ConversionError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def directory(tmp_path) -> Path:
    """A copy of the multi-query golden."""
    shutil.copytree(GOLDEN / "hf" / "mqa", tmp_path / "theirs")
    (tmp_path / "theirs" / "outputs.npz").unlink()
    return tmp_path / "theirs"


def refused(directory: Path) -> str:
    with pytest.raises(ConversionError) as error:
        open_hf_weights(directory)
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "?"))
    return message


def change_tensors(directory: Path, change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    path.unlink()  # the arrays of `load_file` are its own, but a hard link would not be
    change(tensors)
    save_file(tensors, path)


def change_config(directory: Path, **keys) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


LN = "transformer.h.1.ln_2.bias"
WRONG_TENSORS = {
    "missing": (lambda t: t.pop(LN), f"{LN} is missing"),
    "left over": (lambda t: t.update({"transformer.h.2.ln_1.bias": t[LN]}), "transformer.h.2.ln_1.bias is unexpected"),
    "misshapen": (lambda t: t.update({LN: t[LN][:-1]}), f"{LN} is [23] instead of [24]"),
    "transposed": (
        lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": t["transformer.h.0.mlp.c_fc.weight"].T.copy()}),
        "transformer.h.0.mlp.c_fc.weight is [24, 56] instead of [56, 24]",
    ),
    "integers": (lambda t: t.update({LN: t[LN].astype(np.int32)}), f"{LN} is I32"),
    "another head": (lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}), "lm_head.weight"),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_wrong_tensors(directory, wrong):
    change, words = WRONG_TENSORS[wrong]
    change_tensors(directory, change)
    assert words in refused(directory)


WRONG_CONFIGS = [
    ({"model_type": "gpt2"}, "'gpt2'"),
    ({"scale_attn_weights": False}, "scale_attn_weights to false"),
    ({"add_cross_attention": True}, "add_cross_attention to true"),
    ({"activation_function": "relu"}, '"relu"'),
    ({"activation_function": ["gelu"]}, "activation_function"),
    ({"n_head": 5}, "n_embd 24, which is not a multiple of n_head 5"),
    ({"n_layer": 0}, "n_layer 0"),
    ({"n_layer": "2"}, 'n_layer "2"'),
    ({"n_embd": None}, "n_embd null"),
    ({"n_layer": 3}, "transformer.h.2.ln_1.weight is missing"),
    ({"vocab_size": 96}, "transformer.wte.weight is [97, 24] instead of [96, 24]"),
    (
        {"multi_query": False, "num_key_value_heads": 3},
        "attn.c_attn.weight is [40, 24] instead of [72, 24]",
    ),
    ({"multi_query": "yes"}, "multi_query"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
]


@pytest.mark.parametrize(("keys", "words"), WRONG_CONFIGS, ids=[str(keys) for keys, _ in WRONG_CONFIGS])
def test_wrong_configs(directory, keys, words):
    change_config(directory, **keys)
    assert words in refused(directory)


def test_old_keys_and_absent_keys(directory):
    """The published config carries run-time keys, and leaves out what has the library's default."""
    path = directory / "config.json"
    keys = json.loads(path.read_text())
    for key in ("multi_query", "activation_function", "attn_pdrop", "num_key_value_heads", "layer_norm_epsilon"):
        del keys[key]
    old = {"inference_runner": 0, "pad_key_length": True, "max_batch_size": None, "summary_type": "cls_index"}
    path.write_text(json.dumps(keys | old))
    config = open_hf_weights(directory).config
    assert (config.num_kv_heads, config.activation, config.attention_dropout) == (1, "gelu_tanh", 0.1)


@pytest.mark.parametrize("size", [0, 5, 8, 100, 4000, -1])
def test_truncated_safetensors(directory, size):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors" in refused(directory)


def test_hostile_safetensors_header(directory):
    def header(entry) -> bytes:
        encoded = json.dumps({"transformer.wte.weight": entry}).encode()
        return len(encoded).to_bytes(8, "little") + encoded

    sound = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for wrong in (
        {"data_offsets": [4, 0]},
        {"data_offsets": [-4, 0]},
        {"shape": [-1]},
        {"shape": [2**40, 2**40]},
        {"dtype": "F8_E4M3"},
        {"data_offsets": [0, 10**15], "shape": [25 * 10**13]},
    ):
        (directory / "model.safetensors").write_bytes(header(sound | wrong) + bytes(4))
        refused(directory)
    (directory / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + bytes(100))
    refused(directory)


@pytest.mark.parametrize("name", ["double_key", "hole", "overlap"])
def test_headers_that_do_not_cover_the_file(directory, name):
    """Two tensors over the same bytes, bytes of no tensor, and one name twice."""
    entry = '"dtype": "F32", "shape": [1], "data_offsets"'
    header = {
        "double_key": f'{{"x": {{{entry}: [0, 4]}}, "x": {{{entry}: [4, 8]}}}}',
        "hole": f'{{"x": {{{entry}: [0, 4]}}, "y": {{{entry}: [8, 12]}}}}',
        "overlap": f'{{"x": {{{entry}: [0, 4]}}, "y": {{{entry}: [0, 4]}}}}',
    }[name].encode()
    path = directory / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    assert "not a valid safetensors file" in refused(directory)
    shared = Path(__file__).parents[2].parent / "shared/data/failing_inputs/weights" / f"{name}.safetensors"
    if shared.exists():
        path.write_bytes(shared.read_bytes())
        assert "not a valid safetensors file" in refused(directory)


def test_half_precision_is_upcast_exactly(directory):
    exact = load_file(directory / "model.safetensors")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        change_tensors(directory, lambda t: t.update({name: tensor.astype(dtype) for name, tensor in exact.items()}))
        weights = open_hf_weights(directory)
        for name, array in weights.arrays():
            assert array.dtype == np.float32
            if name == "params/wte":
                expected = exact["transformer.wte.weight"].astype(dtype).astype(np.float32)
                np.testing.assert_array_equal(array, expected)


def test_tied_head_and_masks_and_the_bare_decoder(directory):
    expected = dict(open_hf_weights(directory).arrays())

    def same():
        found = dict(open_hf_weights(directory).arrays())
        return found.keys() == expected.keys() and all((found[n] == expected[n]).all() for n in found)

    wte = "transformer.wte.weight"
    change_tensors(directory, lambda t: t.update({"lm_head.weight": t[wte].copy()}))
    assert same()
    change_tensors(directory, lambda t: t.pop(wte))
    assert same()
    change_tensors(directory, lambda t: t.update({"transformer.h.0.attn.bias": np.ones((1, 1, 64, 64), np.bool_)}))
    assert same()

    def without_prefix(tensors):
        tensors[wte] = tensors.pop("lm_head.weight")
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    change_tensors(directory, without_prefix)
    assert same()


def test_shards(directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, directory / f"model-{i:05d}-of-00002.safetensors")
    index = directory / "model.safetensors.index.json"
    weight_map = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert len(dict(open_hf_weights(directory).arrays())) == len(names) + 4  # c_attn is two of ours, twice two of them
    (directory / "model-00002-of-00002.safetensors").rename(directory / "elsewhere")
    assert "lacks model-00002-of-00002.safetensors" in refused(directory)
    for weight_map in ({"a": "../outside.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, [], {"a": ".."}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(directory)
    index.write_text("{")
    refused(directory)


def test_directories_that_hold_no_model(tmp_path, directory):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="no config.json"):
        from_hf(tmp_path / "empty", tmp_path / "out")
    (directory / "model.safetensors").unlink()
    assert "has no weights" in refused(directory)
    for text in ("", "[]", "{", "null", "[" * 100_000, "\xff"):
        (directory / "config.json").write_text(text, encoding="latin-1")
        refused(directory)
    with pytest.raises(ConversionError, match="is a file"):
        from_hf(directory / "config.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- pickles ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_stored_tensor():
    """A file of torch.save: views, shared storages, half precision, parameters."""
    tensors = read_torch_file(GOLDEN / "torch_tensors.bin")
    expected = np.load(GOLDEN / "torch_tensors.npz")
    assert sorted(tensors) == sorted(expected.files)
    for name in expected.files:
        np.testing.assert_array_equal(tensors[name].read().astype(np.float32), expected[name], err_msg=name)


def write_bin(path: Path, pickled: bytes, storages: Mapping[str, bytes] = MappingProxyType({})) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, content in storages.items():
            archive.writestr(f"archive/data/{key}", content)


class Call:
    """Pickles as a call of `function` with `arguments`: what a malicious file does."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickle_is_refused_and_not_run(directory, tmp_path, protocol):
    """Each of them would create a file when unpickled; the first assertion shows that the trap works."""
    (directory / "model.safetensors").unlink()
    trap = tmp_path / "sprung"
    for function, arguments in (
        (os.system, (f"touch {trap}",)),
        (eval, (f"open({str(trap)!r}, 'w')",)),
        (Path.touch, (trap,)),
        (__import__("shutil").copyfile, (str(directory / "config.json"), str(trap))),
    ):
        pickled = pickle.dumps({"transformer.wte.weight": Call(function, *arguments)}, protocol)
        pickle.loads(pickled)
        assert trap.exists()
        trap.unlink()
        write_bin(directory / "pytorch_model.bin", pickled)
        assert "nothing was executed" in refused(directory)
        assert not trap.exists()


@pytest.mark.parametrize(
    "asked",
    ["builtins getattr", "collections OrderedDict.fromkeys", "torch load", "torch._utils os.system", "numpy load"],
)
def test_only_exact_names_are_resolved(tmp_path, asked):
    module, name = asked.split()
    pickled = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93."
    write_bin(tmp_path / "x.bin", pickled)
    with pytest.raises(ConversionError, match="nothing was executed"):
        read_torch_file(tmp_path / "x.bin")


def torch_pickle(shape, strides, offset=0, storage="FloatStorage") -> bytes:
    """What torch.save writes for {"a": one tensor}."""

    class Writer(pickle._Pickler):
        def persistent_id(self, value):
            return ("storage", Global("torch", storage), "0", "cpu", 4) if value == "STORAGE" else None

        def save(self, value, save_persistent_id=True):
            if isinstance(value, Global):
                self.write(f"c{value.module}\n{value.name}\n".encode())
            else:
                super().save(value, save_persistent_id)

    class Global:
        def __init__(self, module, name):
            self.module, self.name = module, name

    file = io.BytesIO()
    writer = Writer(file, 2)
    writer.write(b"\x80\x02}")
    writer.save("a")
    writer.save(Global("torch._utils", "_rebuild_tensor_v2"))
    writer.save(("STORAGE", offset, shape, strides, False, {}))
    writer.write(b"Rs.")
    return file.getvalue()


def test_tensors_outside_their_storage(tmp_path):
    path = tmp_path / "x.bin"
    four = np.arange(4, dtype="<f4").tobytes()
    write_bin(path, torch_pickle((2, 2), (2, 1)), {"0": four})
    np.testing.assert_array_equal(read_torch_file(path)["a"].read(), [[0, 1], [2, 3]])
    for pickled in (
        torch_pickle((2, 3), (3, 1)),
        torch_pickle((2, 2), (2, 1), offset=1),
        torch_pickle((2, 2), (2, 1), offset=-1),
        torch_pickle((2, 2), (1000, 1)),
        torch_pickle((2, 2), (-1, 1)),
        torch_pickle((1 << 40,), (0,)),
        torch_pickle((2, 2), (2,)),
        torch_pickle((2.0,), (1,)),
        torch_pickle((4,), (1,), storage="ObjectStorage"),
    ):
        write_bin(path, pickled, {"0": four})
        with pytest.raises(ConversionError):
            read_torch_file(path)
    write_bin(path, torch_pickle((4,), (1,)))
    with pytest.raises(ConversionError, match="lacks the bytes of a"):
        read_torch_file(path)


def test_files_that_are_no_archives(tmp_path):
    path = tmp_path / "x.bin"
    whole = (GOLDEN / "torch_tensors.bin").read_bytes()
    rng = np.random.default_rng(0)
    contents = [b"", b"\x80\x02}.", whole[:-1], whole[: len(whole) // 2], pickle.dumps({})]
    for _ in range(200):  # noise anywhere in a sound file ends in our error or in a sound file, never in another error
        noisy = bytearray(whole)
        noisy[rng.integers(len(whole))] = rng.integers(256)
        contents.append(bytes(noisy))
    for content in contents:
        path.write_bytes(content)
        try:
            for tensor in read_torch_file(path).values():
                tensor.read()
        except ConversionError as error:
            assert str(path) in str(error)
    for contents in (pickle.dumps([]), pickle.dumps({"a": 1}), pickle.dumps({1: "a"}), b"\x80\x02.", b"garbage"):
        write_bin(path, contents)
        with pytest.raises(ConversionError):
            read_torch_file(path)
