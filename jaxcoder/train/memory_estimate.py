"""Device memory of a training step, estimated from the configuration without compiling.

Exact: weights and optimizer state, from their shapes and shardings on the mesh. Estimated: gradients and activations,
because XLA decides what it fuses and when it frees; the factors below were fitted to its buffers. With fp32 on CPUs
(several sizes, meshes and policies) the total is within a factor of 1.5 of the compiler's figure
(tests/train/test_memory_estimate.py); with bf16 in programs compiled for TPUs, within 15 % (docs/performance.md).

Shapes: n tokens of a microbatch on one device, D embed, F mlp, Q query heads x head_dim, U key/value heads x head_dim
(F, Q and, of several heads, U are of one shard), L layers, V vocabulary rows of a device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax

from jaxcoder.config import MeshConfig, RunConfig
from jaxcoder.sharding.mesh import abstract_mesh
from jaxcoder.sharding.rules import ShardingRules
from jaxcoder.train.state import initial_state

GRADIENT_COPIES = 1
GRADIENT_COPIES_ACCUMULATING = 2
"""With microbatches the accumulated gradient and the new one exist at once."""
WORKING_UNITS = {"none": (8, 6), "minimal": (11, 6), "offload": (11, 6), "block": (17, 8)}
"""Values per token, in units of (D, F), that the backward pass of one block holds at once, recomputed ones included."""
WORKING_UNITS_TPU = (4, 1)
"""The same with bf16: TPU programs fuse nearly all of it."""
NORMS_SAVED_TPU = 8
"""Further values per token and block, in units of D, that `none` saves with bf16: both norms in fp32."""
OFFLOADED_AT_ONCE = 2
"""Blocks whose offloaded activations are on the device: one is in use while another is in transfer."""
LOGITS_COPIES = 2
"""Copies of one chunk in fp32: the logits, and their gradient in both layouts."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on each device at the peak of a step."""

    weights: int
    optimizer_state: int
    gradients: int
    saved_activations: int
    """Saved by the forward pass of every block for the backward pass."""
    working: int
    """The larger of one block's backward pass and the loss, which do not overlap."""
    gathered: int
    """All-gathered copies: one block's weights and gradients, and the embedding table for the loss."""

    @property
    def total(self) -> int:
        return (
            self.weights + self.optimizer_state + self.gradients + self.saved_activations + self.working + self.gathered
        )


def estimate_memory(config: RunConfig) -> MemoryEstimate:
    """The estimate for a run whose mesh is resolved (`resolve_mesh`); its devices need not exist."""
    model, shards = config.model, shards_of(config)
    itemsize = 2 if config.compute.dtype == "bfloat16" else 4
    for_tpu = itemsize == 2
    batch = config.microbatch_size or config.global_batch_size
    tokens = -(-batch // shards("batch")) * model.max_seq_len
    weights, block, optimizer_state = state_bytes(config)
    copies = GRADIENT_COPIES if batch == config.global_batch_size else GRADIENT_COPIES_ACCUMULATING

    mlp = model.mlp_dim / shards("mlp")
    # Before the update, TPU programs hold the largest gradient array twice.
    largest = 4 * model.num_layers * model.embed_dim * mlp / shards("embed") if for_tpu else 0
    of_d, of_f = WORKING_UNITS_TPU if for_tpu else WORKING_UNITS[config.compute.remat]
    in_block = tokens * itemsize * (of_d * model.embed_dim + of_f * mlp)
    in_block += OFFLOADED_AT_ONCE * tokens * itemsize * offloaded_per_token(config)
    rows = model.vocab_size // shards("vocab")
    logits = LOGITS_COPIES * 4 * min(config.compute.loss_chunk_tokens, tokens) * rows
    in_loss = logits + tokens * model.embed_dim * 2 * itemsize
    gathered = rows * model.embed_dim * (4 + itemsize) + (block * (1 + itemsize / 4) if shards("embed") > 1 else 0)
    return MemoryEstimate(
        weights=weights,
        optimizer_state=optimizer_state,
        gradients=int(copies * weights + largest),
        saved_activations=int(tokens * model.num_layers * itemsize * saved_per_token(config)),
        working=int(max(in_block, in_loss)),
        gathered=int(gathered),
    )


def shards_of(config: RunConfig) -> Callable[[str], int]:
    """Dim -> how many shards it has on the run's mesh."""
    return partial(ShardingRules.for_model(config.model).shards, mesh=config.mesh)


def saved_per_token(config: RunConfig) -> float:
    """Values that the forward pass saves of one block, per token and device, under the remat policy."""
    model, shards = config.model, shards_of(config)
    queries = model.num_heads * model.head_dim / shards("heads")
    keys = model.num_kv_heads * model.head_dim / shards("kv_heads")
    mlp = model.mlp_dim / shards("mlp")
    stream = model.embed_dim / shards("seq")  # the residual stream is sharded along the sequence
    if config.compute.remat in ("block", "offload"):
        return stream
    if config.compute.remat == "minimal":  # the attention's output in its own layout and in the model's
        return 2 * stream + 3 * queries + 2 * keys + mlp
    norms = NORMS_SAVED_TPU * stream if config.compute.dtype == "bfloat16" else 0
    return norms + 8 * stream + 2 * model.embed_dim + 3 * queries + 2 * keys + 6 * mlp


def offloaded_per_token(config: RunConfig) -> float:
    """Values of one block, per token and device, that host memory holds until the backward pass."""
    if config.compute.remat != "offload":
        return 0.0
    on_device = replace(config, compute=replace(config.compute, remat="minimal"))
    return saved_per_token(on_device) - saved_per_token(config)


def state_bytes(config: RunConfig) -> tuple[int, int, int]:
    """Bytes of all weights on one device, of one block after its all-gather over "embed", and of the optimizer
    state."""
    # A search compares many microbatches and policies on one mesh: other fields would miss the cache.
    return _state_bytes(
        RunConfig(
            name="x", model=config.model, num_steps=1, global_batch_size=1, mesh=config.mesh, optimizer=config.optimizer
        )
    )


@lru_cache(maxsize=256)
def _state_bytes(config: RunConfig) -> tuple[int, int, int]:
    state = abstract_state_on(config.mesh, config)
    weights, blocks, optimizer_state = (
        sum(map(shard_bytes, jax.tree.leaves(tree))) for tree in (state.model, state.model.h, state.optimizer_state)
    )
    return weights, blocks // config.model.num_layers * shards_of(config)("embed"), optimizer_state


def saved_bytes(config: RunConfig) -> int:
    """Bytes of the arrays of a checkpoint."""
    state = jax.eval_shape(lambda: initial_state(config))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def abstract_state_on(mesh: MeshConfig, config: RunConfig):
    """Shapes and shardings of the training state on a mesh whose devices need not exist."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh)):
        return jax.eval_shape(lambda: initial_state(config))


def shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
