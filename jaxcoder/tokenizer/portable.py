"""The files of a tokenizer directory that other people's loaders want.

tokenizer.json is the truth. Beside it transformers 4 and 5 both want `tokenizer_class: GPT2Tokenizer`,
`additional_special_tokens` and special_tokens_map.json; other classes lose the special tokens in one of the two, or
make it return token_type_ids, which GPTBigCode would add to its input. vocab.json and merges.txt serve older loaders.
"""

import json
from pathlib import Path

from jaxcoder.tokenizer.atomic import write_bytes, write_text
from jaxcoder.tokenizer.encoders import merge_pairs
from jaxcoder.tokenizer.special_tokens import END_OF_TEXT

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")


def write_tokenizer_files(directory: Path, content: bytes, spec: dict, specials: tuple[str, ...]) -> None:
    """Write TOKENIZER_FILES; `content` is tokenizer.json, `spec` the same parsed. tokenizer.json comes last."""
    roles = {role: END_OF_TEXT for role in ("bos_token", "eos_token", "unk_token") if END_OF_TEXT in specials}
    special_tokens_map = {"additional_special_tokens": list(specials), **roles}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special_tokens_map,
    }
    vocab = spec["model"]["vocab"]
    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in merge_pairs(spec))]
    write_text(directory / "vocab.json", json.dumps(vocab, ensure_ascii=False) + "\n")
    write_text(directory / "merges.txt", "\n".join(merges) + "\n")
    write_text(directory / "special_tokens_map.json", json.dumps(special_tokens_map, indent=2) + "\n")
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_bytes(directory / "tokenizer.json", content)
