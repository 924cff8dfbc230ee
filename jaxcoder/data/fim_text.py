"""Cuts a piece as text: decode it, cut between characters, encode each of the three parts.

This defines the result of FIM; `fim_ids.py` computes the same from ids. It is used for tokenizers for which that method
is not proven exact, and for the original behaviours that change the text (BigCode's Megatron-LM fork, `permute` in
megatron/data/gpt_dataset.py), which are arguments of `TextCutter`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxcoder.tokenizer.tokenizer import Tokenizer

Ids = list[int] | np.ndarray
Parts = tuple[list[Ids], list[Ids], list[Ids]]
"""Prefix, middle and suffix, each as a list of consecutive ids."""

DrawCuts = Callable[[int], tuple[int, int]]
"""Number of characters n -> the two cut positions, sorted, in [0, n]."""


class Piece(NamedTuple):
    """The ids of a window between two document ends.

    ids: int32. begins_whole, ends_whole: whether the piece starts and ends with its document, instead of at the edge of
    the window.
    """

    ids: np.ndarray
    begins_whole: bool
    ends_whole: bool


Cut = Callable[[Piece, DrawCuts], Parts]

Segment = str | list[int]
"""Text, which is cut between characters, or ids without characters, which are never cut."""

# The clean-up of spaces of `transformers` decoders, in its order; it was enabled in StarCoder's training.
_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class TextCutter:
    """Cuts any piece by re-encoding all of its text.

    clean_up: removes spaces before punctuation and contractions, like a decoder's clean-up of spaces.
    sentinels_as_text: special tokens are cut like text; text that spells a special token becomes one.
    replace_incomplete: incomplete characters become U+FFFD; otherwise their tokens are unchanged.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        clean_up: bool = False,
        sentinels_as_text: bool = False,
        replace_incomplete: bool = False,
    ):
        self._tokenizer = tokenizer
        self._clean_up = clean_up
        self._sentinels_as_text = sentinels_as_text
        self._replace_incomplete = replace_incomplete
        self._ids_of_sentinels = {tokenizer.decode([id_]): id_ for id_ in tokenizer.special_ids}
        names = sorted(self._ids_of_sentinels, key=len, reverse=True)  # the longest match first
        self._sentinels = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def __call__(self, piece: Piece, draw_cuts: DrawCuts) -> Parts:
        """Prefix, middle and suffix. A cut at ids without characters is after them, except for an incomplete character
        at the end of the piece, which belongs to the suffix."""
        segments, tail = self._segments(piece.ids.tolist())
        first, second = draw_cuts(sum(len(segment) for segment in segments if isinstance(segment, str)))
        prefix, middle, suffix = self._cut(segments, first, second)
        return [prefix], [middle], [suffix + tail]

    def _segments(self, ids: list[int]) -> tuple[list[Segment], list[int]]:
        """The segments of a piece, and separately the ids of an incomplete character at its end."""
        specials = self._tokenizer.special_ids
        if self._sentinels_as_text or specials.isdisjoint(ids):
            segments = self._text_segments(ids)
        else:
            segments, start = [], 0
            for position, token in enumerate(ids):
                if token in specials:
                    segments += [*self._text_segments(ids[start:position]), [token]]
                    start = position + 1
            segments += self._text_segments(ids[start:])
        # A cut is never after an incomplete last character, so it is removed from the segments; an incomplete first
        # character is before every cut anyway.
        last = segments[-1] if len(segments) > 1 and ids[-1] not in specials else ""
        return (segments[:-1], last) if isinstance(last, list) else (segments, [])

    def _text_segments(self, ids: list[int]) -> list[Segment]:
        """Segments of ids without special tokens: one text, unless it has incomplete characters."""
        if not ids:
            return []
        content = self._tokenizer.decode_bytes(ids)
        try:
            segments: list[Segment] = [content.decode(errors="replace" if self._replace_incomplete else "strict")]
        except UnicodeDecodeError:
            segments = separate_fragments(ids, self._tokenizer)
        if self._clean_up:
            segments = [_cleaned(segment) if isinstance(segment, str) else segment for segment in segments]
        return segments

    def _cut(self, segments: list[Segment], first: int, second: int) -> tuple[list[int], list[int], list[int]]:
        """Prefix, middle and suffix ids for cuts before the characters number `first` and `second`."""
        prefix: list[int] = []
        middle: list[int] = []
        suffix: list[int] = []
        position = 0  # characters before this segment
        for segment in segments:
            if isinstance(segment, list):
                (prefix if position <= first else middle if position <= second else suffix).extend(segment)
                continue
            a, b = max(first - position, 0), max(second - position, 0)
            for ids, text in ((prefix, segment[:a]), (middle, segment[a:b]), (suffix, segment[b:])):
                if text:
                    ids.extend(self._encode(text))
            position += len(segment)
        return prefix, middle, suffix

    def _encode(self, text: str) -> list[int]:
        if not self._sentinels_as_text:
            return self._tokenizer.encode(text)
        ids: list[int] = []
        for text_part in self._sentinels.split(text):
            known = self._ids_of_sentinels.get(text_part)
            ids += self._tokenizer.encode(text_part) if known is None else [known]
        return ids


def separate_fragments(ids: list[int], tokenizer: Tokenizer) -> list[Segment]:
    """Splits ids into text and ids that cannot be cut: ids that share a character are text if it is complete."""
    clusters: list[tuple[bytes, list[int]]] = []
    for token in ids:
        content = tokenizer.decode_bytes([token])
        if clusters and begins_inside_character(content):
            before, members = clusters[-1]
            clusters[-1] = before + content, [*members, token]
        else:
            clusters.append((content, [token]))
    segments: list[Segment] = []
    for content, members in clusters:
        try:
            segment: Segment = content.decode()
        except UnicodeDecodeError:
            segment = members
        last = segments[-1] if segments else None
        if isinstance(last, str) and isinstance(segment, str):  # noqa: SIM114 (the types of +)
            segments[-1] = last + segment
        elif isinstance(last, list) and isinstance(segment, list):
            segments[-1] = last + segment
        else:
            segments.append(segment)
    return segments


def begins_inside_character(content: bytes) -> bool:
    """Whether the first byte is a UTF-8 continuation byte."""
    return bool(content) and 0x80 <= content[0] < 0xC0


def _cleaned(text: str) -> str:
    for spelled, shorter in _CLEAN_UP:
        text = text.replace(spelled, shorter)
    return text
