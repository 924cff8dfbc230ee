"""What the devices exchange in a training step, counted in the compiled program: tensor parallelism with sequence
shards is two all-gathers and two reduce-scatters a layer forward, and no gradient is summed twice or where it is not
kept."""

import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxcoder.checkpoint.names import concrete
from jaxcoder.config import ComputeConfig, MeshConfig, ModelConfig, RunConfig
from jaxcoder.data.loader import Batch
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.train.state import abstract_state
from jaxcoder.train.step import make_train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "sharding"))
from compiled import collectives

MODEL = ModelConfig(num_layers=5, embed_dim=64, num_heads=8, head_dim=8, mlp_dim=256, vocab_size=512, max_seq_len=64)
ROWS, D, MLP, VOCAB, KV = 8, 64, 256, 512, 16


def compiled_collectives(mesh_config: MeshConfig, remat: str):
    run = RunConfig(
        name="collectives",
        model=MODEL,
        num_steps=10,
        global_batch_size=ROWS,
        mesh=mesh_config,
        compute=ComputeConfig(dtype="float32", remat=remat, loss_chunk_tokens=64),
    )
    size = mesh_config.data * mesh_config.fsdp * mesh_config.tensor
    mesh = make_mesh(mesh_config, jax.devices()[:size])
    with jax.set_mesh(mesh):
        state = jax.tree.map(concrete, abstract_state(run, mesh))
        rows = NamedSharding(mesh, state.model.rules.spec("batch", None))
        ids, counts = (jax.ShapeDtypeStruct((ROWS, 64), dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))
        batch = Batch(inputs=ids, targets=ids, loss_mask=counts, positions=ids, segment_ids=None)
        return collectives(make_train_step(run).lower(state, batch).compile().as_text(), dict(mesh.shape))


def counted(found, kind: str, axes: tuple[str, ...]) -> int:
    return sum(1 for one in found if (one.kind, one.axes) == (kind, axes))


def of_layers(found) -> tuple[Counter, Counter]:
    """(kind, *axes) of the two loops over the layers, with how often: the forward pass, the backward pass."""
    # The loss has loops too, over chunks of tokens, which exchange a few numbers a token.
    loops = {one.loop for one in found if one.loop and one.kind == "reduce-scatter" and one.size > ROWS * 64}
    counts = [Counter((one.kind, *one.axes) for one in found if one.loop == loop) for loop in loops]
    forward, backward = sorted(counts, key=Counter.total)
    return forward, backward


@pytest.fixture(scope="module")
def minimal():
    return compiled_collectives(MeshConfig(data=1, fsdp=4, tensor=2), "minimal")


def test_a_layer(minimal):
    """Forward: two gathers and two sums into shards over `tensor`, and a gather of each of the five matrices over
    `fsdp`. Backward: the transpose of each, the matrices and the normed inputs gathered once more; nothing else."""
    forward, backward = of_layers(minimal)
    assert forward == {("all-gather", "tensor"): 2, ("reduce-scatter", "tensor"): 2, ("all-gather", "fsdp"): 5}
    assert backward == {
        ("all-gather", "tensor"): 4, ("reduce-scatter", "tensor"): 2,
        ("all-gather", "fsdp"): 5, ("reduce-scatter", "fsdp"): 5,
    }  # fmt: skip


def test_around_the_layers(minimal):
    """The embedding's and the loss's exchange of activations, the two tables, and sums of what every device keeps."""
    activations, table = ROWS // 4 * 64 * D, VOCAB // 2 * D
    outside = [one for one in minimal if not one.loop]
    assert counted(outside, "reduce-scatter", ("tensor",)) == 2 and counted(outside, "all-gather", ("tensor",)) == 2
    large = [one.size for one in outside if one.axes == ("tensor",) and one.size > table]
    assert set(large) <= {activations, activations // 2}
    assert 1 <= sum(one.kind == "all-gather" and one.size == table for one in outside) <= 2
    into_shards = [one.size for one in outside if one.kind == "reduce-scatter" and one.axes == ("fsdp",)]
    assert into_shards.count(table // 4) == 2
    # Whole sums are of norms and biases, of the positions, of the one key/value head over `tensor`, and of numbers.
    small = MODEL.num_layers * max(D // 4 * KV, MLP, D)
    assert max(one.size for one in outside if one.kind == "all-reduce") <= small
    assert not any(one.kind in ("all-to-all", "collective-permute") for one in minimal)


def test_recomputed_blocks_exchange_again():
    """Of remat "block" the second forward pass repeats one sum into shards: the attention's, which the MLP needs."""
    found = compiled_collectives(MeshConfig(data=1, fsdp=1, tensor=4), "block")
    forward, backward = of_layers(found)
    assert forward == {("all-gather", "tensor"): 2, ("reduce-scatter", "tensor"): 2}
    assert backward == {("all-gather", "tensor"): 4, ("reduce-scatter", "tensor"): 3}


def test_replicas_exchange_gradients_alone():
    """Over `data`, outside the layers and summed as shards."""
    found = compiled_collectives(MeshConfig(data=2, fsdp=2, tensor=2), "minimal")
    across = [one for one in found if "data" in one.axes]
    assert across and {one.kind for one in across} == {"all-reduce"} and not any(one.loop for one in across)
    biggest = max(VOCAB // 2 * D // 2, MODEL.num_layers * D // 2 * MLP // 2)
    assert max(one.size for one in across) <= biggest
