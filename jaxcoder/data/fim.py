"""Fill-in-the-middle on a finished window of tokens, as StarCoder trained it, with the original's defects mended.

A window is a stretch of the token stream; its *pieces* lie between its end-of-text tokens (the first and the last may
be parts of documents). Each piece that is not empty is, with probability `fim_rate`, cut at two places drawn uniformly
among its characters, and its prefix, middle and suffix are encoded apart:

    PSM   <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle
    SPM   <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle      (with probability `fim_spm_rate`)

Then the window is cut, or padded with <fim_pad>, at its right end to the length it had.

Where this differs from the original (Megatron-LM fork of the BigCode project, `gpt_dataset.py`): draws belong to
(seed, sample, piece) instead of to the order of access; text is decoded exactly, without a clean-up of blanks; special
tokens inside a piece are kept as they are and no cut divides them; a character that the window's edge cuts in two stays
as its own tokens instead of becoming U+FFFD; an empty piece keeps its end token and is never transformed.
"""

from typing import NamedTuple

import numpy as np

from jaxcoder.data.randomness import Purpose, happens, random_words, scaled
from jaxcoder.errors import ConfigError
from jaxcoder.tokenizer.tokenizer import FimIds, Tokenizer


class FimDraw(NamedTuple):
    """What is drawn for one piece: four independent uniform words."""

    transform: int
    order: int
    cut_a: int
    cut_b: int

    def cuts(self, num_characters: int) -> tuple[int, int]:
        """Two places in 0..num_characters, both ends included, drawn independently and sorted."""
        first, second = sorted(scaled(word, num_characters + 1) for word in (self.cut_a, self.cut_b))
        return first, second


def draw_fim(seed: int, sample: int, piece: int) -> FimDraw:
    """The draw of piece number `piece` (empty ones count) of the window of sample `sample`: a pure function."""
    return FimDraw(*random_words(seed, Purpose.FIM, sample, part=piece).tolist())


def apply_fim(
    window: np.ndarray, *, seed: int, sample: int, fim_rate: float, fim_spm_rate: float, tokenizer: Tokenizer
) -> np.ndarray:
    """Transform one window. Takes and returns int32 [length]; the length does not change.

    Raises ConfigError if the rate is above 0 and the tokenizer has no FIM tokens.
    """
    if fim_rate == 0:
        return window
    fim = require_fim(tokenizer)
    length = len(window)
    ends = np.flatnonzero(window == tokenizer.eos_id).tolist()
    pieces = zip([0] + [end + 1 for end in ends], ends + [length], strict=True)

    output: list[np.ndarray] = []
    written = 0
    for number, (start, stop) in enumerate(pieces):
        if written >= length:  # the rest would be cut off
            break
        draw = draw_fim(seed, sample, number)
        piece, end_token = window[start:stop], window[stop : stop + 1]  # the last piece has no end token
        if len(piece) and happens(draw.transform, fim_rate):
            piece = np.array(_transform(piece.tolist(), draw, fim_spm_rate, fim, tokenizer), np.int32)
        output += [piece, end_token]
        written += len(piece) + len(end_token)
    result = np.concatenate(output)[:length]
    return np.pad(result, (0, length - len(result)), constant_values=fim.pad)


def require_fim(tokenizer: Tokenizer) -> FimIds:
    """The ids of the FIM tokens; ConfigError if the tokenizer has none."""
    if tokenizer.fim is None:
        raise ConfigError(
            "The tokenizer has no fill-in-the-middle tokens (<fim_prefix> and its kin), so data.fim_rate must be 0: "
            "set it so, or train a tokenizer that has them."
        )
    return tokenizer.fim


def _transform(ids: list[int], draw: FimDraw, spm_rate: float, fim: FimIds, tokenizer: Tokenizer) -> list[int]:
    segments, tail = _segments(ids, tokenizer)
    cuts = draw.cuts(sum(len(segment) for segment in segments if isinstance(segment, str)))
    prefix, middle, suffix = _cut(segments, *cuts, tokenizer)
    suffix += tail
    if happens(draw.order, spm_rate):
        return [fim.prefix, fim.suffix, *suffix, fim.middle, *prefix, *middle]
    return [fim.prefix, *prefix, fim.suffix, *suffix, fim.middle, *middle]


Segment = str | list[int]
"""Text, in whose characters cuts fall, or ids that carry no characters and stay together."""


def _segments(ids: list[int], tokenizer: Tokenizer) -> tuple[list[Segment], list[int]]:
    """A piece as segments, and apart from them the ids of an incomplete character at its very end."""
    if tokenizer.special_ids.isdisjoint(ids):
        segments = _text_segments(ids, tokenizer)
    else:
        segments, start = [], 0
        for place, token in enumerate(ids):
            if token in tokenizer.special_ids:
                segments += [*_text_segments(ids[start:place], tokenizer), [token]]
                start = place + 1
        segments += _text_segments(ids[start:], tokenizer)
    # What stands last is never before a cut, so an incomplete last character must leave the segments here;
    # an incomplete first one is never after a cut and may stay.
    last_is_fragment = isinstance(segments[-1], list) and ids[-1] not in tokenizer.special_ids
    return segments, segments.pop() if last_is_fragment and len(segments) > 1 else []


def _text_segments(ids: list[int], tokenizer: Tokenizer) -> list[Segment]:
    """Ids without specials as segments: one text, unless some characters in them are incomplete."""
    if not ids:
        return []
    try:
        return [tokenizer.decode_bytes(ids).decode()]
    except UnicodeDecodeError:
        return _separate_fragments(ids, tokenizer)


def _separate_fragments(ids: list[int], tokenizer: Tokenizer) -> list[Segment]:
    """Text and untouchable ids in turn: ids that share a character stay together, text if they spell it whole."""
    clusters: list[tuple[bytes, list[int]]] = []
    for token in ids:
        content = tokenizer.decode_bytes([token])
        continues = bool(content) and 0x80 <= content[0] < 0xC0  # begins inside a UTF-8 character
        if clusters and continues:
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


def _cut(segments: list[Segment], first: int, second: int, tokenizer: Tokenizer) -> tuple[list[int], ...]:
    """Prefix, middle and suffix ids for cuts before the characters number `first` and `second`.

    A cut that falls exactly where ids without characters stand goes after them.
    """
    prefix, middle, suffix = [], [], []
    place = 0  # characters before this segment
    for segment in segments:
        if isinstance(segment, list):
            (prefix if place <= first else middle if place <= second else suffix).extend(segment)
            continue
        a, b = max(first - place, 0), max(second - place, 0)
        for ids, text in ((prefix, segment[:a]), (middle, segment[a:b]), (suffix, segment[b:])):
            if text:
                ids.extend(tokenizer.encode(text))
        place += len(segment)
    return prefix, middle, suffix
