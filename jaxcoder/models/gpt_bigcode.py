"""The GPTBigCode decoder (SantaCoder, StarCoder): GPT-2's pre-norm block with multi-query attention.

Shapes: B batch, S query length, T cache slots, D embed, H heads, G key/value heads, K head_dim, F mlp, V vocab,
P positions, L layers. Weights are fp32 with kernels [in, out]; the layers are one Block whose arrays have a leading L.

Blocks, linear layers and norms see the shards of one device (sharding/ops.py). The residual stream x is unsharded in D
and, in training, sharded along S over the axis that shards heads and MLP ("seq" of the rules). Attention and MLP each
all-gather their normed input along S and reduce-scatter their output. Weights are all-gathered over "embed" before use.
Reference: Allal et al. 2023 (arXiv 2301.03988), Li et al. 2023 (arXiv 2305.06161).
"""

from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxcoder.config import ComputeConfig, ModelConfig
from jaxcoder.kernels.attention.api import attention
from jaxcoder.kernels.dropout.api import Site, fold_in, keep_mask
from jaxcoder.models.loss import token_losses, weighted_loss
from jaxcoder.models.protocol import BatchArrays, Dropout
from jaxcoder.sharding.ops import (
    all_gather,
    all_gather_weight,
    embedding_lookup,
    local_shard,
    reshard,
    shard_index,
    shard_map,
    specs_of,
    sum_over,
)
from jaxcoder.sharding.rules import ShardingRules

SAVED_ACTIVATIONS = ("q", "kv", "attention", "residual", "mlp_up")  # "attention": also the kernels' own residuals
REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.save_only_these_names(*SAVED_ACTIVATIONS),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(SAVED_ACTIVATIONS),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "block": jax.checkpoint_policies.nothing_saveable,
}
"""What the backward pass finds saved of a block, apart from its input x. q, attention and mlp_up are sharded by heads
and columns; x and residual, the stream between attention and MLP, along the sequence. With these saved, the backward
pass repeats no matmul and no reduction over devices: only norms, their all-gathers and GELU."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Cached keys and values: k, v (L, B, T, G, K); lengths int32 (B,), the number of filled slots per row."""

    k: jax.Array
    v: jax.Array
    lengths: jax.Array

    @staticmethod
    def spec(rules: ShardingRules) -> PartitionSpec | None:
        """The sharding of k and v: by row, and by head if there are several."""
        return rules.spec(None, "batch", None, "kv_heads", None)


