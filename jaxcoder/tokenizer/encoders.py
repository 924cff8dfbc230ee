"""Encoding ordinary text: tiktoken where it gives the ids of `tokenizers`, `tokenizers` where it does not.

`tokenizers` defines the ids; tiktoken is about seven times as fast. It is built from the same tokenizer.json: the
vocabulary without specials as ranks, and one regular expression equal to "individual digits, then the GPT-2 split".
That is the same tokenizer only if ids follow the order of the merges and the pre-tokenizer is exactly that one, so
both are checked here, and then both encoders are run on texts chosen to show a difference.

Reference: https://github.com/openai/tiktoken (a merge is allowed whenever the joined bytes have a rank).
"""

import re
from collections.abc import Callable
from itertools import pairwise

Encode = Callable[[str], list[int]]

# Digits are split off before the GPT-2 expression runs, so whitespace before a digit ends its segment and stays whole:
# hence the alternative `\s+(?=\p{N})`, which GPT-2's expression does not have.
SPLIT_PATTERN = r"\p{N}|'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

# Beyond some hundred thousand whitespace characters in a row tiktoken's regex engine overflows its stack and panics.
_LONGEST_WHITESPACE = 50_000

_HOSTILE_TEXTS = (
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
    """GPT-2's printable stand-in for each of the 256 bytes, inverted: symbol -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def tokenizers_encoder(tokenizer) -> Encode:
    """Encoder over a `tokenizers.Tokenizer` that takes sentinels in text for text, never truncates and never pads."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode


def tiktoken_encoder(spec: dict, ranks: dict[bytes, int], reference: Encode) -> tuple[Encode | None, str]:
    """A tiktoken encoder with the ids of `reference`, or None and the reason why there is none.

    `spec` is the parsed tokenizer.json, `ranks` its ordinary vocabulary (bytes of a token -> id).
    """
    reason = _structural_difference(spec, ranks)
    if reason:
        return None, reason
    encode = _build(ranks, reference)
    for text in (*_HOSTILE_TEXTS, *_texts_of_tokens(ranks)):
        if encode(text) != reference(text):
            return None, f"tiktoken gives other ids for {text[:30]!r}"
    return encode, ""


def _structural_difference(spec: dict, ranks: dict[bytes, int]) -> str:
    """Why the tokenizer cannot be tiktoken's kind; "" if it can."""
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
    """The merges in order; tokenizer.json holds them as pairs, older ones as strings with one blank."""
    return [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in spec["model"]["merges"]]


def _build(ranks: dict[bytes, int], reference: Encode) -> Encode:
    import tiktoken

    # tiktoken panics on a byte without a rank, `tokenizers` drops it: stand-ins find the texts that have one.
    first_stand_in = max(ranks.values()) + 1
    absent = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
    stand_ins = {byte: first_stand_in + i for i, byte in enumerate(absent)}
    encoding = tiktoken.Encoding(
        "jaxcoder", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks | stand_ins, special_tokens={}
    )
    stand_in_ids = frozenset(stand_ins.values())
    long_whitespace = re.compile(rf"(?<!\s)\s{{{_LONGEST_WHITESPACE + 1}}}")

    def encode(text: str) -> list[int]:
        if len(text) > _LONGEST_WHITESPACE and long_whitespace.search(text):
            return reference(text)
        ids = encoding.encode_ordinary(text)
        if stand_in_ids and not stand_in_ids.isdisjoint(ids):
            return reference(text)
        return ids

    return encode


def _texts_of_tokens(ranks: dict[bytes, int], per_text: int = 64, at_most: int = 4096) -> list[str]:
    """Texts in which tokens from all over the vocabulary stand side by side, the later (longer) ones included."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    step = -(-len(tokens) // at_most)
    chosen = tokens[::step]
    stride = -(-len(chosen) // per_text)
    return [b"".join(chosen[start::stride]).decode(errors="ignore") for start in range(stride)]
