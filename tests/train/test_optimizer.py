"""AdamW and its schedule: against the figures of the original, optax's own AdamW, and the decay mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxcoder_configs.starcoder import starcoderbase

from jaxcoder.config import ComputeConfig, ModelConfig, OptimizerConfig
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.train.optimizer import adam, apply_adamw, is_matrix, learning_rate

MODEL = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=16, vocab_size=16, max_seq_len=8)


def test_schedule_of_starcoderbase():
    run = starcoderbase()
    expected = {1000: 1.5e-4, 2000: 3.0e-4, 126_000: 1.65e-4, 250_000: 3.0e-5, 260_000: 3.0e-5}
    for step, rate in expected.items():
        assert float(learning_rate(run.optimizer, jnp.int32(step), run.num_steps)) == pytest.approx(rate, rel=1e-5)


def test_schedule_without_warm_up_starts_at_the_peak():
    config = OptimizerConfig(peak_learning_rate=1.0, final_learning_rate=0.0, warmup_steps=0, decay_steps=10)
    rates = [float(learning_rate(config, jnp.int32(step), 100)) for step in (0, 5, 10, 50)]
    np.testing.assert_allclose(rates, [1.0, 0.5, 0.0, 0.0], atol=1e-6)


def test_decay_falls_on_matrices_only():
    model = GPTBigCode(MODEL, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
    matrices = [
        jax.tree_util.keystr(path).removesuffix(".value")
        for path, _ in jax.tree_util.tree_flatten_with_path(model)[0]
        if is_matrix(path)
    ]
    kernels = [f".h.{name}.kernel" for name in ("attn.kv", "attn.out", "attn.q", "mlp.down", "mlp.up")]
    assert sorted(matrices) == sorted([*kernels, ".wpe", ".wte"])


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.1])
def test_update_equals_optax(max_grad_norm):
    config = OptimizerConfig(max_grad_norm=max_grad_norm, weight_decay=0.3)
    model = GPTBigCode(MODEL, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
    mask = jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), model)
    reference = optax.chain(
        optax.clip_by_global_norm(max_grad_norm), optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.3, mask=mask)
    )
    expected, reference_state = model, reference.init(model)
    got, state = model, adam(config).init(model)
    for step in range(3):
        gradients = jax.tree.map(lambda x: jnp.cos(x * 100 + step), model)
        updates, reference_state = reference.update(gradients, reference_state, expected)
        expected = optax.apply_updates(expected, updates)
        got, state, norm = apply_adamw(config, got, gradients, state, jnp.float32(1e-2))
        assert float(norm) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-6)
    for have, want in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(have, want, atol=1e-6)
