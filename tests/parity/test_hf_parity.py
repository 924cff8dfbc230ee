"""Logits, greedy tokens, loss and gradients equal those of transformers, and the way back gives the same files.

Tolerance: 5e-5 in logits whose standard deviation is about 2.5; another order of sums alone gives up to 7e-6.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxcoder.checkpoint.names import flatten_tree
from jaxcoder.config import ComputeConfig, MeshConfig
from jaxcoder.convert.from_hf import from_hf
from jaxcoder.convert.hf_names import entries, to_hf_tensor
from jaxcoder.convert.to_hf import to_hf
from jaxcoder.errors import CheckpointError
from jaxcoder.inference.load import load_model
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.sharding.mesh import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "hf"
REFERENCE = Path(__file__).parents[3] / "shared" / "data" / "gpt_bigcode_reference"
FP32 = ComputeConfig(dtype="float32", remat="none")
TOLERANCE = 5e-5

CASES = {
    "golden mqa": (GOLDEN / "mqa", GOLDEN / "mqa" / "outputs.npz"),
    "golden mha": (GOLDEN / "mha", GOLDEN / "mha" / "outputs.npz"),
    "mqa": (REFERENCE / "mqa" / "safetensors", REFERENCE / "mqa" / "outputs.npz"),
    "mqa sharded": (REFERENCE / "mqa" / "sharded", REFERENCE / "mqa" / "outputs.npz"),
    "mqa bin": (REFERENCE / "mqa" / "bin", REFERENCE / "mqa" / "outputs.npz"),
    "mha": (REFERENCE / "mha" / "safetensors", REFERENCE / "mha" / "outputs.npz"),
}
GOLDENS, REFERENCES = ["golden mqa", "golden mha"], ["mqa", "mha"]


def load(case: str) -> tuple[GPTBigCode, Path, dict[str, np.ndarray]]:
    directory, outputs = CASES[case]
    skip_without(directory)
    return load_model(directory, compute=FP32)[0], directory, dict(np.load(outputs))


def skip_without(directory: Path) -> None:
    if not directory.is_dir():
        pytest.skip(f"{directory.parent.name}/{directory.name} of the shared references is not here")


@jax.jit
def forward(model, ids, positions=None, segment_ids=None):
    return model.logits(model(ids, positions=positions, segment_ids=segment_ids))


def assert_close(found, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_the_way_back(case, tmp_path):
    model, directory, outputs = load(case)
    assert_close(forward(model, outputs["ids"]), outputs["logits"])
    from_hf(directory, tmp_path / "ours")
    ours, config, _ = load_model(tmp_path / "ours", compute=FP32)
    for left, right in zip(jax.tree.leaves(model), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(left, right)
    to_hf(tmp_path / "ours", tmp_path / "theirs")
    again, config_again, _ = load_model(tmp_path / "theirs", compute=FP32)
    assert config == config_again
    assert_close(forward(again, outputs["ids"]), outputs["logits"])
    original = directory.parent / "safetensors" if case.startswith("mqa ") else directory
    same_tensors(original / "model.safetensors", tmp_path / "theirs" / "model.safetensors")
    same_meaning(
        json.loads((directory / "config.json").read_text()), json.loads((tmp_path / "theirs/config.json").read_text())
    )


def same_tensors(left: Path, right: Path) -> None:
    """By the library's own reader: bit for bit."""
    expected, found = load_file(left), load_file(right)
    assert sorted(expected) == sorted(found)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype and tensor.tobytes() == found[name].tobytes(), name


def same_meaning(expected: dict, found: dict) -> None:
    renamed = {"dtype": "torch_dtype"}
    absent = {"transformers_version", "pad_token_id", "num_key_value_heads", "add_cross_attention"}
    for key, value in expected.items():
        if key not in absent:
            assert found[renamed.get(key, key)] == value, key


@pytest.mark.parametrize("case", GOLDENS)
def test_greedy_tokens(case):
    model, _, outputs = load(case)
    ids, tokens = outputs["prompt"], outputs["tokens"]
    padded = np.zeros((ids.shape[0], ids.shape[1] + tokens.shape[1]), np.int32)
    padded[:, : ids.shape[1]] = ids
    for end in range(ids.shape[1], padded.shape[1]):
        padded[:, end] = np.asarray(forward(model, padded)[:, end - 1]).argmax(-1)
    np.testing.assert_array_equal(padded[:, ids.shape[1] :], tokens)


