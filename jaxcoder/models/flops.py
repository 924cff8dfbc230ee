"""How large a model is and what a token costs, from the shapes of its arrays; no array is made and no device is used.

Convention of FLOPs: a multiply-add counts 2; matrices and the tied head count, embedding lookups, norms, biases and
GELU do not; attention counts the causal half; a training step is 3 forward passes; recomputation is not counted.
"""

from functools import lru_cache
from math import prod

import jax

from jaxcoder.config import ModelConfig
from jaxcoder.models.protocol import abstract_model


@lru_cache(maxsize=64)
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array; those below `h` have a leading dim L."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(config))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def num_parameters(config: ModelConfig) -> int:
    """Exact number of weights; the tied embedding counts once."""
    return sum(map(prod, _shapes(config).values()))


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Mean over the tokens of a sequence of `seq_len`."""
    # Each element of a kernel, and of the token embedding as the head, multiplies one activation of a token.
    matrices = sum(prod(shape) for name, shape in _shapes(config).items() if "kernel" in name or "wte" in name)
    # Per layer: scores and weighted values, 2 products of all query heads with, on average, half of the sequence.
    attention = sum(
        2 * prod(shape) // shape[1] * seq_len / 2 for name, shape in _shapes(config).items() if "attn/q/kernel" in name
    )
    return 2.0 * (matrices + attention)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward: the numerator of model FLOPs utilization (MFU)."""
    return 3.0 * forward_flops_per_token(config, seq_len)
