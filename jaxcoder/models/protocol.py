"""What the rest of the package knows of a model, and the table of models.

Training needs `Model`; inference and infilling need `Decoder`. A model is a pytree of arrays (an `nnx.Module` in tree
style). The arrays of its repeated layers have a leading dim L and lie under the attribute `h`; every array is made with
the sharding that `rules` gives its dims on the mesh in scope, so `jax.eval_shape` yields shapes, dtypes and shardings.

Shapes: B batch, S sequence, T cache slots, D embed, V vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from flax import nnx

from jaxcoder.config import ComputeConfig, ModelConfig
from jaxcoder.sharding.rules import ShardingRules


class BatchArrays(Protocol):
    """Arrays (B, S): inputs, targets int32; loss_mask fp32; positions int32; segment_ids int32, or None to attend
    across documents."""

    @property
    def inputs(self) -> Any: ...
    @property
    def targets(self) -> Any: ...
    @property
    def loss_mask(self) -> Any: ...
    @property
    def positions(self) -> Any: ...
    @property
    def segment_ids(self) -> Any: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Randomness of one training step: key, uint32 (2,); rows, int32 (B,), the samples' indices in the global batch."""

    key: jax.Array
    rows: jax.Array


class Model(Protocol):
    """A model that can be trained, evaluated, saved and planned."""

    config: ModelConfig
    compute: ComputeConfig
    rules: ShardingRules

    @property
    def has_dropout(self) -> bool:
        """Whether training needs randomness."""

    def loss(self, batch: BatchArrays, dropout: Dropout | None = None) -> tuple[jax.Array, jax.Array]:
        """Loss summed over the targets that count, in nats, and their number: fp32 scalars."""

    def token_losses(self, batch: BatchArrays) -> jax.Array:
        """Loss of every target in nats, without dropout, also of those that do not count: fp32 (B, S)."""


class Decoder(Model, Protocol):
    """A model that generates token by token."""

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Hidden states (B, S, D) of tokens, int32 (B, S)."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Scores over the vocabulary, fp32 (..., V), of hidden states (..., D)."""

    def empty_cache(self, batch: int, slots: int) -> Any:
        """A cache of `slots` positions per row, in the compute dtype."""

    def prefill(self, tokens: jax.Array, lengths: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Reads right-padded prompts (B, S) into an empty cache: hidden states (B, S, D) and the cache."""

    def decode(self, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Reads one more token per row, (B, 1): hidden states (B, 1, D) and the cache."""


def model_class(config: ModelConfig) -> Callable[..., Any]:
    """The model of a configuration. A new model is a file of this room and a row here."""
    from jaxcoder.models.gpt_bigcode import GPTBigCode

    return {ModelConfig: GPTBigCode}[type(config)]


def make_model(config: ModelConfig, compute: ComputeConfig | None = None, *, seed: int) -> Any:
    """A `Decoder` with fresh weights, the same on every mesh. Call under `jax.jit` and the mesh."""
    return model_class(config)(config, compute or ComputeConfig(), rngs=nnx.Rngs(seed))


def abstract_model(config: ModelConfig, compute: ComputeConfig | None = None) -> Any:
    """The model as shapes, dtypes and the shardings of the mesh in scope; allocates nothing."""
    return jax.eval_shape(lambda: make_model(config, compute, seed=0))