class GPTBigCode(nnx.Module):
    """The decoder: `self(tokens)` gives hidden states after the last norm, `self.logits(hidden)` scores over the
    vocabulary."""

    def __init__(
        self,
        config: ModelConfig,
        compute: ComputeConfig = ComputeConfig(),
        *,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.compute = config, compute
        self.rules = rules = rules or ShardingRules.for_model(config)
        make = partial(_normal, rngs, config.init_std)
        self.wte = make((config.vocab_size, config.embed_dim), rules.spec("vocab", "embed"))
        self.wpe = make((config.max_seq_len, config.embed_dim), rules.spec(None, "embed"))
        self.h = jax.vmap(lambda rngs: Block(config, compute, rules=rules, rngs=rngs))(rngs.split(config.num_layers))
        self.ln_f = LayerNorm(config)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """Hidden states (B, S, D) after the last norm, in the compute dtype, sharded along S as the rules' "seq" says.

        Args:
            tokens: int32 (B, S). positions: int32 (B, S), default 0 .. S-1.
            segment_ids: int32 (B, S), one id per document, 0 for pads; None lets attention run across documents.
            dropout: randomness of training; None disables dropout.
        """
        rules = self.rules.for_length(tokens.shape[1])
        ids = rules.spec("batch", None)
        randomness: Any = None  # a tree of specs with the structure of `Dropout`
        if dropout is not None:
            randomness = jax.tree.unflatten(jax.tree.structure(dropout), (PartitionSpec(), rules.spec("batch")))

        def local(model, tokens, positions, segment_ids, dropout):
            x = model._embed(tokens, positions, dropout, rules)

            def block(x, layer_and_index):
                layer, index = layer_and_index
                return layer(x, index, segment_ids, dropout, rules), None

            if self.compute.remat != "none":
                block = jax.checkpoint(block, policy=REMAT_POLICIES[self.compute.remat], prevent_cse=False)
            x, _ = jax.lax.scan(block, x, (model.h, jnp.arange(self.config.num_layers)))
            return model.ln_f(x)

        return shard_map(
            local,
            in_specs=(specs_of(self), ids, ids, ids, randomness),
            out_specs=rules.spec("batch", "seq", None),
        )(self, tokens, positions, segment_ids, dropout)

    @property
    def has_dropout(self) -> bool:
        return max(self.config.embed_dropout, self.config.residual_dropout, self.config.attention_dropout) > 0

    def loss(self, batch: BatchArrays, dropout: Dropout | None = None) -> tuple[jax.Array, jax.Array]:
        """Loss of the next token, summed over the targets that count, in nats, and their number: fp32 scalars."""
        hidden, chunk = self._hidden_of(batch, dropout), self.compute.loss_chunk_tokens
        total = weighted_loss(hidden, self.wte[...], batch.targets, batch.loss_mask, chunk_size=chunk, rules=self.rules)
        return total, batch.loss_mask.sum()

    def token_losses(self, batch: BatchArrays) -> jax.Array:
        """Loss of every target in nats, without dropout, also of those that do not count: fp32 (B, S)."""
        hidden, chunk = self._hidden_of(batch, None), self.compute.loss_chunk_tokens
        return token_losses(hidden, self.wte[...], batch.targets, chunk_size=chunk, rules=self.rules)

    def _hidden_of(self, batch: BatchArrays, dropout: Dropout | None) -> jax.Array:
        # With the default positions the position table is sliced, which is cheaper than a lookup.
        positions = None if batch.segment_ids is None else batch.positions
        return self(batch.inputs, positions=positions, segment_ids=batch.segment_ids, dropout=dropout)

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache of `slots` positions per row, in the compute dtype."""
        config = self.config
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        dtype = jnp.dtype(self.compute.dtype)
        k, v = (reshard(jnp.zeros(shape, dtype), KVCache.spec(self.rules)) for _ in range(2))
        return KVCache(k=k, v=v, lengths=reshard(jnp.zeros(batch, jnp.int32), self.rules.spec("batch")))

    def prefill(self, tokens: jax.Array, lengths: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Reads right-padded prompts, tokens (B, S) of which row b has lengths[b], into an empty cache.

        Returns the hidden states (B, S, D), undefined for pads, and the filled cache.
        """
        positions = jnp.arange(tokens.shape[1])[None] + jnp.zeros_like(tokens)
        hidden, cache = self._with_cache(tokens, positions, cache)
        return hidden, KVCache(k=cache.k, v=cache.v, lengths=lengths)

    def decode(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Reads one token per row, (B, 1), at position cache.lengths. Returns hidden states (B, 1, D) and the cache."""
        hidden, cache = self._with_cache(tokens, cache.lengths[:, None], cache)
        return hidden, KVCache(k=cache.k, v=cache.v, lengths=cache.lengths + 1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores over the vocabulary, fp32 (..., V), of hidden states (..., D): the head is the token embedding."""
        out_dims = ("batch", None, "vocab") if hidden.ndim == 3 else ("batch", "vocab")
        hidden = reshard(hidden, self.rules.spec(*out_dims[:-1], None))
        wte = reshard(self.wte[...].astype(hidden.dtype), self.rules.spec("vocab", None))
        return jnp.einsum(
            "...d,vd->...v",
            hidden,
            wte,
            preferred_element_type=jnp.float32,
            out_sharding=self.rules.spec(*out_dims),
        )

    def _embed(
        self, tokens: jax.Array, positions: jax.Array | None, dropout: Dropout | None, rules: ShardingRules
    ) -> jax.Array:
        dtype, embed, seq = jnp.dtype(self.compute.dtype), rules.axes("embed"), rules.axes("seq")
        wte = all_gather_weight(self.wte[...].astype(dtype), embed, dim=1)
        x = sum_over(embedding_lookup(wte, tokens, rules.axes("vocab")), rules.axes("vocab"), into=seq, dim=1)
        wpe = self.wpe[...].astype(dtype)
        if positions is None:
            x = x + all_gather_weight(local_shard(wpe[: tokens.shape[1]], seq, dim=0), embed, dim=1)
        else:
            x = x + embedding_lookup(all_gather_weight(wpe, embed, dim=1), local_shard(positions, seq, dim=1), None)
        return apply_dropout(x, self.config.embed_dropout, dropout, Site.EMBED, rules=rules)

    def _with_cache(self, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        rules = self.rules.unsharded_sequences()
        ids, cache_spec = rules.spec("batch", None), KVCache.spec(rules)

        def local(model, tokens, positions, k, v):
            # The cache is a carry and not a scanned array, so that XLA updates it in place.
            def block(carry, layer_and_index):
                x, k, v = carry
                layer, index = layer_and_index
                return layer.with_cache(x, index, positions, k, v, rules), None

            x = model._embed(tokens, positions, None, rules)
            (x, k, v), _ = jax.lax.scan(block, (x, k, v), (model.h, jnp.arange(self.config.num_layers)))
            return model.ln_f(x), k, v

        hidden, k, v = shard_map(
            local,
            in_specs=(specs_of(self), ids, ids, cache_spec, cache_spec),
            out_specs=(rules.spec("batch", None, None), cache_spec, cache_spec),
        )(self, tokens, positions, cache.k, cache.v)
        return hidden, KVCache(k=k, v=v, lengths=cache.lengths)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rules: ShardingRules, rngs: nnx.Rngs):
        self.config = config
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, compute, rules=rules, rngs=rngs)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, rules=rules, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array,
        segment_ids: jax.Array | None,
        dropout: Dropout | None,
        rules: ShardingRules,
    ) -> jax.Array:
        drop = partial(apply_dropout, rate=self.config.residual_dropout, dropout=dropout, layer=layer, rules=rules)
        attended = self.attn(self.ln_1(x), layer, segment_ids, dropout, rules)
        x = checkpoint_name(x + drop(attended, site=Site.ATTENTION_RESIDUAL), "residual")
        return x + drop(self.mlp(self.ln_2(x), rules), site=Site.MLP_RESIDUAL)

    def with_cache(
        self, x: jax.Array, layer: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array, rules: ShardingRules
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The block with the caches k, v (L, B, T, G, K), in which it stores its keys and values at `positions`."""
        attended, k, v = self.attn.with_cache(self.ln_1(x), layer, positions, k, v, rules)
        x = x + attended
        return x + self.mlp(self.ln_2(x), rules), k, v


class Attention(nnx.Module):
    """Causal self-attention. With G = 1 all query heads share one key and one value head, replicated over the devices
    that shard the query heads; its gradient is then a sum over those devices."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rules: ShardingRules, rngs: nnx.Rngs):
        self.config, self.compute = config, compute
        D, H, G, K = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        make = partial(Linear, rules=rules, rngs=rngs)
        self.q = make((D, H, K), ("embed", "heads", None), config.init_std)
        self.kv = make((D, 2, G, K), ("embed", None, "kv_heads", None), config.init_std)
        self.out = make((H, K, D), ("heads", None, "embed"), _residual_std(config), num_in=2)

    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array,
        segment_ids: jax.Array | None,
        dropout: Dropout | None,
        rules: ShardingRules,
    ) -> jax.Array:
        q, k, v = self._qkv(x, rules)
        attended = self._attend(q, k, v, layer, segment_ids, dropout, rules)
        return self.out("bshk,hkd->bsd", checkpoint_name(attended, "attention"), rules)

    def with_cache(
        self, x: jax.Array, layer: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array, rules: ShardingRules
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, new_k, new_v = self._qkv(x, rules)
        slots = (layer, jnp.arange(q.shape[0])[:, None], positions)
        k = k.at[slots].set(new_k.astype(k.dtype), mode="drop")
        v = v.at[slots].set(new_v.astype(v.dtype), mode="drop")
        if x.shape[1] > 1:  # A prompt attends to itself; causality hides the pads, which come last.
            attended: Any = attention(q, new_k, new_v, implementation=self.compute.attention)
        else:
            attended = attention(
                q,
                k[layer].astype(q.dtype),
                v[layer].astype(q.dtype),
                causal=False,
                segment_ids=jnp.ones_like(positions),
                kv_segment_ids=(jnp.arange(k.shape[2])[None] <= positions).astype(jnp.int32),
            )
        return self.out("bshk,hkd->bsd", attended, rules), k, v

    def _qkv(self, x: jax.Array, rules: ShardingRules) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = all_gather(x, rules.axes("seq"), dim=1)
        q, kv = self.q("bsd,dhk->bshk", x, rules), self.kv("bsd,dcgk->bscgk", x, rules)
        q, kv = checkpoint_name(q, "q"), checkpoint_name(kv, "kv")
        return q, kv[:, :, 0], kv[:, :, 1]

    def _attend(self, q, k, v, layer, segment_ids, dropout: Dropout | None, rules: ShardingRules) -> Any:
        """Attention on the rows and heads of this device; dropout bits depend on their global indices."""
        active = dropout if self.config.attention_dropout > 0.0 else None
        return attention(
            q,
            k,
            v,
            segment_ids=segment_ids,
            batch_offset=0 if active is None else active.rows[0],
            head_offset=shard_index(rules.axes("heads")) * q.shape[2],
            dropout_rate=0.0 if active is None else self.config.attention_dropout,
            dropout_key=None if active is None else fold_in(active.key, Site.ATTENTION, layer),
            implementation=self.compute.attention,
        )


class MLP(nnx.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig, *, rules: ShardingRules, rngs: nnx.Rngs):
        self.approximate = config.activation == "gelu_tanh"
        D, F = config.embed_dim, config.mlp_dim
        self.up = Linear((D, F), ("embed", "mlp"), config.init_std, rules=rules, rngs=rngs)
        self.down = Linear((F, D), ("mlp", "embed"), _residual_std(config), rules=rules, rngs=rngs)

    def __call__(self, x: jax.Array, rules: ShardingRules) -> jax.Array:
        x = self.up("bsd,df->bsf", all_gather(x, rules.axes("seq"), dim=1), rules)
        x = jax.nn.gelu(checkpoint_name(x, "mlp_up"), approximate=self.approximate)
        return self.down("bsf,fd->bsd", x, rules)


class Linear(nnx.Module):
    """x @ kernel + bias; kernel (in..., out...) with `num_in` input dims, bias (out...).

    x (B, S, in...) has full sequences and this device's shard of the input dims. Sharded output dims stay sharded. With
    sharded input dims the output is reduce-scattered along the sequence.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dims: tuple[str | None, ...],
        std: float,
        *,
        num_in: int = 1,
        rules: ShardingRules,
        rngs: nnx.Rngs,
    ):
        self.dims, self.num_in = dims, num_in
        self.kernel = _normal(rngs, std, shape, rules.spec(*dims))
        # A bias is added to activations, whose embed dim is unsharded.
        bias_dims = (None if dim == "embed" else dim for dim in dims[num_in:])
        self.bias = nnx.Param(reshard(jnp.zeros(shape[num_in:], jnp.float32), rules.spec(*bias_dims)))

    def __call__(self, equation: str, x: jax.Array, rules: ShardingRules) -> jax.Array:
        kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        embed = self.dims.index("embed")
        y = jnp.einsum(equation, x, all_gather_weight(kernel, rules.axes("embed"), dim=embed))
        if embed >= self.num_in:
            y = sum_over(y, rules.axes(self.dims[0]), into=rules.axes("seq"), dim=1)
        return y + bias


class LayerNorm(nnx.Module):
    """Layer norm over the last dim, computed in fp32; the output has the input's dtype."""

    def __init__(self, config: ModelConfig):
        self.epsilon = config.layer_norm_epsilon
        self.scale = nnx.Param(jnp.ones(config.embed_dim, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(config.embed_dim, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centered = x32 - x32.mean(-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


def apply_dropout(
    x: jax.Array,
    rate: float,
    dropout: Dropout | None,
    site: Site,
    layer: jax.Array | int = 0,
    *,
    rules: ShardingRules,
) -> jax.Array:
    """Dropout of a device's activations (B, S, D); the bit of an element depends only on its global coordinates."""
    if dropout is None or rate == 0.0:
        return x
    key = fold_in(dropout.key, site, layer)
    positions = shard_index(rules.axes("seq")) * x.shape[1] + jnp.arange(x.shape[1])
    keep = keep_mask(key, rate, dropout.rows[:, None, None], positions[:, None], jnp.arange(x.shape[2]))
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def _normal(rngs: nnx.Rngs, std: float, shape: tuple[int, ...], spec: PartitionSpec | None) -> nnx.Param:
    return nnx.Param(nnx.initializers.normal(std)(rngs.params(), shape, jnp.float32, out_sharding=spec))


def _residual_std(config: ModelConfig) -> float:
    """Initial std of the 2 L matrices that write to the residual stream, so that their sum keeps its scale."""
    return config.init_std / sqrt(2 * config.num_layers)
