"""Encodes prompts for completion and for infilling, in the two orders that StarCoder was trained on.

    PSM   <fim_prefix> prefix <fim_suffix> suffix <fim_middle>
    SPM   <fim_prefix> <fim_suffix> suffix <fim_middle> prefix

Prefix and suffix are encoded separately, as in training, without stripping whitespace. Special ids come from the
tokenizer by name; text that spells a sentinel is encoded as text. Long prompts can be truncated at line boundaries, at
the ends farthest from the gap.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxcoder.errors import DataError
from jaxcoder.tokenizer.encoders import Encode
from jaxcoder.tokenizer.tokenizer import FimIds, Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Text to continue; or, with a suffix (which may be empty), a gap to infill."""

    prefix: str
    suffix: str | None = None


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, *, spm: bool = False, most: int | None = None) -> list[int]:
    """Token ids of a prompt, at least one; truncated to `most` tokens, if given.

    An empty prefix without a suffix becomes the end-of-text token, which starts a document.
    Raises DataError for infilling if the tokenizer has no FIM tokens.
    """
    if prompt.suffix is None:
        ids = tokenizer.encode(prompt.prefix) or [tokenizer.eos_id]
        return ids if most is None or len(ids) <= most else keep_end(prompt.prefix, most, tokenizer.encode)
    fim = require_fim(tokenizer)
    prefix, suffix = tokenizer.encode(prompt.prefix), tokenizer.encode(prompt.suffix)
    budget = None if most is None else max(most - 3, 0)  # three FIM tokens
    if budget is not None and len(prefix) + len(suffix) > budget:
        # Half of the budget for each side; what one side does not use, the other gets.
        for_prefix = max(budget - budget // 2, budget - len(suffix))
        prefix = keep_end(prompt.prefix, for_prefix, tokenizer.encode)
        suffix = keep_start(prompt.suffix, budget - len(prefix), tokenizer.encode)
    if spm:
        return [fim.prefix, fim.suffix, *suffix, fim.middle, *prefix]
    return [fim.prefix, *prefix, fim.suffix, *suffix, fim.middle]


def require_fim(tokenizer: Tokenizer) -> FimIds:
    """The ids of the FIM tokens; DataError if there are none."""
    if tokenizer.fim is None:
        raise DataError(
            "The tokenizer has no fill-in-the-middle tokens (<fim_prefix>, <fim_suffix>, <fim_middle>), so this model "
            "cannot infill: leave the suffix out to complete the prefix, or use a model that was trained to infill."
        )
    return tokenizer.fim


def keep_end(text: str, most: int, encode: Encode) -> list[int]:
    """The last tokens of a text, at most `most`, starting at a line start if a complete line fits."""
    ids = encode(text)
    if len(ids) <= most:
        return ids
    starts = [i + 1 for i, character in enumerate(text) if character == "\n" and i + 1 < len(text)]
    fits = _first(len(starts), lambda i: len(encode(text[starts[i] :])) <= most)
    return encode(text[starts[fits] :]) if fits < len(starts) else ids[len(ids) - most :]


def keep_start(text: str, most: int, encode: Encode) -> list[int]:
    """The first tokens of a text, at most `most`, ending at a line end if a complete line fits."""
    ids = encode(text)
    if len(ids) <= most:
        return ids
    ends = [i + 1 for i, character in enumerate(text) if character == "\n"][::-1]
    fits = _first(len(ends), lambda i: len(encode(text[: ends[i]])) <= most)
    return encode(text[: ends[fits]]) if fits < len(ends) else ids[:most]


def _first(count: int, fits: Callable[[int], bool]) -> int:
    """The first index below `count` that fits, if all after one that fits do too; `count` if none."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low
