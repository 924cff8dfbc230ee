"""The files of a tokenizer directory that other loaders need.

tokenizer.json is the truth. Beside it transformers 4 and 5 agree on few settings (tried with 4.57 and 5.23, with and
without a config.json beside):
- `tokenizer_class: GPT2Tokenizer`, StarCoder's own: transformers 5 replaces the pre-tokenizer by GPT-2's unless a
  config.json says gpt_bigcode, and a blank before a digit then gets another id;
- `PreTrainedTokenizerFast`, taken here, keeps tokenizer.json as it is; but without `model_input_names` transformers 4
  returns token_type_ids, which GPTBigCode adds to its input;
- `additional_special_tokens` and special_tokens_map.json are read by both; `extra_special_tokens` breaks 4.
vocab.json and merges.txt serve older loaders.
"""

import json
from pathlib import Path

from jaxcoder.errors import DataError
from jaxcoder.io.os_errors import access_errors
from jaxcoder.tokenizer.encoders import merge_pairs
from jaxcoder.tokenizer.special_tokens import END_OF_TEXT

TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json")


def tokenizer_files(content: bytes, spec: dict, specials: tuple[str, ...]) -> dict[str, bytes]:
    """The content of TOKENIZER_FILES by name; `content` is tokenizer.json, `spec` the same parsed."""
    roles = {role: END_OF_TEXT for role in ("bos_token", "eos_token", "unk_token") if END_OF_TEXT in specials}
    special_tokens_map = {"additional_special_tokens": list(specials), **roles}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special_tokens_map,
    }
    vocab = spec["model"]["vocab"]
    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in merge_pairs(spec))]
    texts = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(merges),
        "special_tokens_map.json": json.dumps(special_tokens_map, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    # tokenizer.json is written last: a directory that has it is complete.
    return {name: f"{text}\n".encode() for name, text in texts.items()} | {"tokenizer.json": content}


def check_output_directory(directory: Path, *, overwrite: bool) -> None:
    """Raise DataError unless a tokenizer may be written here: nothing is lost, or `overwrite` and it is a tokenizer."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise DataError(f"The output directory {directory} is a file: choose another name.")
    with access_errors(directory, "write"):
        strange = sorted(entry.name for entry in directory.iterdir() if entry.name not in TOKENIZER_FILES)
    strange = [name for name in strange if not name.startswith(".")]
    if strange:
        raise DataError(f"The output directory {directory} holds something else ({strange[0]}): choose another one.")
    if (directory / "tokenizer.json").exists() and not overwrite:
        raise DataError(
            f"The directory {directory} already holds a tokenizer: choose another one, or give --overwrite."
        )
