"""The GPTBigCode decoder (SantaCoder, StarCoder): GPT-2's pre-norm block with multi-query attention.

Shapes: B batch, S query length, T cache slots, D embed, H heads, G key/value heads, K head_dim, F mlp, V vocab,
P positions, L layers. Weights are fp32 with kernels [in, out]; the layers are one Block whose arrays have a leading L.
Reference: Allal et al. 2023 (arXiv 2301.03988), Li et al. 2023 (arXiv 2305.06161).
"""

from dataclasses import dataclass
from functools import partial
from math import sqrt

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxcoder.config import ComputeConfig, ModelConfig
from jaxcoder.kernels.attention.api import attention
from jaxcoder.kernels.dropout.api import Site, fold_in, keep_mask
from jaxcoder.sharding.ops import lookup, on_each_device, reshard, shard_index
from jaxcoder.sharding.rules import ShardingRules

REMAT_POLICIES = {
    "minimal": jax.checkpoint_policies.save_only_these_names("q", "kv", "attention", "mlp_up"),
    "block": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Randomness of one training step: key, uint32 (2,); rows, int32 (B,), the samples' indices in the global batch."""

    key: jax.Array
    rows: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values so far: k, v (L, B, T, G, K); lengths int32 (B,), how many slots of a row are filled."""

    k: jax.Array
    v: jax.Array
    lengths: jax.Array

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype, rules: ShardingRules | None = None
    ) -> "KVCache":
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        rules = rules or ShardingRules.for_model(config)
        k, v = (reshard(jnp.zeros(shape, dtype), cls.spec(rules)) for _ in range(2))
        return cls(k=k, v=v, lengths=reshard(jnp.zeros(batch, jnp.int32), rules.spec("batch")))

    @staticmethod
    def spec(rules: ShardingRules) -> PartitionSpec | None:
        """Of k and v: split by row, and by head where there are several."""
        return rules.spec(None, "batch", None, "kv_heads", None)


class GPTBigCode(nnx.Module):
    """The whole decoder. `self(tokens)` gives final hidden states, `self.logits(hidden)` scores over the vocabulary."""

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
        """Hidden states (B, S, D) after the last norm, in the compute dtype.

        Args:
            tokens: int32 (B, S). positions: int32 (B, S), default 0 .. S-1.
            segment_ids: int32 (B, S), one id per document, 0 for pads; None lets attention run across documents.
            dropout: randomness of training; None turns dropout off.
        """
        x = self._embed(tokens, positions, dropout)

        def block(x, layer_and_index):
            layer, index = layer_and_index
            return layer(x, index, segment_ids, dropout), None

        if self.compute.remat != "none":
            block = jax.checkpoint(block, policy=REMAT_POLICIES[self.compute.remat], prevent_cse=False)
        x, _ = jax.lax.scan(block, x, (self.h, jnp.arange(self.config.num_layers)))
        return self.ln_f(x)

    def prefill(self, tokens: jax.Array, lengths: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Reads right-padded prompts, tokens (B, S) of which row b has lengths[b], into an empty cache.

        Returns the hidden states (B, S, D), those of pads meaningless, and the filled cache.
        """
        positions = jnp.arange(tokens.shape[1])[None] + jnp.zeros_like(tokens)
        hidden, cache = self._with_cache(tokens, positions, cache)
        return hidden, KVCache(k=cache.k, v=cache.v, lengths=lengths)

    def decode(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One more token per row, tokens (B, 1), at position cache.lengths. Returns hidden (B, 1, D) and the cache."""
        hidden, cache = self._with_cache(tokens, cache.lengths[:, None], cache)
        return hidden, KVCache(k=cache.k, v=cache.v, lengths=cache.lengths + 1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores over the vocabulary, fp32 (..., V), of hidden states (..., D): the head is the token embedding."""
        out_dims = ("batch", None, "vocab")[-hidden.ndim :] if hidden.ndim == 3 else ("batch", "vocab")
        wte = reshard(self.wte[...].astype(hidden.dtype), self.rules.spec("vocab", None))
        return jnp.einsum(
            "...d,vd->...v",
            hidden,
            wte,
            preferred_element_type=jnp.float32,
            out_sharding=self.rules.spec(*out_dims),
        )

    def _embed(self, tokens: jax.Array, positions: jax.Array | None, dropout: Dropout | None) -> jax.Array:
        dtype = jnp.dtype(self.compute.dtype)
        x = lookup(self.wte[...].astype(dtype), tokens, self.rules, rows="vocab")
        wpe = reshard(self.wpe[...].astype(dtype), self.rules.spec(None, None))
        x = x + (wpe[: tokens.shape[1]] if positions is None else lookup(wpe, positions, self.rules, rows=None))
        return drop(x, self.config.embed_dropout, dropout, Site.EMBED)

    def _with_cache(self, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        # The cache is carried, not scanned over: XLA then updates it in place.
        def block(carry, layer_and_index):
            x, cache = carry
            layer, index = layer_and_index
            return layer.with_cache(x, index, positions, cache), None

        x = self._embed(tokens, positions, None)
        (x, cache), _ = jax.lax.scan(block, (x, cache), (self.h, jnp.arange(self.config.num_layers)))
        return self.ln_f(x), cache


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rules: ShardingRules, rngs: nnx.Rngs):
        self.config = config
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config, compute, rules=rules, rngs=rngs)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, rules=rules, rngs=rngs)

    def __call__(
        self, x: jax.Array, layer: jax.Array, segment_ids: jax.Array | None, dropout: Dropout | None
    ) -> jax.Array:
        rate = self.config.residual_dropout
        x = x + drop(self.attn(self.ln_1(x), layer, segment_ids, dropout), rate, dropout, Site.ATTENTION_RESIDUAL, layer)
        return x + drop(self.mlp(self.ln_2(x)), rate, dropout, Site.MLP_RESIDUAL, layer)

    def with_cache(
        self, x: jax.Array, layer: jax.Array, positions: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        attended, cache = self.attn.with_cache(self.ln_1(x), layer, positions, cache)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), cache


