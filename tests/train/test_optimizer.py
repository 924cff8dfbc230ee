"""The optimizer chain: its schedule, AdamW against a formula in numpy, the decay mask, Muon; and its state as a pytree:
sharded, saved, restored on another mesh, estimated."""

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxcoder_configs.starcoder import starcoderbase

from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.checkpoint.names import flatten_tree
from jaxcoder.config import CheckpointConfig, ComputeConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxcoder.config.schedule import learning_rate
from jaxcoder.data.loader import make_batch
from jaxcoder.errors import CheckpointError
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.train.inputs import shard_batch
from jaxcoder.train.memory_estimate import estimate_memory, saved_bytes
from jaxcoder.train.optimizer import decay_mask, make_optimizer, num_updates
from jaxcoder.train.state import abstract_state, flatten_state, initial_state, unflatten_state
from jaxcoder.train.step import make_train_step

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
MODEL = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=16, vocab_size=16, max_seq_len=8)
KERNELS = ["attn/kv", "attn/out", "attn/q", "mlp/down", "mlp/up"]


def run_config(name: str = "adamw", mesh=MeshConfig(fsdp=1), **optimizer) -> RunConfig:
    return RunConfig(
        name="x",
        model=replace(MODEL, embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0),
        num_steps=100,
        global_batch_size=8,
        compute=ComputeConfig(dtype="float32"),
        mesh=mesh,
        optimizer=OptimizerConfig(name=name, **optimizer),
    )


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_schedule_of_starcoderbase():
    run = starcoderbase()
    expected = {1000: 1.5e-4, 2000: 3.0e-4, 126_000: 1.65e-4, 250_000: 3.0e-5, 260_000: 3.0e-5}
    for step, rate in expected.items():
        for number in (step, np.int64(step), jnp.int32(step)):
            assert float(learning_rate(run.optimizer, number, run.num_steps)) == pytest.approx(rate, rel=1e-5)
    traced = jax.jit(lambda step: learning_rate(run.optimizer, step, run.num_steps))(jnp.array([*expected]))
    np.testing.assert_allclose(traced, learning_rate(run.optimizer, np.array([*expected]), run.num_steps), rtol=1e-6)


def test_schedule_without_warm_up_starts_at_the_peak():
    config = OptimizerConfig(peak_learning_rate=1.0, final_learning_rate=0.0, warmup_steps=0, decay_steps=10)
    np.testing.assert_allclose(learning_rate(config, np.array([0, 5, 10, 50]), 100), [1.0, 0.5, 0.0, 0.0], atol=1e-6)


# --- AdamW -----------------------------------------------------------------------------------------------------------


def test_decay_falls_on_matrices_only():
    mask = decay_mask(GPTBigCode(MODEL, rngs=nnx.Rngs(0)))
    decaying = [jax.tree_util.keystr(path) for path, decays in jax.tree_util.tree_flatten_with_path(mask)[0] if decays]
    kernels = [f".h.{name.replace('/', '.')}.kernel.value" for name in KERNELS]
    assert sorted(decaying) == sorted([*kernels, ".wpe.value", ".wte.value"])


