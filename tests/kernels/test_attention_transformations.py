"""Attention in shards of heads and of keys, merged by log-sum-exp; under vmap, checkpoint, jit and grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import Interpreted, in_place
from jax.sharding import AxisType, PartitionSpec

from jaxcoder.kernels.attention.api import attention

IMPLEMENTATIONS = [
    pytest.param("blockwise", id="blockwise"),
    pytest.param(Interpreted(), id="flash_tpu"),
]
WEIGHTS = np.sin(np.arange(64.0))
OPTIONS = dict(dropout_rate=0.2, dropout_key=np.array([3, 4], np.uint32))


def draw(batch=2, length=256, heads=4):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(batch, length, n, 64)).astype(np.float32) for n in (heads, 1, 1))
    segments = np.repeat([[1, 1, 4, 0], [2, 3, 3, 1]], length // 4, axis=1).astype(np.int32)
    return q, k, v, segments


def whole(q, k, v, segments):
    out = attention(q, k, v, segment_ids=segments, implementation="reference", **OPTIONS)
    return (out * WEIGHTS).sum(), out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shards_of_heads_and_keys_make_the_whole(implementation):
    """Heads over `tensor`, keys over `context`: a device has all queries and a part of the keys, with its q_offset."""
    q, k, v, segments = draw()
    mesh = jax.make_mesh((2, 2), ("context", "tensor"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)

    def local(q, k, v, segments, kv_segments):
        first = jax.lax.axis_index("context") * k.shape[1]
        with in_place(implementation) as name:
            out, log_sum_exp = attention(
                q,
                k,
                v,
                segment_ids=segments,
                kv_segment_ids=kv_segments,
                q_offset=-first,
                kv_offset=first,
                head_offset=jax.lax.axis_index("tensor") * q.shape[2],
                implementation=name,
                return_log_sum_exp=True,
                **OPTIONS,
            )
        largest = jax.lax.pmax(jax.lax.stop_gradient(log_sum_exp), "context")
        share = jnp.where(log_sum_exp > -1e29, jnp.exp(log_sum_exp - largest), 0.0)
        total = jax.lax.psum(share, "context")
        share = share / jnp.where(total == 0.0, 1.0, total)
        return jax.lax.psum(out * share.swapaxes(1, 2)[..., None], "context")

    heads, keys = PartitionSpec(None, None, "tensor"), PartitionSpec(None, "context")
    specs = (heads, keys, keys, PartitionSpec(), keys)
    shards = jax.checkpoint(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False))

    def merged(q, k, v, segments):
        out = shards(q, k, v, segments, segments)
        return (out * WEIGHTS).sum(), out

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v, segments) for f in (merged, whole))
    assert (np.asarray(want[1])[0, 192:] == 0).all()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_and_checkpoint_change_nothing(implementation):
    q, k, v, segments = draw(batch=2, length=128)

    @jax.checkpoint
    def one(q, segments):
        with in_place(implementation) as name:
            out = attention(q, k, v, segment_ids=segments, implementation=name, **OPTIONS)
        return (out * WEIGHTS).sum(), out

    queries, ids = np.stack([q, 2 * q]), np.stack([segments, np.ones_like(segments)])
    (_, got), gradients = jax.jit(jax.vmap(jax.value_and_grad(one, has_aux=True)))(queries, ids)
    for i in range(2):
        slope, out = jax.grad(whole, has_aux=True)(queries[i], k, v, ids[i])
        np.testing.assert_allclose(got[i], out, atol=2e-5)
        np.testing.assert_allclose(gradients[i], slope, atol=5e-5)