class Attention(nnx.Module):
    """Causal self-attention; with G = 1 all query heads share one key and one value head."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, *, rules: ShardingRules, rngs: nnx.Rngs):
        self.config, self.compute, self.rules = config, compute, rules
        D, H, G, K = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        make = partial(Linear, rules=rules, rngs=rngs)
        self.q = make((D, H, K), ("embed", "heads", None), config.init_std)
        self.kv = make((D, 2, G, K), ("embed", None, "kv_heads", None), config.init_std)
        self.out = make((H, K, D), ("heads", None, "embed"), _residual_std(config), num_in=2)

    def __call__(
        self, x: jax.Array, layer: jax.Array, segment_ids: jax.Array | None, dropout: Dropout | None
    ) -> jax.Array:
        q, k, v = self._qkv(x)
        return self._out(self._attend(q, k, v, layer, segment_ids, dropout))

    def with_cache(
        self, x: jax.Array, layer: jax.Array, positions: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        q, k, v = self._qkv(x)
        is_prompt = x.shape[1] > 1

        def local(q, k, v, layer, positions, k_cache, v_cache):
            slots = (layer, jnp.arange(q.shape[0])[:, None], positions)
            k_cache = k_cache.at[slots].set(k.astype(k_cache.dtype), mode="drop")
            v_cache = v_cache.at[slots].set(v.astype(v_cache.dtype), mode="drop")
            if is_prompt:  # It attends to itself; its pads come last, where no token of it looks.
                return attention(q, k, v, implementation=self.compute.attention), k_cache, v_cache
            attended = attention(
                q,
                k_cache[layer].astype(q.dtype),
                v_cache[layer].astype(q.dtype),
                causal=False,
                segment_ids=jnp.ones_like(positions),
                kv_segment_ids=(jnp.arange(k_cache.shape[2])[None] <= positions).astype(jnp.int32),
            )
            return attended, k_cache, v_cache

        q_spec, kv_spec = self._attention_specs()
        cache_spec, row_spec = KVCache.spec(self.rules), self.rules.spec("batch", None)
        attended, k_cache, v_cache = on_each_device(
            local,
            in_specs=(q_spec, kv_spec, kv_spec, PartitionSpec(), row_spec, cache_spec, cache_spec),
            out_specs=(q_spec, cache_spec, cache_spec),
        )(q, k, v, layer, positions, cache.k, cache.v)
        return self._out(attended), KVCache(k=k_cache, v=v_cache, lengths=cache.lengths)

    def _qkv(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = self.q("bsd,dhk->bshk", x, self.rules.spec("batch", None, "heads", None))
        kv = self.kv("bsd,dcgk->bscgk", x, self.rules.spec("batch", None, None, "kv_heads", None))
        q, kv = checkpoint_name(q, "q"), checkpoint_name(kv, "kv")
        return q, kv[:, :, 0], kv[:, :, 1]

    def _out(self, attended: jax.Array) -> jax.Array:
        attended = checkpoint_name(attended, "attention")
        return self.out("bshk,hkd->bsd", attended, self.rules.spec("batch", None, None))

    def _attend(self, q, k, v, layer, segment_ids, dropout: Dropout | None) -> jax.Array:
        """Runs the attention operation on each device's own rows and heads."""
        use_dropout = dropout is not None and self.config.attention_dropout > 0.0
        key = fold_in(dropout.key, Site.ATTENTION, layer) if use_dropout else None
        rows = dropout.rows if use_dropout else None

        q_spec, kv_spec = self._attention_specs()

        def local(q, k, v, segment_ids, key, rows):
            return attention(
                q,
                k,
                v,
                segment_ids=segment_ids,
                batch_offset=0 if rows is None else rows[0],
                head_offset=0 if q_spec is None else shard_index(q_spec[2]) * q.shape[2],
                dropout_rate=self.config.attention_dropout if use_dropout else 0.0,
                dropout_key=key,
                implementation=self.compute.attention,
            )

        in_specs = (q_spec, kv_spec, kv_spec, self.rules.spec("batch", None), PartitionSpec(), self.rules.spec("batch"))
        return on_each_device(local, in_specs=in_specs, out_specs=q_spec)(q, k, v, segment_ids, key, rows)

    def _attention_specs(self) -> tuple[PartitionSpec | None, PartitionSpec | None]:
        """Of q (B, S, H, K) and of k, v (B, S, G, K)."""
        return self.rules.spec("batch", None, "heads", None), self.rules.spec("batch", None, "kv_heads", None)


