"""The chunked cross-entropy against the plain one: values, gradients, shards, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcoder.config import MeshConfig
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.sharding.rules import ShardingRules
from jaxcoder.train.loss import token_losses

RULES = ShardingRules()


def draw(vocab=96, embed=16, batch=4, length=6):
    rng = np.random.default_rng(0)
    hidden, wte = rng.normal(size=(batch, length, embed)), rng.normal(size=(vocab, embed))
    targets = rng.integers(0, vocab, (batch, length))
    targets[0, :2] = 0, vocab - 1
    return hidden.astype(np.float32), wte.astype(np.float32), targets.astype(np.int32)


def plain(hidden, wte, targets):
    logits = jnp.einsum("bsd,vd->bsv", hidden, wte)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]


def summed(losses):
    return (losses * jnp.arange(1, losses.size + 1).reshape(losses.shape)).sum()


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 96, 1000])
def test_equals_the_plain_loss_for_any_chunk(chunk_size):
    hidden, wte, targets = draw()

    def chunked(hidden, wte):
        return token_losses(hidden, wte, targets, chunk_size=chunk_size, rules=RULES)

    np.testing.assert_allclose(jax.jit(chunked)(hidden, wte), plain(hidden, wte, targets), rtol=1e-5)
    got = jax.jit(jax.grad(lambda *x: summed(chunked(*x)), argnums=(0, 1)))(hidden, wte)
    expected = jax.grad(lambda *x: summed(plain(*x, targets)), argnums=(0, 1))(hidden, wte)
    for have, want in zip(got, expected):
        np.testing.assert_allclose(have, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 1, 4), (1, 1, 8), (4, 1, 1)])
def test_equals_the_plain_loss_on_meshes(shape):
    hidden, wte, targets = draw()
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    rows = ("data", "fsdp")

    with jax.set_mesh(mesh):
        ids = put(targets, rows, None)

        @jax.jit
        def run(hidden, wte):
            def loss(hidden, wte):
                losses = token_losses(hidden, wte, ids, chunk_size=5, rules=RULES)
                return (losses * put(np.arange(1, 25, dtype=np.float32).reshape(4, 6), rows, None)).sum(), losses

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, wte)

        (_, losses), gradients = run(put(hidden, *RULES.for_length(6).spec("batch", "seq", None)), put(wte, "tensor", "fsdp"))
    np.testing.assert_allclose(losses, plain(hidden, wte, targets), rtol=1e-5)
    expected = jax.grad(lambda *x: summed(plain(*x, targets)), argnums=(0, 1))(hidden, wte)
    for have, want in zip(gradients, expected):
        np.testing.assert_allclose(have, want, atol=2e-5, rtol=1e-5)


def test_logits_never_exist_whole():
    batch, length, embed, vocab = 2, 512, 16, 8192
    shapes = [((batch, length, embed), jnp.float32), ((vocab, embed), jnp.float32), ((batch, length), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def temporaries(loss):
        gradient = jax.jit(jax.grad(lambda h, w, t: loss(h, w, t).sum(), argnums=(0, 1)))
        return gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    logits = batch * length * vocab * 4
    assert temporaries(plain) >= logits
    assert temporaries(lambda h, w, t: token_losses(h, w, t, chunk_size=512, rules=RULES)) < logits / 4
