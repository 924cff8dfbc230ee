"""The chunked cross-entropy against the plain one: values, gradients, shards, memory, matmuls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcoder.config import MeshConfig
from jaxcoder.models.loss import token_losses, weighted_loss
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.sharding.rules import ShardingRules

RULES = ShardingRules()


def draw(vocab=96, embed=16, batch=4, length=6):
    """hidden, wte, targets, and weights of which some are 0."""
    rng = np.random.default_rng(0)
    hidden, wte = rng.normal(size=(batch, length, embed)), rng.normal(size=(vocab, embed))
    targets = rng.integers(0, vocab, (batch, length))
    targets[0, :2] = 0, vocab - 1
    weights = np.arange(batch * length).reshape(batch, length) % 7
    return hidden.astype(np.float32), wte.astype(np.float32), targets.astype(np.int32), weights.astype(np.float32)


def plain(hidden, wte, targets):
    logits = jnp.einsum("bsd,vd->bsv", hidden, wte)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def plain_sum(hidden, wte, targets, weights):
    return (plain(hidden, wte, targets) * weights).sum()


def by_tokens(hidden, wte, targets, weights, **options):
    return (token_losses(hidden, wte, targets, **options) * weights).sum()


SUMS = [weighted_loss, by_tokens]


def assert_all_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("total", SUMS)
@pytest.mark.parametrize("chunk_size", [1, 7, 12, 24, 1000])
def test_equals_the_plain_loss_for_any_chunk(chunk_size, total):
    arrays = draw()
    losses = jax.jit(partial(token_losses, chunk_size=chunk_size, rules=RULES))(*arrays[:3])
    np.testing.assert_allclose(losses, plain(*arrays[:3]), rtol=1e-5)
    ours = partial(total, chunk_size=chunk_size, rules=RULES)
    found = jax.jit(jax.value_and_grad(lambda *x: 3 * ours(*x), argnums=(0, 1, 3)))(*arrays)
    assert_all_close(found, jax.value_and_grad(lambda *x: 3 * plain_sum(*x), argnums=(0, 1, 3))(*arrays))
    np.testing.assert_allclose(jax.jit(ours)(*arrays), plain_sum(*arrays), rtol=1e-5)


@pytest.mark.parametrize("total", SUMS)
@pytest.mark.parametrize(
    "shape, length", [((1, 4, 2), 6), ((2, 1, 4), 6), ((1, 1, 8), 8), ((4, 1, 1), 6), ((2, 2, 2), 6)]
)
def test_equals_the_plain_loss_on_meshes(shape, length, total):
    """Sequences are split over `tensor` where it divides them; elsewhere whole on every device of it."""
    arrays = draw(length=length)
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    ids = PartitionSpec(("data", "fsdp"), None)

    with jax.set_mesh(mesh):
        specs = RULES.for_length(length).spec("batch", "seq", None), PartitionSpec("tensor", "fsdp"), ids, ids
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs)]
        ours = partial(total, chunk_size=5, rules=RULES)
        losses = jax.jit(partial(token_losses, chunk_size=5, rules=RULES))(*placed[:3])
        found = jax.jit(jax.value_and_grad(lambda *x: 3 * ours(*x), argnums=(0, 1, 3)))(*placed)
        for gradient, spec in zip(found[1], (specs[0], specs[1], ids)):
            assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), gradient.ndim)
    np.testing.assert_allclose(losses, plain(*arrays[:3]), rtol=1e-5)
    assert_all_close(found, jax.value_and_grad(lambda *x: 3 * plain_sum(*x), argnums=(0, 1, 3))(*arrays))


def test_in_bf16_the_table_gradient_is_added_up_in_fp32():
    hidden, wte, targets, weights = draw(batch=8, length=128)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    exact = jax.grad(plain_sum, argnums=1)(hidden.astype(jnp.float32), jnp.asarray(wte, jnp.bfloat16), targets, weights)
    for total in SUMS:
        found = jax.grad(partial(total, chunk_size=8, rules=RULES), argnums=1)(hidden, wte, targets, weights)
        assert found.dtype == jnp.float32
        error = np.linalg.norm(np.asarray(found - exact, np.float64)) / np.linalg.norm(np.asarray(exact, np.float64))
        assert error < 4e-3, (total, error)  # 128 chunks added up in bf16 are 10 times as far off


def compiled(loss, batch=2, length=512, embed=16, vocab=8192):
    shapes = [((batch, length, embed), jnp.float32), ((vocab, embed), jnp.float32), ((batch, length), jnp.int32),
              ((batch, length), jnp.float32)]  # fmt: skip
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return gradient.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


def test_logits_never_exist_whole():
    logits = 2 * 512 * 8192 * 4
    assert compiled(plain_sum).memory_analysis().temp_size_in_bytes >= logits
    for total in SUMS:
        found = compiled(partial(total, chunk_size=64, rules=RULES))
        assert found.memory_analysis().temp_size_in_bytes < logits / 4


def test_the_loss_to_train_on_needs_three_matmuls():
    def matmuls(total):
        text = compiled(partial(total, chunk_size=64, rules=RULES)).as_text()
        return sum(" dot(" in line or "matmul" in line for line in text.splitlines() if " = " in line)

    assert matmuls(by_tokens) - matmuls(weighted_loss) == 1