class MLP(nnx.Module):
    """down(gelu(up(x))), four times as wide inside."""

    def __init__(self, config: ModelConfig, *, rules: ShardingRules, rngs: nnx.Rngs):
        self.approximate, self.rules = config.activation == "gelu_tanh", rules
        D, F = config.embed_dim, config.mlp_dim
        self.up = Linear((D, F), ("embed", "mlp"), config.init_std, rules=rules, rngs=rngs)
        self.down = Linear((F, D), ("mlp", "embed"), _residual_std(config), rules=rules, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = checkpoint_name(self.up("bsd,df->bsf", x, self.rules.spec("batch", None, "mlp")), "mlp_up")
        x = jax.nn.gelu(x, approximate=self.approximate)
        return self.down("bsf,fd->bsd", x, self.rules.spec("batch", None, None))


class Linear(nnx.Module):
    """x @ kernel + bias; kernel (in..., out...) with `num_in` in dims, bias (out...)."""

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
        self.kernel = _normal(rngs, std, shape, rules.spec(*dims))
        # A bias is added to activations, whose embed dim is whole.
        bias_dims = (None if dim == "embed" else dim for dim in dims[num_in:])
        self.bias = nnx.Param(reshard(jnp.zeros(shape[num_in:], jnp.float32), rules.spec(*bias_dims)))

    def __call__(self, equation: str, x: jax.Array, out_sharding: PartitionSpec | None) -> jax.Array:
        kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return jnp.einsum(equation, x, kernel, out_sharding=out_sharding) + bias


class LayerNorm(nnx.Module):
    """Over the last dim, in fp32 whatever comes in; the output has the input's dtype."""

    def __init__(self, config: ModelConfig):
        self.epsilon = config.layer_norm_epsilon
        self.scale = nnx.Param(jnp.ones(config.embed_dim, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(config.embed_dim, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


def drop(
    x: jax.Array, rate: float, dropout: Dropout | None, site: Site, layer: jax.Array | int = 0
) -> jax.Array:
    """Dropout of activations (B, S, D); each element's bit depends on its global coordinates only."""
    if dropout is None or rate == 0.0:
        return x
    key = fold_in(dropout.key, site, layer)
    keep = keep_mask(
        key, rate, dropout.rows[:, None, None], jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[2])
    )
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def _normal(rngs: nnx.Rngs, std: float, shape: tuple[int, ...], spec: PartitionSpec | None) -> nnx.Param:
    return nnx.Param(nnx.initializers.normal(std)(rngs.params(), shape, jnp.float32, out_sharding=spec))


def _residual_std(config: ModelConfig) -> float:
    """Of matrices that write to the residual stream: 2 L of them add up there."""
    return config.init_std / sqrt(2 * config.num_layers)
