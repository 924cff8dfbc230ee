"""The table of array names between jaxcoder and Hugging Face's GPTBigCode; both directions derive from it.

jaxcoder: kernels [in, out] with separate heads. hf: `torch.nn.Linear` weights [out, in] with q, k and v fused.
Dims: V vocab, P positions, D embed, F mlp, H heads, G key/value heads, K head_dim, A = H K, C = (H + 2 G) K.

c_attn's rows go group by group: the query heads of a group, its key, its value. With G = 1 that is all queries, then
the key, then the value (multi-query); with G = H it is q k v of one head after the other (multi-head).
Reference: transformers, modeling_gpt_bigcode.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcoder.checkpoint.names import layer_digits
from jaxcoder.config import ModelConfig

EMBEDDING = "transformer.wte.weight"
LM_HEAD = "lm_head.weight"
"""The output head, tied to the embedding: optional in files."""


@dataclass(frozen=True)
class Entry:
    """One hf tensor and the jax arrays it contains, name -> dims; dims are letters of the module docstring."""

    hf_name: str
    hf_dims: str
    jax_dims: Mapping[str, str]


_BLOCK = (
    Entry("ln_1.weight", "D", {"ln_1/scale": "D"}),
    Entry("ln_1.bias", "D", {"ln_1/bias": "D"}),
    Entry("attn.c_attn.weight", "C D", {"attn/q/kernel": "D H K", "attn/kv/kernel": "D 2 G K"}),
    Entry("attn.c_attn.bias", "C", {"attn/q/bias": "H K", "attn/kv/bias": "2 G K"}),
    Entry("attn.c_proj.weight", "D A", {"attn/out/kernel": "H K D"}),
    Entry("attn.c_proj.bias", "D", {"attn/out/bias": "D"}),
    Entry("ln_2.weight", "D", {"ln_2/scale": "D"}),
    Entry("ln_2.bias", "D", {"ln_2/bias": "D"}),
    Entry("mlp.c_fc.weight", "F D", {"mlp/up/kernel": "D F"}),
    Entry("mlp.c_fc.bias", "F", {"mlp/up/bias": "F"}),
    Entry("mlp.c_proj.weight", "D F", {"mlp/down/kernel": "F D"}),
    Entry("mlp.c_proj.bias", "D", {"mlp/down/bias": "D"}),
)
_BEFORE = (
    Entry(EMBEDDING, "V D", {"params/wte": "V D"}),
    Entry("transformer.wpe.weight", "P D", {"params/wpe": "P D"}),
)
_AFTER = (
    Entry("transformer.ln_f.weight", "D", {"params/ln_f/scale": "D"}),
    Entry("transformer.ln_f.bias", "D", {"params/ln_f/bias": "D"}),
)


def entries(config: ModelConfig) -> list[Entry]:
    """The complete table with full names, in the order of the layers."""
    digits = layer_digits(config.num_layers)
    blocks = [
        Entry(
            f"transformer.h.{i}.{entry.hf_name}",
            entry.hf_dims,
            {f"params/h/{i:0{digits}d}/{name}": dims for name, dims in entry.jax_dims.items()},
        )
        for i in range(config.num_layers)
        for entry in _BLOCK
    ]
    return [*_BEFORE, *blocks, *_AFTER]


def shape(dims: str, config: ModelConfig) -> tuple[int, ...]:
    """The sizes of dims such as "D 2 G K"."""
    H, G, K = config.num_heads, config.num_kv_heads, config.head_dim
    sizes = {
        "V": config.vocab_size, "P": config.max_seq_len, "D": config.embed_dim, "F": config.mlp_dim,
        "H": H, "G": G, "K": K, "A": H * K, "C": (H + 2 * G) * K, "2": 2,
    }  # fmt: skip
    return tuple(sizes[dim] for dim in dims.split())


def to_hf_tensor(entry: Entry, arrays: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
    """The hf tensor of jax arrays, given in the order of `entry.jax_dims`. Exact: a permutation of the values."""
    fused = _fuse(arrays[0], arrays[1], config) if len(arrays) == 2 else arrays[0]
    hf_shape = shape(entry.hf_dims, config)
    return fused.reshape(hf_shape[::-1]).T if _is_kernel(entry) else fused.reshape(hf_shape)


def to_jax_arrays(entry: Entry, tensor: np.ndarray, config: ModelConfig) -> dict[str, np.ndarray]:
    """The jax arrays of an hf tensor: the inverse of `to_hf_tensor`."""
    tensor = tensor.T if _is_kernel(entry) else tensor
    parts = _split(tensor, config) if len(entry.jax_dims) == 2 else (tensor,)
    return {
        name: part.reshape(shape(dims, config))
        for (name, dims), part in zip(entry.jax_dims.items(), parts, strict=True)
    }


def _is_kernel(entry: Entry) -> bool:
    return all(name.endswith("/kernel") for name in entry.jax_dims)


def _fuse(q: np.ndarray, kv: np.ndarray, config: ModelConfig) -> np.ndarray:
    """q (..., H, K) and kv (..., 2, G, K) into (..., C)."""
    H, G, K = config.num_heads, config.num_kv_heads, config.head_dim
    lead = q.shape[:-2]
    groups = np.concatenate([q.reshape(*lead, G, H // G, K), np.swapaxes(kv, -3, -2)], axis=-2)
    return groups.reshape(*lead, (H + 2 * G) * K)


def _split(fused: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """(..., C) into q (..., H, K) and kv (..., 2, G, K)."""
    H, G, K = config.num_heads, config.num_kv_heads, config.head_dim
    lead = fused.shape[:-1]
    groups = fused.reshape(*lead, G, H // G + 2, K)
    return groups[..., : H // G, :].reshape(*lead, H, K), np.swapaxes(groups[..., H // G :, :], -3, -2)
