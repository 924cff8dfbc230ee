"""The files of a tokenizer directory that other loaders need.

tokenizer.json defines the tokenizer. The other settings are those that transformers 4 and 5 both accept (tried with
4.57 and 5.23, with and without a config.json in the directory):
- `tokenizer_class: GPT2Tokenizer`, as StarCoder's: transformers 5 replaces the pre-tokenizer by GPT-2's unless a
  config.json has model_type gpt_bigcode; a space before a digit then gets another id;
- `PreTrainedTokenizerFast`, used here, keeps tokenizer.json; but without `model_input_names` transformers 4 returns
  token_type_ids, which GPTBigCode adds to its input;
- `additional_special_tokens` and special_tokens_map.json are read by both; `extra_special_tokens` breaks version 4.
vocab.json and merges.txt are for older loaders.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcoder.errors import DataError
from jaxcoder.io.os_errors import access_errors
from jaxcoder.tokenizer.encoders import merge_pairs
from jaxcoder.tokenizer.special_tokens import END_OF_TEXT, SPECIAL_TOKENS, hyphenated

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SETTINGS = (
    *_ROLES,
    "additional_special_tokens",
    "chat_template",
    "padding_side",
    "truncation_side",
    "model_max_length",
)
"""Keys of a tokenizer_config.json that are kept."""

_GPT2_FILES = ("vocab.json", "merges.txt")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json")


def parse_settings(content: bytes, origin: str) -> dict[str, Any]:
    """A tokenizer_config.json. Raises DataError if it is not an object."""
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"The tokenizer_config.json of {origin} is not JSON ({error}): fix or remove it.") from error
    if not isinstance(settings, dict):
        raise DataError(f"The tokenizer_config.json of {origin} is not an object: fix or remove it.")
    return settings


def tokenizer_files(
    content: bytes, spec: dict, specials: tuple[str, ...], settings: Mapping[str, Any]
) -> dict[str, bytes]:
    """The content of TOKENIZER_FILES by name. content: tokenizer.json; spec: the same parsed. settings: those that
    replace the defaults."""
    defaults = {role: END_OF_TEXT for role in ("bos_token", "eos_token", "unk_token") if END_OF_TEXT in specials}
    roles = defaults | {role: settings[role] for role in _ROLES if settings.get(role) is not None}
    special_tokens_map = {"additional_special_tokens": list(specials), **roles}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **{key: value for key, value in settings.items() if value is not None},
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


def has_tokenizer(directory: Path) -> bool:
    """Whether a local directory has a tokenizer.json, or a vocab.json and merges.txt."""
    return (directory / "tokenizer.json").is_file() or all((directory / name).is_file() for name in _GPT2_FILES)


def tokenizer_json_of(directory: Path, settings: Mapping[str, Any]) -> bytes:
    """A tokenizer.json from vocab.json and merges.txt, with GPT-2's pre-tokenizer, as transformers reads them.

    Raises DataError if they are damaged.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        vocab, lines = (directory / name for name in _GPT2_FILES)
        pairs = [line.split(" ") for line in lines.read_text("utf-8").split("\n") if line]
        merges = [(left, right) for left, right in pairs if left != "#version:"]
        backend = tokenizers.Tokenizer(models.BPE(json.loads(vocab.read_text("utf-8")), merges))
        known = backend.get_vocab()
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"The vocab.json and merges.txt in {directory} are damaged ({error}): download them."
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = [*(settings.get(role) for role in _ROLES), *settings.get("additional_special_tokens", ())]
    contents = [name.get("content") if isinstance(name, dict) else name for name in names]
    wanted = dict.fromkeys([*contents, *SPECIAL_TOKENS, *map(hyphenated, SPECIAL_TOKENS)])
    backend.add_special_tokens([name for name in wanted if isinstance(name, str) and name in known])
    return backend.to_str().encode()


def check_output_directory(directory: Path, *, overwrite: bool) -> None:
    """Raises DataError if the directory has files that are not a tokenizer's, or a tokenizer without `overwrite`."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise DataError(f"The output directory {directory} is a file: choose another name.")
    with access_errors(directory, "write"):
        others = sorted(entry.name for entry in directory.iterdir() if entry.name not in TOKENIZER_FILES)
    others = [name for name in others if not name.startswith(".")]
    if others:
        raise DataError(f"The output directory {directory} contains other files ({others[0]}): choose another one.")
    if (directory / "tokenizer.json").exists() and not overwrite:
        raise DataError(
            f"The directory {directory} already contains a tokenizer: choose another one, or give --overwrite."
        )
