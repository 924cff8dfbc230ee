"""How large a model is and what a token costs, from the configuration alone.

Convention of FLOPs: a multiply-add is 2; matrices and the tied head count, embedding look-ups, norms, biases and
GELU do not; attention counts the causal half; a training step is 3 forward passes; recomputation is not counted.
"""

from jaxcoder.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Exact number of weights; the tied embedding counts once."""
    d, kv, q = config.embed_dim, config.num_kv_heads * config.head_dim, config.num_heads * config.head_dim
    block = 4 * d + (d + 1) * (q + 2 * kv) + (q + 1) * d + (d + 1) * config.mlp_dim + (config.mlp_dim + 1) * d
    return (config.vocab_size + config.max_seq_len) * d + config.num_layers * block + 2 * d


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Mean over the tokens of a sequence of `seq_len`."""
    d, kv, q = config.embed_dim, config.num_kv_heads * config.head_dim, config.num_heads * config.head_dim
    matrices = config.num_layers * (d * (q + 2 * kv) + q * d + 2 * d * config.mlp_dim) + config.vocab_size * d
    attention = config.num_layers * 2 * seq_len * q / 2
    return 2.0 * (matrices + attention)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward: the number that model FLOPs utilisation (MFU) is made of."""
    return 3.0 * forward_flops_per_token(config, seq_len)