@pytest.mark.parametrize("case", REFERENCES)
def test_whole_window_and_hidden_states(case):
    model, _, outputs = load(case)
    logits = forward(model, outputs["full_ids"])
    assert_close(logits[:, outputs["full_rows"]], outputs["full_logits"].reshape(1, len(outputs["full_rows"]), -1))
    hidden = jax.jit(lambda model, ids: model(ids))(model, outputs["ids"][:1])
    assert_close(hidden, outputs["hidden_3"])


@pytest.mark.parametrize("case", REFERENCES)
def test_left_padding_by_positions(case):
    """Pads are another segment; the positions count the tokens alone."""
    model, _, outputs = load(case)
    mask = outputs["pad_mask"].astype(np.int32)
    logits = forward(model, outputs["pad_ids"], outputs["pad_position_ids"].clip(0).astype(np.int32), mask)
    assert_close(np.asarray(logits) * mask[..., None], outputs["pad_logits"] * mask[..., None])


@pytest.mark.parametrize("case", REFERENCES)
def test_loss_and_gradients(case):
    model, _, outputs = load(case)
    ids = outputs["ids"]

    def loss(model):
        scores = jax.nn.log_softmax(model.logits(model(ids))[:, :-1])
        return -jnp.take_along_axis(scores, ids[:, 1:, None], -1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    np.testing.assert_allclose(value, outputs["loss"], rtol=1e-5)
    flat = {name: np.asarray(array) for name, array in flatten_tree(gradient, "params/").items()}
    # The tied embedding appears in their list once, with the gradient of both uses.
    norms = dict(zip(map(str, outputs["grad_names"]), outputs["grad_l2"], strict=True))
    for entry in entries(model.config):
        theirs = to_hf_tensor(entry, [flat[name] for name in entry.jax_dims], model.config)
        np.testing.assert_allclose(np.linalg.norm(theirs), norms[entry.hf_name], rtol=1e-4, err_msg=entry.hf_name)
        if f"grad/{entry.hf_name}" in outputs:
            np.testing.assert_allclose(theirs, outputs[f"grad/{entry.hf_name}"], atol=1e-6, rtol=1e-4)


def test_exact_gelu(tmp_path):
    directory, npz = CASES["mqa"]
    skip_without(directory)
    keys = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | {"activation_function": "gelu"}))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    outputs = np.load(npz)
    model, config, _ = load_model(tmp_path, compute=FP32)
    assert config.activation == "gelu"
    assert_close(forward(model, outputs["ids"]), outputs["logits_gelu_erf"])
    assert np.abs(outputs["logits_gelu_erf"] - outputs["logits"]).max() > 1e-3  # a mix-up would show


def test_long_positions():
    directory = REFERENCE / "long" / "safetensors"
    skip_without(directory)
    outputs = np.load(REFERENCE / "long" / "outputs.npz")
    model, _, _ = load_model(directory, compute=FP32)
    logits = forward(model, outputs["ids"])[0]
    rows = outputs["rows"]
    assert_close(logits[rows], outputs["logits"].reshape(len(rows), -1))
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1), outputs["argmax_all"].reshape(-1))


def test_a_directory_in_pytorch_format_has_no_steps():
    with pytest.raises(CheckpointError, match="is one model in PyTorch format and has no step 3"):
        load_model(GOLDEN / "mqa", step=3)


@pytest.mark.parametrize("case", GOLDENS)
def test_loading_straight_onto_a_mesh(case, tmp_path):
    directory, npz = CASES[case]
    outputs = np.load(npz)
    plain, config, _ = load_model(directory, compute=FP32)
    from_hf(directory, tmp_path / "ours")
    # 97 rows of vocabulary and 3 heads cannot be split, so no tensor axis.
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=1))
    for path in (directory, tmp_path / "ours"):
        model, _, _ = load_model(path, compute=FP32, mesh=mesh)
        assert model.wte[...].sharding.mesh == mesh and model.h.mlp.up.kernel[...].sharding.spec[1] == "fsdp"
        for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(model), strict=True):
            np.testing.assert_array_equal(left, right)
        with jax.set_mesh(mesh):
            rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
            ids = jax.device_put(np.tile(outputs["ids"], (4, 1)), rows)
            assert_close(np.asarray(forward(model, ids))[:2], outputs["logits"])
