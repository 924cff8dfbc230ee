"""Fill-in-the-middle on a finished window of tokens: the rules and the draws, as StarCoder trained it.

A window is a contiguous range of the token stream; its *pieces* lie between its end-of-text tokens (the first and the
last may be parts of documents). Each piece that is not empty is, with probability `fim_rate`, cut at two places drawn
uniformly among its characters, and its prefix, middle and suffix are encoded separately:

    PSM   <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle
    SPM   <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle      (with probability `fim_spm_rate`)

Then the window is cut, or padded with <fim_pad>, at its right end to the length it had.

The draws are in `draw_fim`, the cuts in `FimDraw.cuts`. How a piece is cut at two characters and encoded again is in
`fim_ids.py` (from its ids, re-encoding a few bytes) and `fim_text.py` (as complete text): both give the same ids.

Where this differs from the original (Megatron-LM fork of the BigCode project, `gpt_dataset.py`): draws belong to
(seed, sample, piece) instead of to the order of access. Text is decoded exactly, without a clean-up of blanks; special
tokens inside a piece are kept as they are and no cut divides them; a character that the window's edge cuts in two stays
as its own tokens instead of becoming U+FFFD; an empty piece keeps its end token and is never transformed. Each of these
has a switch in DataConfig that brings the original's behaviour back.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxcoder.config.schema import DataConfig
from jaxcoder.data import fim_ids, fim_text
from jaxcoder.data.randomness import Purpose, happens, scaled, words_by_part
from jaxcoder.errors import ConfigError
from jaxcoder.tokenizer.tokenizer import FimIds, Tokenizer


class FimDraw(NamedTuple):
    """What is drawn for one piece: four independent uniform words."""

    transform: int
    order: int
    cut_a: int
    cut_b: int

    def cuts(self, num_characters: int) -> tuple[int, int]:
        """Two positions in 0..num_characters, both ends included, drawn independently and sorted."""
        a, b = scaled(self.cut_a, num_characters + 1), scaled(self.cut_b, num_characters + 1)
        return (a, b) if a <= b else (b, a)


def draw_fim(seed: int, sample: int) -> Callable[[int], FimDraw]:
    """The draw of each piece, by its number (empty ones count), of the window of sample `sample`: a pure function."""
    words = words_by_part(seed, Purpose.FIM, sample)
    return lambda piece: FimDraw._make(words(piece))


class Fim:
    """The transformation for one tokenizer and one set of rules. Made once: it holds tables. Safe in several threads.

    cut: how pieces are cut, to compare; None means the fastest way that gives the ids that the rules ask for.
    Raises ConfigError if the rate is above 0 and the tokenizer has no FIM tokens.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, cut: fim_text.Cut | None = None):
        self._config = config
        if config.fim_rate > 0:
            self._ids = require_fim(tokenizer)
            self._end_id = tokenizer.eos_id
            self._cut = cut or _make_cutter(tokenizer, config)

    def __call__(self, window: np.ndarray, *, seed: int, sample: int) -> np.ndarray:
        """Transform one window. Takes and returns int32 [length]; the length does not change.

        Raises DataError for an id that the tokenizer does not have.
        """
        if self._config.fim_rate == 0:
            return window
        result = np.full(len(window), self._ids.pad, np.int32)
        written = 0
        for ids in self._transformed(window, draw_fim(seed, sample)):
            size = min(len(ids), len(window) - written)
            result[written : written + size] = ids[:size]
            written += size
            if written == len(window):  # the rest would be cut off
                break
        return result

    def _transformed(self, window: np.ndarray, draw_of: Callable[[int], FimDraw]) -> Iterator[fim_text.Ids]:
        """The transformed window, part by part, neither cut nor padded."""
        config = self._config
        start, ends = 0, np.flatnonzero(window == self._end_id).tolist()
        for number, stop in enumerate([*ends, len(window)]):
            is_empty, is_tail = start == stop, stop == len(window)  # the tail has no end token
            draw = draw_of(number)
            may_transform = not is_empty or (is_tail and config.fim_transform_empty_tail)
            if is_empty and not is_tail and config.fim_drop_empty_pieces:
                pass
            elif may_transform and happens(draw.transform, config.fim_rate):
                piece = fim_text.Piece(window[start:stop], begins_whole=start > 0, ends_whole=not is_tail)
                parts = self._cut(piece, draw.cuts)
                yield from _arrange(parts, self._ids, spm=happens(draw.order, config.fim_spm_rate))
                yield window[stop : stop + 1]
            else:
                yield window[start : stop + 1]
            start = stop + 1


def _arrange(parts: fim_text.Parts, fim: FimIds, *, spm: bool) -> Iterator[fim_text.Ids]:
    """The parts between their sentinels; neighbouring lists are made one, because writing each has a price."""
    prefix, middle, suffix = parts
    if spm:
        parts_in_order = [[fim.prefix, fim.suffix], *suffix, [fim.middle], *prefix, *middle]
    else:
        parts_in_order = [[fim.prefix], *prefix, [fim.suffix], *suffix, [fim.middle], *middle]
    pending: list[int] = []
    for ids in parts_in_order:
        if isinstance(ids, list):
            pending += ids
        elif len(ids):
            yield pending
            yield ids
            pending = []
    yield pending


def _make_cutter(tokenizer: Tokenizer, config: DataConfig) -> fim_text.Cut:
    text_cutter = fim_text.TextCutter(
        tokenizer,
        clean_up=config.fim_clean_up,
        sentinels_as_text=config.fim_sentinels_as_text,
        replace_incomplete=config.fim_replace_incomplete,
    )
    keeps_text = not (config.fim_clean_up or config.fim_sentinels_as_text or config.fim_replace_incomplete)
    return fim_ids.IdsCutter(tokenizer, text_cutter) if keeps_text and fim_ids.serves(tokenizer) else text_cutter


def require_fim(tokenizer: Tokenizer) -> FimIds:
    """The ids of the FIM tokens; ConfigError if the tokenizer has none."""
    if tokenizer.fim is None:
        raise ConfigError(
            "The tokenizer has no fill-in-the-middle tokens (<fim_prefix> and its kin), so data.fim_rate must be 0: "
            "set it so, or train a tokenizer that has them."
        )
    return tokenizer.fim
