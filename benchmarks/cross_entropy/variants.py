"""Variants of the loss and both gradients that compiled.py compares with train/loss.py's.

Shapes: as in train/loss.py. Every variant is `variant(hidden, wte, targets, weights, *, chunk_size, rules) -> sum`.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxcoder.models.loss import token_losses, weighted_loss
from jaxcoder.sharding.ops import all_gather, all_gather_weight, shard_index, shard_map


def one_pass(hidden, wte, targets, weights, *, chunk_size, rules):
    return weighted_loss(hidden, wte, targets, weights, chunk_size=chunk_size, rules=rules)


def tokens_twice(hidden, wte, targets, weights, *, chunk_size, rules):
    return (token_losses(hidden, wte, targets, chunk_size=chunk_size, rules=rules) * weights).sum()


def vocabulary_twice(hidden, wte, targets, weights, *, chunk_size, rules):
    """Chunks of the vocabulary: the log-sum-exp is built up chunk by chunk, then each chunk's logits are made again."""
    rules = rules.for_length(targets.shape[1])
    axes = rules.axes("vocab")

    def local(hidden, wte, targets):
        x = all_gather(hidden, rules.axes("seq"), dim=1).reshape(-1, hidden.shape[-1])
        table = all_gather_weight(wte.astype(hidden.dtype), rules.axes("embed"), dim=1)
        own = targets.reshape(-1) - shard_index(axes) * table.shape[0]
        log_sum_exp, target_logit = _statistics(chunk_size, x, table, own)
        if axes:
            largest = jax.lax.pmax(jax.lax.stop_gradient(log_sum_exp), axes)
            log_sum_exp = largest + jnp.log(jax.lax.psum(jnp.exp(log_sum_exp - largest), axes))
            target_logit = jax.lax.psum(target_logit, axes)
        return (log_sum_exp - target_logit).reshape(targets.shape)

    ids = rules.spec("batch", None)
    in_specs = (rules.spec("batch", "seq", None), rules.spec("vocab", "embed"), ids)
    return (shard_map(local, in_specs=in_specs, out_specs=ids)(hidden, wte, targets) * weights).sum()


def whole(hidden, wte, targets, weights, *, chunk_size, rules):
    """All logits at once, and autodiff; the collectives are the compiler's choice."""
    del chunk_size
    hidden = jax.sharding.reshard(hidden, rules.spec("batch", None, None))
    table = jax.sharding.reshard(wte.astype(hidden.dtype), rules.spec("vocab", None))
    logits = jnp.einsum(
        "bsd,vd->bsv", hidden, table, preferred_element_type=jnp.float32,
        out_sharding=rules.spec("batch", None, "vocab"),
    )  # fmt: skip
    is_target = jnp.arange(wte.shape[0]) == targets[..., None]
    target_logit = jnp.where(jax.sharding.reshard(is_target, jax.typeof(logits).sharding.spec), logits, 0.0).sum(-1)
    return ((jax.nn.logsumexp(logits, -1) - target_logit) * weights).sum()


VARIANTS = {"one pass": one_pass, "tokens, twice": tokens_twice, "vocabulary, twice": vocabulary_twice, "whole": whole}
"""Name -> function; `twice` makes the logits again in the backward pass. Chunks are of tokens, or of rows."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(chunk, x, wte, targets):
    """x (N, D), wte (V, D), targets (N,): log-sum-exp and target logit, fp32 (N,)."""

    def body(index, carry):
        largest, total, target_logit = carry
        logits, is_target, _ = _logits(chunk, index, x, wte, targets)
        new = jnp.maximum(largest, logits.max(-1))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[:, None]).sum(-1)
        return new, total, target_logit + jnp.where(is_target, logits, 0.0).sum(-1)

    start = jnp.full(len(x), -jnp.inf), jnp.zeros(len(x)), jnp.zeros(len(x))
    largest, total, target_logit = jax.lax.fori_loop(0, len(wte) // chunk, body, start)
    return largest + jnp.log(total), target_logit


def _logits(chunk, index, x, wte, targets):
    rows = jax.lax.dynamic_slice_in_dim(wte, index * chunk, chunk)
    logits = jnp.einsum("nd,vd->nv", x, rows, preferred_element_type=jnp.float32)
    return logits, index * chunk + jnp.arange(chunk) == targets[:, None], rows


def _forward(chunk, x, wte, targets):
    found = _statistics(chunk, x, wte, targets)
    return found, (x, wte, targets, found[0])


def _backward(chunk, residuals, cotangents):
    x, wte, targets, log_sum_exp = residuals

    def body(index, carry):
        dx, d_wte = carry
        logits, is_target, rows = _logits(chunk, index, x, wte, targets)
        d_logits = jnp.exp(logits - log_sum_exp[:, None]) * cotangents[0][:, None] + is_target * cotangents[1][:, None]
        d_logits = d_logits.astype(x.dtype)
        dx = dx + jnp.einsum("nv,vd->nd", d_logits, rows, preferred_element_type=jnp.float32)
        d_rows = jnp.einsum("nv,nd->vd", d_logits, x, preferred_element_type=jnp.float32)
        return dx, jax.lax.dynamic_update_slice_in_dim(d_wte, d_rows.astype(wte.dtype), index * chunk, 0)

    start = jnp.zeros(x.shape, jnp.float32), jnp.zeros(wte.shape, wte.dtype)
    dx, d_wte = jax.lax.fori_loop(0, len(wte) // chunk, body, start)
    return dx.astype(x.dtype), d_wte, None


_statistics.defvjp(_forward, _backward)
