"""Prompts of token ids: for completing, and for infilling in the two orders that StarCoder was trained on.

    PSM   <fim_prefix> prefix <fim_suffix> suffix <fim_middle>
    SPM   <fim_prefix> <fim_suffix> suffix <fim_middle> prefix

Prefix and suffix are encoded apart, as in training, and exactly as given: no blank is taken off. Special ids come from
the tokenizer by name; text that spells a sentinel stays text. What is too long for the context may be cut at the line
starts farthest from where the answer goes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxcoder.errors import DataError
from jaxcoder.tokenizer.encoders import Encode
from jaxcoder.tokenizer.tokenizer import FimIds, Tokenizer


@dataclass(frozen=True)
class Prompt:
    """Text to go on from, or with a suffix (it may be empty) a gap to fill."""

    prefix: str
    suffix: str | None = None


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, *, spm: bool = False, most: int | None = None) -> list[int]:
    """Token ids of a prompt, at least one; cut to `most` tokens, if given.

    An empty text to complete becomes the end-of-text token, which starts a document.
    Raises DataError for an infill if the tokenizer has no FIM tokens.
    """
    if prompt.suffix is None:
        whole = tokenizer.encode(prompt.prefix) or [tokenizer.eos_id]
        return whole if most is None or len(whole) <= most else keep_end(prompt.prefix, most, tokenizer.encode)
    fim = require_fim(tokenizer)
    prefix, suffix = tokenizer.encode(prompt.prefix), tokenizer.encode(prompt.suffix)
    room = None if most is None else max(most - 3, 0)
    if room is not None and len(prefix) + len(suffix) > room:
        # Half of the room each; what one side leaves, the other has.
        for_prefix = max(room - room // 2, room - len(suffix))
        prefix = keep_end(prompt.prefix, for_prefix, tokenizer.encode)
        suffix = keep_start(prompt.suffix, room - len(prefix), tokenizer.encode)
    if spm:
        return [fim.prefix, fim.suffix, *suffix, fim.middle, *prefix]
    return [fim.prefix, *prefix, fim.suffix, *suffix, fim.middle]


def require_fim(tokenizer: Tokenizer) -> FimIds:
    """The ids of the FIM tokens; DataError if there are none."""
    if tokenizer.fim is None:
        raise DataError(
            "The tokenizer has no fill-in-the-middle tokens (<fim_prefix> and its kin), so this model cannot fill "
            "gaps: leave the suffix out to complete the prefix, or use a model that was trained to infill."
        )
    return tokenizer.fim


def keep_end(text: str, most: int, encode: Encode) -> list[int]:
    """The last tokens of a text, at most `most`, from a line start if a complete line fits."""
    ids = encode(text)
    if len(ids) <= most:
        return ids
    starts = [place + 1 for place, character in enumerate(text) if character == "\n" and place + 1 < len(text)]
    fits = _first(len(starts), lambda place: len(encode(text[starts[place] :])) <= most)
    return encode(text[starts[fits] :]) if fits < len(starts) else ids[len(ids) - most :]


def keep_start(text: str, most: int, encode: Encode) -> list[int]:
    """The first tokens of a text, at most `most`, to a line end if a complete line fits."""
    ids = encode(text)
    if len(ids) <= most:
        return ids
    ends = [place + 1 for place, character in enumerate(text) if character == "\n"][::-1]
    fits = _first(len(ends), lambda place: len(encode(text[: ends[place]])) <= most)
    return encode(text[: ends[fits]]) if fits < len(ends) else ids[:most]


def _first(count: int, fits: Callable[[int], bool]) -> int:
    """The first index below `count` that fits, if all after one that fits do too; `count` if none."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low
