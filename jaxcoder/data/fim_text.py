"""Cutting a piece as text: decode it, cut between characters, encode each of the three parts.

This defines what FIM gives; `fim_ids.py` gives the same from cached ids where it can. It also serves tokenizers for
which that shortcut is not proven, and the behaviours of the original that change the text (facts on BigCode's
Megatron-LM fork, `permute` in megatron/data/gpt_dataset.py): each is an argument of `TextCutter`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxcoder.tokenizer.tokenizer import Tokenizer

Ids = list[int] | np.ndarray
Parts = tuple[list[Ids], list[Ids], list[Ids]]
"""Prefix, middle and suffix, each as lists of consecutive ids."""

DrawCuts = Callable[[int], tuple[int, int]]
"""Number of characters -> the two positions to cut at, sorted, each from 0 (before the first) to that number."""


class Piece(NamedTuple):
    """The ids of a window between two document ends.

    ids: int32. begins_whole, ends_whole: whether its first and last token are surely those of a document, and not where
    the window cuts one.
    """

    ids: np.ndarray
    begins_whole: bool
    ends_whole: bool


Cut = Callable[[Piece, DrawCuts], Parts]

Segment = str | list[int]
"""Text, in whose characters cuts fall, or ids that carry no characters and stay together."""

# The clean-up of spaces of `transformers` decoders, in its order; it was on when StarCoder was trained.
_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class TextCutter:
    """Cuts pieces of any kind, by encoding all of their text again.

    clean_up: text loses blanks before punctuation and contractions, as a decoder's clean-up of spaces takes them.
    sentinels_as_text: special tokens are spelled out and cut like text; text that spells one becomes one.
    replace_incomplete: bytes that are no whole character become U+FFFD; else they stay as the tokens they are.
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
        names = sorted(self._ids_of_sentinels, key=len, reverse=True)  # of two that match, the longer is meant
        self._sentinels = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def __call__(self, piece: Piece, draw_cuts: DrawCuts) -> Parts:
        """Prefix, middle and suffix. A cut exactly where ids without characters stand falls behind them, but for an
        incomplete character at the very end, which belongs to the suffix."""
        segments, tail = self._segments(piece.ids.tolist())
        first, second = draw_cuts(sum(len(segment) for segment in segments if isinstance(segment, str)))
        prefix, middle, suffix = self._cut(segments, first, second)
        return [prefix], [middle], [suffix + tail]

    def _segments(self, ids: list[int]) -> tuple[list[Segment], list[int]]:
        """A piece as segments, and apart from them the ids of an incomplete character at its very end."""
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
        # What stands last is never before a cut, so an incomplete last character must leave the segments here;
        # an incomplete first one is never after a cut and may stay.
        last_is_fragment = bool(segments) and isinstance(segments[-1], list) and ids[-1] not in specials
        return segments, segments.pop() if last_is_fragment and len(segments) > 1 else []

    def _text_segments(self, ids: list[int]) -> list[Segment]:
        """Ids without specials as segments: one text, unless some characters in them are incomplete."""
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
        prefix, middle, suffix = [], [], []
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
    """Text and uncuttable ids in turn: ids that share a character stay together, as text if they complete it."""
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
        if segments and type(segments[-1]) is type(segment):
            segments[-1] = segments[-1] + segment
        else:
            segments.append(segment)
    return segments


def begins_inside_character(content: bytes) -> bool:
    """Whether the bytes begin with one that continues a UTF-8 character."""
    return bool(content) and 0x80 <= content[0] < 0xC0


def _cleaned(text: str) -> str:
    for spelled, shorter in _CLEAN_UP:
        text = text.replace(spelled, shorter)
    return text
