"""Our TPU kernels, compiled by libtpu for chips that are not there: what the interpreter cannot know."""

import importlib.util
import subprocess
import sys

import pytest

from jaxcoder.runtime import environment_with

COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding
from jaxcoder.kernels.attention.api import attention

device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
here = SingleDeviceSharding(device)
for shape in sys.argv[2].split():
    heads, head_dim, length, percent = (int(x) for x in shape.split(","))
    rate = percent / 100
    arrays = [jax.ShapeDtypeStruct((2, length, n, head_dim), jnp.bfloat16, sharding=here) for n in (heads, 1, 1)]
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=here)
    key = jnp.array([1, 2], jnp.uint32) if rate else None

    def loss(q, k, v, ids):
        return attention(q, k, v, segment_ids=ids, dropout_rate=rate, dropout_key=key).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("x",)).abstract_mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays, ids).compile().as_text()
    assert "flash_forward" in text and "flash_backward" in text, text
    print("compiled", shape)
"""
SHAPES = "48,128,1024,0", "12,64,768,10"
"""Query heads, head dimension, length, percent of dropout."""


def compile_all(shapes_of: dict[str, str]) -> None:
    """Topology -> shapes, each topology in a process of its own at the same time."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install '.[tpu]'")
    settings = dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    options = dict(env=environment_with(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, "-c", COMPILE, *case], **options) for case in shapes_of.items()]
    for process, shapes in zip(processes, shapes_of.values()):
        output, complaints = process.communicate()
        assert process.returncode == 0, complaints[-3000:]
        assert output.count("compiled") == len(shapes.split())


def test_a_shape_for_each_of_two_generations():
    compile_all({"v5p:2x2x1": SHAPES[0], "v6e:2x2": SHAPES[1]})


@pytest.mark.slow
def test_two_shapes_for_two_generations():
    compile_all({"v5p:2x2x1": " ".join(SHAPES), "v6e:2x2": " ".join(SHAPES)})