def test_a_hundred_steps_of_adamw_equal_the_formula():
    """Written out in double precision. The gradients' norm is above and below the limit; step 50 is skipped, which
    moves the schedule on and nothing else."""
    run = run_config(peak_learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=10, max_grad_norm=3.0)
    config, optimizer = run.optimizer, make_optimizer(run)
    model = GPTBigCode(MODEL, rngs=nnx.Rngs(0))
    leaves = [np.float64(leaf) for leaf in jax.tree.leaves(model)]
    decays, count = jax.tree.leaves(decay_mask(model)), 0
    mu, nu = ([np.zeros_like(leaf) for leaf in leaves] for _ in range(2))
    state, update = optimizer.init(model), jax.jit(optimizer.update)
    random = np.random.default_rng(0)
    for step in range(1, 101):
        gradients = [np.float32(random.normal(size=leaf.shape) * (0.02 + 0.2 * (step % 3))) for leaf in leaves]
        if step == 50:
            continue
        updates, state = update(jax.tree.unflatten(jax.tree.structure(model), gradients), state, model, step=step)
        model = jax.tree.map(jnp.add, model, updates)

        count += 1
        norm = math.sqrt(sum(np.sum(np.float64(g) ** 2) for g in gradients))
        rate = config.peak_learning_rate * step / 10
        if step >= 10:
            rate = 1e-3 + 0.5 * 9e-3 * (1 + math.cos(math.pi * (step - 10) / 90))
        for i, g in enumerate(gradients):
            g = np.float64(g) * min(1, 3.0 / norm)
            mu[i], nu[i] = 0.9 * mu[i] + 0.1 * g, 0.95 * nu[i] + 0.05 * g * g
            delta = mu[i] / (1 - 0.9**count) / (np.sqrt(nu[i] / (1 - 0.95**count)) + config.epsilon)
            leaves[i] = leaves[i] - rate * (delta + 0.1 * decays[i] * leaves[i])
    assert num_updates(state) == 99
    for have, want in zip(jax.tree.leaves(model), leaves, strict=True):
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-6)


# --- the state of any optimizer --------------------------------------------------------------------------------------


def expected_names(name: str) -> list[str]:
    """Without the layers' numbers."""
    norms = ["h/ln_1/bias", "h/ln_1/scale", "h/ln_2/bias", "h/ln_2/scale", "ln_f/bias", "ln_f/scale"]
    others = [*norms, *(f"h/{kernel}/bias" for kernel in KERNELS), "wpe", "wte"]
    kernels = [f"h/{kernel}/kernel" for kernel in KERNELS]
    if name == "adamw":
        return ["count", *(f"{moment}/{array}" for moment in ("mu", "nu") for array in kernels + others)]
    adam = ["adam/count", *(f"adam/{moment}/{array}" for moment in ("mu", "nu") for array in others)]
    return [*adam, "muon/count", "muon/ns_coeffs", *(f"muon/mu/{kernel}" for kernel in kernels)]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_names_on_disk(name):
    state = jax.eval_shape(lambda: initial_state(run_config(name)))
    names = {array.replace("/h/00/", "/h/") for array in flatten_state(state) if "/h/01/" not in array}
    assert sorted(n for n in names if n.startswith("optimizer/")) == sorted(
        f"optimizer/{n}" for n in expected_names(name)
    )


def test_a_name_stands_for_one_array():
    with pytest.raises(ValueError, match="two arrays of the tree would both be called mu/w: give one another name"):
        flatten_tree(({"mu": {"w": jnp.zeros(1)}}, {"mu": {"w": jnp.ones(1)}}))


def steps(run: RunConfig, mesh, state, number: int, step=None):
    """`number` steps on one batch: the state, the losses and the compiled step."""
    windows = np.random.default_rng(0).integers(2, 16, (8, 9), dtype=np.int32)
    batch = shard_batch(make_batch(windows, end_id=0, pad_id=1, document_mask=False), mesh)
    step, losses = step or make_train_step(run), []
    for _ in range(number):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert int(metrics["skipped_steps"]) == 0
    return state, losses, step


FAST = dict(peak_learning_rate=2e-2, final_learning_rate=2e-2, warmup_steps=0)


