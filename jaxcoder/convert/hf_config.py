"""config.json of Hugging Face's GPTBigCode <-> ModelConfig.

Absent keys have the defaults of transformers' `GPTBigCodeConfig`; keys that do not affect the computation are ignored.
Reference: transformers, configuration_gpt_bigcode.py.
"""

import json
from pathlib import Path
from typing import Any

from jaxcoder.config import ModelConfig
from jaxcoder.config.schema import Activation
from jaxcoder.errors import ConversionError

MODEL_TYPE = "gpt_bigcode"

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
}
_HF_ACTIVATION = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}

_ONLY = {
    "scale_attn_weights": True,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "scale_attn_by_inverse_layer_idx": False,
    "quantization_config": None,
}
"""Keys with a single supported value, which is also the default."""

_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names of keys: `attribute_map` of transformers' GPTBigCodeConfig."""


def read_hf_config(directory: Path) -> tuple[ModelConfig, bool]:
    """The ModelConfig of `directory/config.json`, and whether its output head is tied to the embedding.

    Raises ConversionError for a model that is not supported.
    """
    path = directory / "config.json"
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{directory} has no config.json: give a directory that transformers can open.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read as JSON ({error}): download or save the file again.") from error
    if not isinstance(keys, dict) or keys.get("model_type") != MODEL_TYPE:
        found = repr(keys.get("model_type")) if isinstance(keys, dict) else "no object"
        raise ConversionError(
            f"{path} has model_type {found}: only {MODEL_TYPE!r} (SantaCoder, StarCoder) is supported."
        )
    for key, value in _ONLY.items():
        if key in keys and keys[key] != value:
            raise ConversionError(
                f"{path} sets {key} to {json.dumps(keys[key])}, and only {json.dumps(value)} is supported."
            )
    for alias, key in _ALIASES.items():
        if alias in keys and keys.setdefault(key, keys[alias]) != keys[alias]:
            raise ConversionError(
                f"{path} has {key} {json.dumps(keys[key])} and its alias {alias} {json.dumps(keys[alias])}: "
                "remove one of them."
            )
    return _model_config(keys, path), keys.get("tie_word_embeddings") is not False


def _model_config(keys: dict[str, Any], path: Path) -> ModelConfig:
    def size(key: str, default: int | None = None) -> int:
        value = keys.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConversionError(f"{path} has {key} {json.dumps(value)}: it must be an integer of at least 1.")
        return value

    def number(key: str, default: float) -> float:
        value = keys.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise ConversionError(f"{path} has {key} {json.dumps(value)}: it must be a number in [0, 1).")
        return float(value)

    activation = keys.get("activation_function", "gelu_pytorch_tanh")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ConversionError(
            f"{path} has activation_function {json.dumps(activation)}: supported are {', '.join(_ACTIVATIONS)}."
        )
    multi_query = keys.get("multi_query", True)
    if not isinstance(multi_query, bool):
        raise ConversionError(f"{path} has multi_query {json.dumps(multi_query)}: it must be true or false.")
    embed_dim, num_heads = size("n_embd"), size("n_head")
    if embed_dim % num_heads:
        raise ConversionError(f"{path} has n_embd {embed_dim}, which is not a multiple of n_head {num_heads}.")
    num_kv_heads = 1 if multi_query else num_heads
    if size("num_key_value_heads", num_kv_heads) != num_kv_heads:
        raise ConversionError(
            f"{path} has num_key_value_heads {keys['num_key_value_heads']}, but multi_query {json.dumps(multi_query)} "
            f"means {num_kv_heads}: correct one of them."
        )
    return ModelConfig(
        num_layers=size("n_layer"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=size("n_inner", 4 * embed_dim),
        num_kv_heads=num_kv_heads,
        vocab_size=size("vocab_size"),
        max_seq_len=size("n_positions"),
        activation=_ACTIVATIONS[activation],
        layer_norm_epsilon=number("layer_norm_epsilon", 1e-5),
        embed_dropout=number("embd_pdrop", 0.1),
        residual_dropout=number("resid_pdrop", 0.1),
        attention_dropout=number("attn_pdrop", 0.1),
        # The original's config has the library's default here, not the value used in training.
        init_std=number("initializer_range", 0.02),
    )


def hf_config(config: ModelConfig, *, end_of_text: int, dtype: str = "float32") -> dict[str, Any]:
    """The keys of config.json for weights in `dtype`. end_of_text: the token id at the begin and end of documents.

    Raises ConversionError for a model that transformers cannot represent.
    """
    if config.num_kv_heads not in (1, config.num_heads):
        raise ConversionError(
            f"the model has {config.num_kv_heads} key/value heads for {config.num_heads} query heads: "
            "the PyTorch format supports only one, or as many as query heads."
        )
    if config.num_heads * config.head_dim != config.embed_dim:
        raise ConversionError(
            f"the model has {config.num_heads} heads of {config.head_dim}, whose product is not its embed_dim "
            f"{config.embed_dim}: the PyTorch format has no key for head_dim."
        )
    return {
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "multi_query": config.num_kv_heads == 1,
        "activation_function": _HF_ACTIVATION[config.activation],
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "embd_pdrop": config.embed_dropout,
        "resid_pdrop": config.residual_dropout,
        "attn_pdrop": config.attention_dropout,
        "initializer_range": config.init_std,
        "scale_attn_weights": True,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
    }
