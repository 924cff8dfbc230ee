"""Our TPU kernels, interpreted on CPUs: drawn contents, races, transformations; compiled for absent TPUs."""

import importlib.util
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from test_attention_schedule import hostile_segments

from jaxcoder.kernels.attention import flash_tpu
from jaxcoder.kernels.attention.api import BACKENDS, attention
from jaxcoder.kernels.attention.schedule import Blocks

SMALL = Blocks(block_kv=256, edge_kv=128, span_kv=256, chunk_heads=2)
SHAPES = {
    "multi_query": dict(shape=(2, 300, 300, 4, 1, 64), dtype=jnp.bfloat16, rate=0.1, bound=5e-3),
    "grouped_two_spans": dict(shape=(1, 257, 450, 6, 2, 128), dtype=jnp.float32, rate=0.0, bound=3e-6),
}
"""Few, for each takes seconds to compile; contents, segments and offsets are drawn."""


def use(monkeypatch, interpret=True, blocks=SMALL):
    options = dict(forward_blocks=blocks, backward_blocks=blocks, interpret=interpret)
    monkeypatch.setitem(BACKENDS, "flash_tpu", partial(flash_tpu.attention, **options))


@partial(jax.jit, static_argnums=(0, 1))
def outputs_and_gradients(implementation, rate, arrays, segments, kv_segments, q_offset, d_lse):
    """Output, log-sum-exp, dq, dk, dv; the log-sum-exp of rows that see nothing counts as 0."""
    q, k, v, d_out = arrays

    def run(q, k, v):
        out, log_sum_exp = attention(
            q,
            k,
            v,
            segment_ids=segments,
            kv_segment_ids=kv_segments,
            q_offset=q_offset,
            dropout_rate=rate,
            dropout_key=jnp.array([1, 2], jnp.uint32) if rate else None,
            batch_offset=3,
            head_offset=5,
            implementation=implementation,
            return_log_sum_exp=True,
        )
        return out, jnp.where(log_sum_exp > -1e29, log_sum_exp, 0.0)

    (out, log_sum_exp), pullback = jax.vjp(run, q, k, v)
    return out, log_sum_exp, *pullback((d_out.astype(out.dtype), d_lse))


def draw(rng, shape, dtype):
    batch, q_len, kv_len, heads, groups, head_dim = shape
    q_shape, kv_shape = (batch, q_len, heads, head_dim), (batch, kv_len, groups, head_dim)
    arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in (q_shape, kv_shape, kv_shape, q_shape)]
    segments = jnp.asarray(np.stack([hostile_segments(rng, q_len) for _ in range(batch)]))
    kv_segments = None
    if q_len != kv_len:
        kv_segments = jnp.asarray(np.stack([hostile_segments(rng, kv_len) for _ in range(batch)]))
    d_lse = jnp.asarray(rng.normal(size=(batch, heads, q_len)), jnp.float32)
    return arrays, segments, kv_segments, jnp.int32(rng.choice([0, rng.integers(-200, 400)])), d_lse


def assert_close(got, want, bound):
    for name, a, b in zip(("out", "log_sum_exp", "dq", "dk", "dv"), got, want):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), name
        # Short documents have gradients of almost zero (dP minus its mean), left of inputs of size one: in bf16 their
        # error is that of what was subtracted, so a bound on elements counts beside the one on the norm.
        error, size = np.linalg.norm(a - b), np.linalg.norm(b)
        assert error <= bound * (size + np.sqrt(b.size)), (name, error, size, b.size)


@pytest.mark.parametrize("name", SHAPES)
def test_drawn_contents_against_the_reference(name, monkeypatch):
    case = SHAPES[name]
    use(monkeypatch)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(st.integers(0, 2**31))
    def check(seed):
        arrays, *rest = draw(np.random.default_rng(seed), case["shape"], case["dtype"])
        exact = [x.astype(jnp.float32) for x in arrays]
        want = outputs_and_gradients("reference", case["rate"], exact, *rest)
        assert_close(outputs_and_gradients("flash_tpu", case["rate"], arrays, *rest), want, case["bound"])

    check()


def test_no_races_between_two_cores_and_no_memory_read_before_it_is_written(monkeypatch):
    case = dict(SHAPES["multi_query"], shape=(2, 200, 200, 4, 1, 64))
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
    )
    use(monkeypatch, params)
    arrays, *rest = draw(np.random.default_rng(0), case["shape"], case["dtype"])
    exact = [x.astype(jnp.float32) for x in arrays]
    jax.clear_caches()
    got = jax.block_until_ready(outputs_and_gradients("flash_tpu", case["rate"], arrays, *rest))
    jax.clear_caches()
    assert_close(got, outputs_and_gradients("reference", case["rate"], exact, *rest), case["bound"])
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    races = interpreter.races if hasattr(interpreter, "races") else interpreter.get_races()
    assert not races.races_found


def test_under_shard_map_vmap_and_checkpoint(monkeypatch):
    use(monkeypatch)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 128, n, 64)), jnp.float32) for n in (4, 1, 1))
    options = dict(dropout_rate=0.2, dropout_key=jnp.array([3, 4], jnp.uint32))

    def loss(implementation, q, k, v, **more):
        out = attention(q, k, v, implementation=implementation, **options, **more)
        return (out * jnp.sin(jnp.arange(64.0))).sum()

    want = jax.jit(jax.grad(partial(loss, "reference"), argnums=(0, 1, 2)))(q, k, v)

    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    heads, whole = PartitionSpec(None, None, "tensor"), PartitionSpec()

    def local(q, k, v):
        part = loss("flash_tpu", q, k, v, head_offset=jax.lax.axis_index("tensor") * q.shape[2])
        return jax.lax.psum(part, "tensor")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(heads, whole, whole), out_specs=whole, check_vma=False)
    got = jax.jit(jax.grad(jax.checkpoint(sharded), argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)

    mapped = jax.vmap(lambda q: attention(q, k, v, implementation="flash_tpu"))(jnp.stack([q, 2 * q]))
    np.testing.assert_allclose(mapped[1], attention(2 * q, k, v, implementation="reference"), atol=2e-5)


COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding
from jaxcoder.kernels.attention.api import attention
device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
for heads, head_dim, rate in ((48, 128, 0.0), (12, 64, 0.1)):
    shapes = [(1, 1024, n, head_dim) for n in (heads, 1, 1)]
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=SingleDeviceSharding(device)) for s in shapes]
    key = jnp.array([1, 2], jnp.uint32) if rate else None
    loss = lambda q, k, v: attention(q, k, v, dropout_rate=rate, dropout_key=key).astype(jnp.float32).sum()
    with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("x",)).abstract_mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile().as_text()
    assert "flash_forward" in text and "flash_backward" in text, text
print("compiled")
"""


@pytest.mark.parametrize("topology", ["v5p:2x2x1", pytest.param("v6e:1x1", marks=pytest.mark.slow)])
def test_compiles_for_absent_tpus(topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install libtpu")
    settings = dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topology], env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
