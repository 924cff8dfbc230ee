"""The training step on drawn meshes of up to eight devices: the loss and gradients of one device, and its very dropout
masks."""

import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from jaxcoder.config import ComputeConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxcoder.data.loader import make_batch
from jaxcoder.kernels.dropout.api import Site, make_key
from jaxcoder.models.gpt_bigcode import Dropout, apply_dropout
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.sharding.ops import shard_map
from jaxcoder.train.inputs import shard_batch
from jaxcoder.train.state import initial_state
from jaxcoder.train.step import make_train_step

NUM_ROWS, SEQ_LEN, END, PAD = 16, 24, 0, 1
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(shape) <= 8]


def run_config(
    *, kv_heads: int, dropout: float, document_mask: bool, microbatch_size: int | None, remat: str
) -> RunConfig:
    model = ModelConfig(
        num_layers=2, embed_dim=32, num_heads=8, head_dim=4, mlp_dim=64, num_kv_heads=kv_heads, vocab_size=64,
        max_seq_len=SEQ_LEN, embed_dropout=dropout, residual_dropout=dropout, attention_dropout=dropout, init_std=0.1,
    )  # fmt: skip
    run = RunConfig(
        name="meshes",
        model=model,
        num_steps=10,
        global_batch_size=NUM_ROWS,
        microbatch_size=microbatch_size,
        compute=ComputeConfig(dtype="float32", remat=remat, loss_chunk_tokens=32),
        # The first moments are then the gradients, the norm is never reached, and no gradient is divided by itself.
        optimizer=OptimizerConfig(beta1=0.0, max_grad_norm=1e9, epsilon=1.0, warmup_steps=0),
    )
    return replace(run, data=replace(run.data, document_mask=document_mask))


def make_windows(seed: int) -> np.ndarray:
    """Random windows with document ends, some padded at the right."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(2, 64, (NUM_ROWS, SEQ_LEN + 1), dtype=np.int32)
    windows[rng.random(windows.shape) < 0.1] = END
    for row in range(0, NUM_ROWS, 3):
        windows[row, rng.integers(1, SEQ_LEN) :] = PAD
    return windows


def one_step(run: RunConfig, shape: tuple[int, int, int], windows: np.ndarray):
    """(metrics, gradients, weights after it)."""
    devices = jax.devices()[: math.prod(shape)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    batch = make_batch(windows, end_id=END, pad_id=PAD, document_mask=run.data.document_mask)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(run))()
        state, metrics = make_train_step(run)(state, shard_batch(batch, mesh))
        return [
            jax.tree.map(np.asarray, jax.tree.leaves(x))
            for x in (metrics, optax.tree.get(state.optimizer_state, "mu"), state.model)
        ]


def assert_equal_one_device(shape, seed: int, **settings) -> None:
    run, windows = run_config(**settings), make_windows(seed)
    expected, found = one_step(run, (1, 1, 1), windows), one_step(run, shape, windows)
    for name, want, have in zip(("metrics", "gradients", "weights"), expected, found, strict=True):
        for x, y in zip(want, have, strict=True):
            scale = max(np.abs(x).max(), 1e-3)
            np.testing.assert_allclose(y, x, rtol=1e-4, atol=2e-5 * scale, err_msg=f"{name} on {shape}, {settings}")


DRAWN = dict(
    shape=st.sampled_from(SHAPES[1:]),
    seed=st.integers(0, 2**31),
    kv_heads=st.sampled_from((1, 8)),
    dropout=st.sampled_from((0.0, 0.0, 0.3)),
    document_mask=st.booleans(),
    microbatch_size=st.sampled_from((None, 8)),
    remat=st.sampled_from(("none", "minimal", "offload", "block")),
)
COMMON = dict(
    deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate]
)  # every example is compiled: too slow to shrink


def test_multi_query_on_eight_devices_equals_one():
    assert_equal_one_device(
        (2, 2, 2), 7, kv_heads=1, dropout=0.3, document_mask=True, microbatch_size=8, remat="minimal"
    )


def test_multi_head_on_four_devices_equals_one():
    assert_equal_one_device(
        (1, 2, 2), 8, kv_heads=8, dropout=0.3, document_mask=False, microbatch_size=None, remat="block"
    )


@pytest.mark.slow
@settings(max_examples=60, **COMMON)
@given(**DRAWN)
def test_many_drawn_meshes_equal_one_device(**drawn):
    assert_equal_one_device(**drawn)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_each_mesh_equals_one_device(shape):
    for kv_heads in (1, 8):
        assert_equal_one_device(
            shape, 7, kv_heads=kv_heads, dropout=0.1, document_mask=True, microbatch_size=8, remat="minimal"
        )


def masks(shape: tuple[int, int, int], kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Which probabilities (row, query, head, key) and which features (row, position, feature) survive on a mesh."""
    run = run_config(kv_heads=kv_heads, dropout=0.4, document_mask=False, microbatch_size=None, remat="none")
    devices = jax.devices()[: math.prod(shape)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))

    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: initial_state(run)).model
        rules, length = model.rules, run.model.head_dim
        values = np.zeros((NUM_ROWS, length, kv_heads, length), np.float32) + np.eye(length, dtype=np.float32)[:, None]
        q_spec, kv_spec = (rules.spec("batch", None, heads, None) for heads in ("heads", "kv_heads"))
        arrays = [
            (np.zeros((NUM_ROWS, length, 8, length), np.float32), q_spec),
            (np.zeros_like(values), kv_spec),
            (values, kv_spec),
            (np.ones((NUM_ROWS, SEQ_LEN, 32), np.float32), rules.spec("batch", "seq", None)),
            (np.arange(NUM_ROWS, dtype=np.int32), rules.spec("batch")),
        ]

        def reveal(q, k, v, x, rows):
            """Every value is the unit vector of its key, and all queries are alike: what comes out are the masks."""
            dropout = Dropout(key=make_key(5, 3), rows=rows)
            attended = model.h.attn._attend(q, k, v, jnp.int32(1), None, dropout, rules)  # weights play no part
            return attended, apply_dropout(x, 0.4, dropout, Site.MLP_RESIDUAL, 1, rules=rules)

        specs = tuple(spec for _, spec in arrays)
        reveal = shard_map(reveal, in_specs=specs, out_specs=(q_spec, specs[3]))
        arguments = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in arrays]
        attended, features = jax.jit(reveal)(*arguments)
        return np.asarray(attended) != 0, np.asarray(features) != 0


@pytest.mark.parametrize("kv_heads", [1, 8], ids=["mqa", "mha"])
def test_dropout_masks_are_identical(kv_heads):
    attended, features = masks((1, 1, 1), kv_heads)
    causal = np.tril(np.ones((4, 4), bool))[:, None]
    assert not (attended & ~causal).any()
    assert 0.5 < attended[np.broadcast_to(causal, attended.shape)].mean() < 0.7 and 0.55 < features.mean() < 0.65
    for shape in ((2, 2, 2), (1, 8, 1), (1, 1, 8), (4, 1, 2)):
        other = masks(shape, kv_heads)
        np.testing.assert_array_equal(other[0], attended, err_msg=str(shape))
        np.testing.assert_array_equal(other[1], features, err_msg=str(shape))