def test_muon_on_another_mesh(tmp_path):
    """Its state is sharded like the weights, saved, restored on another mesh; the loss falls and is that of one device.
    What was saved is not taken for Adam's."""
    run = run_config("muon", MeshConfig(data=1, fsdp=2, tensor=2), **FAST)
    mesh = make_mesh(run.mesh, jax.devices()[:4])
    with jax.set_mesh(mesh), Checkpointer(tmp_path, CheckpointConfig(), run=run) as checkpointer:
        state, first, step = steps(run, mesh, jax.jit(lambda: initial_state(run))(), 5)
        spec = {name: array.sharding.spec for name, array in flatten_state(state).items()}
        for kernel in KERNELS:
            name = f"h/00/{kernel}/kernel"
            assert spec[f"optimizer/muon/mu/{name}"] == spec[f"params/{name}"]
            assert any(spec[f"params/{name}"])
        assert spec["optimizer/adam/nu/wte"] == spec["params/wte"]
        in_memory = sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(state.optimizer_state))
        assert estimate_memory(run).optimizer_state == in_memory
        assert saved_bytes(run) == sum(array.nbytes for array in flatten_state(state).values())
        checkpointer.save(5, flatten_state(state), {}, force=True)
        _, then, _ = steps(run, mesh, state, 5, step)

    one = replace(run, mesh=MeshConfig(fsdp=1))
    mesh = make_mesh(one.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, on_one, step = steps(one, mesh, jax.jit(lambda: initial_state(one))(), 10)
        np.testing.assert_allclose([*first, *then], on_one, rtol=2e-3)
        assert on_one[-1] < 0.85 * on_one[0]
        abstract = abstract_state(one, mesh)
        restored = unflatten_state(abstract, checkpointer.restore(5, flatten_state(abstract)))
        _, again, _ = steps(one, mesh, restored, 5, step)
        np.testing.assert_allclose(again, then, rtol=2e-3)
        adam = abstract_state(run_config("adamw"), mesh)
        with pytest.raises(CheckpointError, match="optimizer/mu/.* is missing") as caught:
            checkpointer.restore(5, flatten_state(adam))
        assert "another optimizer" in str(caught.value) and "\n" not in str(caught.value)


def test_each_matrix_is_orthogonalized_by_itself():
    """Near-orthogonal updates: per layer, keys and values apart, the singular values are all of one size."""
    run = run_config("muon", weight_decay=0.0, max_grad_norm=1e9, **FAST)
    model, optimizer = GPTBigCode(MODEL, rngs=nnx.Rngs(0)), make_optimizer(run)
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), model)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(model), model, step=1)
    arrays = {name: np.asarray(array) for name, array in flatten_tree(updates).items()}
    matrices = [arrays["h/01/attn/q/kernel"].reshape(8, 8), arrays["h/01/attn/out/kernel"].reshape(8, 8)]
    matrices += [arrays["h/00/mlp/up/kernel"], arrays["h/00/mlp/down/kernel"]]
    matrices += [arrays["h/00/attn/kv/kernel"][:, i].reshape(8, 4) for i in (0, 1)]
    for matrix in matrices:
        sizes = np.linalg.svd(matrix, compute_uv=False) / (0.2 * math.sqrt(max(matrix.shape)) * 2e-2)
        assert sizes.min() > 0.5 and sizes.max() < 1.5


# --- checkpoints of earlier versions ---------------------------------------------------------------------------------


def test_a_checkpoint_of_an_earlier_version_restores_bit_for_bit():
    """tests/golden/make_checkpoint_golden.py, on another mesh than it was saved on."""
    checkpointer = Checkpointer(GOLDEN, CheckpointConfig(), run=run_config())
    run = replace(checkpointer.run_config(3), mesh=MeshConfig(data=1, fsdp=2, tensor=2))
    mesh = make_mesh(run.mesh, jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert checkpointer.latest_step() == 3
        abstract = abstract_state(run, mesh)
        state = unflatten_state(abstract, checkpointer.restore(3, flatten_state(abstract)))
        arrays = flatten_state(state)
        expected = json.loads((GOLDEN / "crc32.json").read_text())
        assert {name: zlib.crc32(np.asarray(array).tobytes()) for name, array in arrays.items()} == expected
        assert state.step == num_updates(state.optimizer_state) == 3
