"""The memory estimate beside what XLA's compiler says of the same step, at a tiny and a middling size."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxcoder_configs.starcoder import starcoderbase

from jaxcoder.checkpoint.names import concrete
from jaxcoder.config import ComputeConfig, MeshConfig, ModelConfig, RunConfig
from jaxcoder.data.loader import Batch
from jaxcoder.models.flops import num_parameters
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.train.memory_estimate import estimate_memory
from jaxcoder.train.state import abstract_state
from jaxcoder.train.step import make_train_step

FACTOR = 1.5

TINY = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=256, vocab_size=512, max_seq_len=64)
MIDDLING = ModelConfig(
    num_layers=6, embed_dim=384, num_heads=6, head_dim=64, mlp_dim=1536, vocab_size=4096, max_seq_len=512
)


def config(model: ModelConfig, *, mesh=(1, 1, 1), remat="minimal", microbatch_size=None) -> RunConfig:
    return RunConfig(
        name="x",
        model=model,
        num_steps=10,
        global_batch_size=8,
        microbatch_size=microbatch_size,
        compute=ComputeConfig(dtype="float32", remat=remat),
        mesh=MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
    )


def compiled_bytes(config: RunConfig) -> int:
    """Arguments and temporaries on one device; the new state takes the place of the old one."""
    size = config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    mesh = make_mesh(config.mesh, jax.devices()[:size])
    with jax.set_mesh(mesh):
        state = jax.tree.map(concrete, abstract_state(config, mesh))
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
        shape = (config.global_batch_size, config.model.max_seq_len)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        counts = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
        batch = Batch(inputs=ids, targets=ids, loss_mask=counts, positions=ids, segment_ids=None)
        analysis = make_train_step(config).lower(state, batch).compile().memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + outputs


@pytest.mark.parametrize(
    "run",
    [
        config(TINY),
        config(MIDDLING),
        config(MIDDLING, remat="block", microbatch_size=2),
        config(dataclasses.replace(MIDDLING, num_kv_heads=6), mesh=(1, 2, 2), remat="none"),
    ],
    ids=["tiny", "middling", "blocks in microbatches", "multi-head on a mesh, nothing recomputed"],
)
def test_it_is_near_what_the_compiler_says(run):
    compiled, estimated = compiled_bytes(run), estimate_memory(run).total
    assert compiled / FACTOR < estimated < compiled * FACTOR, f"the compiler {compiled:,}, the estimate {estimated:,}"


def test_meshes_that_are_not_here():
    """15.5B weights on 256 devices: each holds its share of every matrix, and all of the small vectors."""
    run = dataclasses.replace(starcoderbase(), mesh=MeshConfig(data=1, fsdp=64, tensor=4), microbatch_size=64)
    estimate = estimate_memory(run)
    assert estimate.weights == pytest.approx(4 * num_parameters(run.model) / 256, rel=0.06)
    largest = 4 * 40 * 6144 * 24576 / 256
    assert estimate.optimizer_state == 2 * estimate.weights + 4 and estimate.gradients == int(
        2 * estimate.weights + largest
    )
    whole = dataclasses.replace(run, microbatch_size=None)
    assert estimate_memory(whole).saved_activations == 8 * estimate.saved_activations
