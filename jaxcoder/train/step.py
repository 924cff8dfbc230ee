"""The training step: from a batch of windows to new weights, one jitted function with donated state.

    microbatches -> hidden states -> chunked cross-entropy -> gradients, summed
    -> divided by the tokens that count in the whole global batch -> optimizer -> weights
       (the old ones, if the loss or a gradient is not finite)

Shapes: B global batch, M microbatch, S sequence.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxcoder.config import RunConfig
from jaxcoder.config.schedule import learning_rate
from jaxcoder.data.loader import Batch
from jaxcoder.kernels.dropout.api import make_key
from jaxcoder.models.protocol import Dropout, Model
from jaxcoder.sharding.ops import reshard
from jaxcoder.train.optimizer import make_optimizer, num_updates
from jaxcoder.train.state import TrainState
from jaxcoder.train.xla_options import Value, accepted, options_for


def make_train_step(
    config: RunConfig, device: jax.Device | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step, compiled with the options for `device` (default: the first local device).

    Its metrics are scalars: loss (nats per token), tokens, grad_norm, learning_rate, skipped (1 if the weights were not
    updated, else 0), skipped_steps (of the run so far), batch_hash (`batch_hash`).
    """
    optimizer = make_optimizer(config)
    grad_of_loss = jax.value_and_grad(lambda model, *args: model.loss(*args), has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rows = reshard(jnp.arange(batch.inputs.shape[0]), state.model.rules.spec("batch"))
        key = make_key(config.seed, state.step) if state.model.has_dropout else None

        def microbatch_gradients(totals, batch_and_rows):
            batch, rows = batch_and_rows
            dropout = None if key is None else Dropout(key=key, rows=rows)
            losses, gradients = grad_of_loss(state.model, batch, dropout)
            return jax.tree.map(jnp.add, totals, (losses, gradients)), None

        zeros = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.model)
        microbatches = split_microbatches(config, (batch, rows), state.model.rules.spec("batch"))
        ((loss, tokens), gradients), _ = jax.lax.scan(microbatch_gradients, zeros, microbatches)

        tokens = jnp.maximum(tokens, 1.0)
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        norm, step = optax.tree.norm(gradients), state.step + 1
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.model, step=step)
        model = optax.apply_updates(state.model, updates)
        is_good = jnp.isfinite(loss) & jnp.isfinite(norm)
        if config.optimizer.skip_grad_norm_above is not None:
            is_good &= norm <= config.optimizer.skip_grad_norm_above
        old, new = (state.model, state.optimizer_state), (model, optimizer_state)
        model, optimizer_state = keep_if(is_good, new, old)
        metrics = {
            "loss": loss / tokens,
            "tokens": tokens,
            "grad_norm": norm,
            "learning_rate": learning_rate(config.optimizer, step, config.num_steps),
            "skipped": 1 - is_good.astype(jnp.int32),
            "skipped_steps": step - num_updates(optimizer_state),
            "batch_hash": batch_hash(batch),
        }
        return TrainState(step=step, model=model, optimizer_state=optimizer_state), metrics

    options = compiler_options(config, device or jax.local_devices()[0])
    return jax.jit(train_step, donate_argnums=0, compiler_options=options or None)


def compiler_options(config: RunConfig, device: jax.Device) -> dict[str, Value]:
    """The options of xla_options.py for a device, which may be absent, that its compiler accepts."""
    options = options_for(device.device_kind) if config.compute.xla_options == "chip" else {}
    mesh = jax.sharding.get_mesh()
    sharding = SingleDeviceSharding(device) if mesh.empty else NamedSharding(mesh, PartitionSpec())
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)
    return accepted(options, jax.jit(lambda x: x).lower(scalar).compile)


def batch_hash(batch: Batch) -> jax.Array:
    """A fingerprint of the batch's tokens, uint32, the same on every mesh: two runs on the same data have the same one.

    It is a sum modulo 2**32 of one hash per input token and position; targets are the inputs shifted by one, except the
    last of a row.
    """
    positions = jax.lax.broadcasted_iota(jnp.uint32, (1, batch.inputs.shape[1]), 1)
    word = batch.inputs.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + positions * jnp.uint32(0x85EBCA77)
    word = (word ^ (word >> 15)) * jnp.uint32(0xC2B2AE3D)
    return jnp.sum(word ^ (word >> 13), dtype=jnp.uint32)


def keep_if(is_good: jax.Array, new, old):
    """`new` if the scalar `is_good`, else `old`, for every array; XLA fuses it with the computation of `new`."""
    return jax.tree.map(lambda new, old: jnp.where(is_good, new, old), new, old)


def split_microbatches(config: RunConfig, tree, batch_spec: PartitionSpec | None):
    """Arrays (B, ...) as (B / M, M, ...); each device splits its own rows, so no data moves."""
    count = config.global_batch_size // (config.microbatch_size or config.global_batch_size)

    def split(x):
        return x.reshape(count, x.shape[0] // count, *x.shape[1:])

    if batch_spec is None:
        return jax.tree.map(split, tree)
    in_specs = jax.tree.map(lambda x: PartitionSpec(*batch_spec), tree)
    out_specs = jax.tree.map(lambda x: PartitionSpec(None, *batch_spec), tree)
    return jax.shard_map(lambda tree: jax.tree.map(split, tree), in_specs=(in_specs,), out_specs=out_specs)(tree)


def make_eval_step() -> Callable[[Model, Batch], jax.Array]:
    """The jitted loss of every target, without dropout: fp32 (B, S), replicated on every device."""

    def eval_step(model: Model, batch: Batch) -> jax.Array:
        return reshard(model.token_losses(batch), model.rules.spec(None, None))

    return jax.jit(eval_step)
