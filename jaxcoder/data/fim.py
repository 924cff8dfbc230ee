"""Fill-in-the-middle (FIM) on a window of tokens: the rules and the random draws, as StarCoder was trained.

A window is a contiguous range of the token stream; its *pieces* are between its end-of-text tokens (the first and the
last may be parts of documents). Each nonempty piece is, with probability `fim_rate`, cut at two uniformly drawn
character positions, and its prefix, middle and suffix are encoded separately:

    PSM   <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle
    SPM   <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle      (with probability `fim_spm_rate`)

Then the window is truncated, or padded with <fim_pad>, at its right end to its former length.

The draws are in `draw_fim`, the cut positions in `FimDraw.cuts`. `fim_ids.py` cuts a piece by its ids, re-encoding a
few bytes; `fim_text.py` re-encodes its complete text: both give the same ids.

Differences from the original (Megatron-LM fork of the BigCode project, `gpt_dataset.py`): draws are a function of
(seed, sample, piece) instead of the order of access. Text is decoded exactly, without a clean-up of spaces; special
tokens inside a piece are never cut; a character that the window's edge divides keeps its tokens instead of becoming
U+FFFD; an empty piece keeps its end token and is never transformed. DataConfig has a switch for each of these that
restores the original behaviour.
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
    """The random numbers of one piece: four independent uniform words."""

    transform: int
    order: int
    cut_a: int
    cut_b: int

    def cuts(self, num_characters: int) -> tuple[int, int]:
        """Two positions in [0, num_characters], drawn independently and sorted."""
        a, b = scaled(self.cut_a, num_characters + 1), scaled(self.cut_b, num_characters + 1)
        return (a, b) if a <= b else (b, a)


def draw_fim(seed: int, sample: int) -> Callable[[int], FimDraw]:
    """The draw of each piece of sample `sample`, by its number (empty pieces count): a pure function."""
    words = words_by_part(seed, Purpose.FIM, sample)
    return lambda piece: FimDraw._make(words(piece))


class Fim:
    """The FIM transformation for one tokenizer and config. It builds tables, so it is made once. Thread-safe.

    cut: the method of cutting pieces, for comparisons; None: the fastest one that is exact for this config.
    Raises ConfigError if the rate is above 0 and the tokenizer has no FIM tokens.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, cut: fim_text.Cut | None = None):
        self._config = config
        if config.fim_rate > 0:
            self._ids = require_fim(tokenizer)
            self._end_id = tokenizer.eos_id
            self._cut = cut or _make_cutter(tokenizer, config)

    def __call__(self, window: np.ndarray, *, seed: int, sample: int) -> np.ndarray:
        """Transforms one window, int32 [length] -> int32 [length].

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
            if written == len(window):  # the rest is truncated
                break
        return result

    def _transformed(self, window: np.ndarray, draw_of: Callable[[int], FimDraw]) -> Iterator[fim_text.Ids]:
        """The parts of the transformed window, without truncation and padding."""
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
    """The parts with their sentinels; adjacent lists are joined, because each part costs one array assignment."""
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
            "The tokenizer has no fill-in-the-middle tokens (<fim_prefix>, <fim_middle>, ...), so data.fim_rate "
            "must be 0: set it to 0, or use a tokenizer with these tokens."
        )
    return tokenizer.fim
