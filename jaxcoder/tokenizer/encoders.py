"""Encodes ordinary text with tiktoken if it gives the same ids as `tokenizers`, else with `tokenizers`.

`tokenizers` defines the ids; tiktoken is about seven times as fast. It is built from the same tokenizer.json: the
vocabulary without special tokens as ranks, and one regular expression equal to "individual digits, then the GPT-2
split". The two are equal only if ids follow the order of the merges and the pre-tokenizer is exactly this one. Both are
checked here, and then both encoders are compared on hostile texts.

Reference: https://github.com/openai/tiktoken (a merge is allowed whenever the joined bytes have a rank).
"""

import re
from collections.abc import Callable
from itertools import pairwise

Encode = Callable[[str], list[int]]

# Digits are split off before the GPT-2 expression runs, so whitespace before a digit is at the end of its segment and
# is not split: hence the alternative `\s+(?=\p{N})`, which GPT-2's expression does not have.
SPLIT_PATTERN = r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# Beyond some hundred thousand whitespace characters in a row tiktoken's regex engine overflows its stack and panics.
_LONGEST_WHITESPACE = 50_000

HOSTILE_TEXTS = (
    "def f(x):\n    return x  # 12 tabs\t\t\n\n\n\tx = 3.14\r\n",
    "  1   2\t3 \n4\n\n5 a1b22c333 0x1F １２³½ ٣٤ x²",
    "it's we're I'll you'd I'm they've 't 'S '' ' s don'ts '\u00e9",
    "   leading and trailing   ",
    "<|endoftext|><fim_prefix> <fim-middle> < | endoftext|>",
    "a\u00a0b\u3000 c\u2028d\u2029 \x85 \x1c\x1d\x1e\x1f \x0b\x0c\ufeff\u200b\u200d e",
    "\u4e2d\u6587\u4ee3\u7801 \u0440\u0443\u0441\u0441 \u0627\u0644\u0639 \u0e01\u0e34 \u0939\u093f e\u0301",
    "\U0001f600\U0001f468\u200d\U0001f469 \U0001f1e9\U0001f1ea1",
    "!!!??? ---->>>> ==== //// \\n \\\\ #### ____ __init__ a_b a-b $x {{}} ((())) ;;",
    "aaaa" * 40 + " " * 70 + "\n" * 30 + "\t" * 20 + "x",
    "\x00\x01\x7f\ufffd\ue000",
)


def byte_of_symbol() -> dict[str, int]:
    """The inverse of GPT-2's printable symbols for the 256 bytes: symbol -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def tokenizers_encoder(tokenizer) -> Encode:
    """An encoder by a `tokenizers.Tokenizer` that encodes sentinels in text as text, without truncation and padding."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode


def tiktoken_encoder(spec: dict, ranks: dict[bytes, int], reference: Encode) -> tuple[Encode | None, str]:
    """A tiktoken encoder with the same ids as `reference`, or None and the reason.

    `spec` is the parsed tokenizer.json, `ranks` its ordinary vocabulary (bytes of a token -> id).
    """
    reason = _structural_difference(spec, ranks)
    if reason:
        return None, reason
    encode = _build(ranks, reference)
    for text in (*HOSTILE_TEXTS, *_texts_of_tokens(ranks)):
        if encode(text) != reference(text):
            return None, f"tiktoken gives other ids for {text[:30]!r}"
    return encode, ""


def _structural_difference(spec: dict, ranks: dict[bytes, int]) -> str:
    """Why tiktoken cannot represent the tokenizer; "" if it can."""
    if not ranks:
        return "it has special tokens only"
    if spec.get("normalizer"):
        return "it has a normalizer"
    if any(not token.get("special") for token in spec["added_tokens"]):
        return "it has added tokens that are not special"
    stages = spec.get("pre_tokenizer") or {}
    stages = stages.get("pretokenizers", [stages])
    digits_then_gpt2 = (
        [stage.get("type") for stage in stages] == ["Digits", "ByteLevel"]
        and stages[0].get("individual_digits") is True
        and stages[1].get("add_prefix_space") is False
        and stages[1].get("use_regex", True) is True
    )
    if not digits_then_gpt2:
        return "its pre-tokenizer is not StarCoder's"
    model = spec["model"]
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            return f"its BPE model sets {option}"
    vocab = model["vocab"]
    merged_ids = [vocab.get("".join(merge)) for merge in merge_pairs(spec)]
    if None in merged_ids or any(left >= right for left, right in pairwise(merged_ids)):
        return "its ids do not follow the order of its merges"
    if len(merged_ids) + sum(len(token) == 1 for token in ranks) != len(ranks):
        return "it has tokens that no merge makes"
    return ""


def merge_pairs(spec: dict) -> list[tuple[str, str]]:
    """The merges in order; they are pairs in tokenizer.json, or strings with one space in older files."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in spec["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _build(ranks: dict[bytes, int], reference: Encode) -> Encode:
    import tiktoken

    # tiktoken panics on a byte without a rank, which `tokenizers` drops: temporary ids detect texts with such bytes.
    first_temporary = max(ranks.values()) + 1
    absent = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
    temporary = {byte: first_temporary + i for i, byte in enumerate(absent)}
    encoding = tiktoken.Encoding(
        "jaxcoder", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks | temporary, special_tokens={}
    )
    temporary_ids = frozenset(temporary.values())
    long_whitespace = re.compile(rf"(?<!\s)\s{{{_LONGEST_WHITESPACE + 1}}}")

    def encode(text: str) -> list[int]:
        if len(text) > _LONGEST_WHITESPACE and long_whitespace.search(text):
            return reference(text)
        ids = encoding.encode_ordinary(text)
        if temporary_ids and not temporary_ids.isdisjoint(ids):
            return reference(text)
        return ids

    return encode


def _texts_of_tokens(ranks: dict[bytes, int], per_text: int = 64, at_most: int = 4096) -> list[str]:
    """Texts that join tokens from all parts of the vocabulary."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    step = -(-len(tokens) // at_most)
    chosen = tokens[::step]
    stride = -(-len(chosen) // per_text)
    return [b"".join(chosen[start::stride]).decode(errors="ignore") for start in range(stride)]
