"""The loss on a mesh: kernels/cross_entropy on the tokens and vocabulary rows of each device, and its collectives.

Shapes: B batch, S sequence, D embed, V vocabulary. Hidden states are all-gathered along the sequence, the table along
"embed"; their gradients are reduce-scattered into the same shards.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxcoder.kernels.cross_entropy import api as cross_entropy
from jaxcoder.sharding.ops import all_gather, all_gather_weight, reshard, shard_index, shard_map
from jaxcoder.sharding.rules import ShardingRules


def weighted_loss(
    hidden: jax.Array,
    wte: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk_size: int,
    rules: ShardingRules,
) -> jax.Array:
    """Sum of the negative log-likelihoods of the targets, each times its weight: the fp32 scalar to train on.

    The forward pass also computes the gradients, which saves one matmul in four. Only first derivatives exist, in
    hidden, wte and weights.

    Args:
        hidden: (B, S, D) in the compute dtype. wte: the head (V, D), fp32. targets: int32 (B, S). weights: fp32 (B, S).
        chunk_size: tokens of a device whose logits exist at once.
    """
    rules = rules.for_length(targets.shape[1])
    hidden = reshard(hidden, rules.spec("batch", "seq", None))
    return _weighted_loss(chunk_size, rules, hidden, wte, targets, weights)


def token_losses(
    hidden: jax.Array, wte: jax.Array, targets: jax.Array, *, chunk_size: int, rules: ShardingRules
) -> jax.Array:
    """Negative log-likelihood of each target, fp32 (B, S). Arguments as of `weighted_loss`.

    For evaluation, and for losses that are not a weighted sum: its derivative recomputes the logits.
    """
    rules = rules.for_length(targets.shape[1])
    ids, vocab = rules.spec("batch", None), rules.axes("vocab")

    def local(hidden, wte, targets):
        x, table = _gathered(rules, hidden, wte)
        local_targets = _relative_targets(rules, table, targets)
        # In fp32, so that its gradient is accumulated in fp32.
        table = table.astype(jnp.float32)
        losses = cross_entropy.token_losses(x, table, local_targets, chunk_size=chunk_size, axes=vocab)
        return losses.reshape(targets.shape)

    hidden = reshard(hidden, rules.spec("batch", "seq", None))
    in_specs = (rules.spec("batch", "seq", None), rules.spec("vocab", "embed"), ids)
    return shard_map(local, in_specs=in_specs, out_specs=ids)(hidden, wte, targets)


def _gathered(rules, hidden, wte):
    """The operands of a device: its tokens (N, D) and its vocabulary rows (V, D)."""
    x = all_gather(hidden, rules.axes("seq"), dim=1)
    return x.reshape(-1, x.shape[-1]), all_gather_weight(wte.astype(hidden.dtype), rules.axes("embed"), dim=1)


def _relative_targets(rules, table, targets):
    """Targets (N,) counted from the first vocabulary row of this device; outside 0 .. V-1 on other devices."""
    return targets.reshape(-1) - shard_index(rules.axes("vocab")) * table.shape[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_loss(chunk_size, rules, hidden, wte, targets, weights):
    return (token_losses(hidden, wte, targets, chunk_size=chunk_size, rules=rules) * weights).sum()


def _forward(chunk_size, rules, hidden, wte, targets, weights):
    ids, of_hidden, of_wte = rules.spec("batch", None), rules.spec("batch", "seq", None), rules.spec("vocab", "embed")
    vocab = rules.axes("vocab")

    def local(hidden, wte, targets, weights):
        (x, table), to_shards = jax.vjp(partial(_gathered, rules), hidden, wte)
        found = cross_entropy.losses_and_gradients(
            x, table, _relative_targets(rules, table, targets), weights.reshape(-1), chunk_size=chunk_size, axes=vocab
        )
        d_hidden, d_wte = to_shards((found.hidden, found.wte.astype(table.dtype)))
        # The transposes of the all-gathers have summed over those axes; the remaining axes follow here.
        d_hidden = _sum(d_hidden, set(vocab) - set(rules.axes("seq")))
        d_wte = _sum(d_wte, set(rules.axes("batch")) - set(rules.axes("embed")))
        return found.losses.reshape(targets.shape), d_hidden, d_wte

    losses, d_hidden, d_wte = shard_map(
        local, in_specs=(of_hidden, of_wte, ids, ids), out_specs=(ids, of_hidden, of_wte)
    )(hidden, wte, targets, weights)
    return (losses * weights).sum(), (d_hidden, d_wte, losses)


def _sum(x, axes):
    return jax.lax.psum(x, sorted(axes)) if axes else x


def _backward(chunk_size, rules, residuals, cotangent):
    d_hidden, d_wte, losses = residuals
    of_hidden = (d_hidden.astype(jnp.float32) * cotangent).astype(d_hidden.dtype)
    return of_hidden, d_wte * cotangent, None, losses * cotangent


_weighted_loss.defvjp(_forward, _backward)
