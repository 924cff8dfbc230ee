"""The windows of one token store, epoch after epoch: a grid over its tokens, with a shift and a permutation for each.

Each window holds seq_len + 1 tokens and begins seq_len after the one before, so that it shares one token with it and
every token is a target once an epoch. Every epoch but the first shifts the grid, so that documents are cut elsewhere.
Both directions are arithmetic: where a window comes from, and when a position of the store is read.
"""

from typing import NamedTuple

import numpy as np

from jaxcoder.data.permutation import Index, Permutation
from jaxcoder.data.randomness import Purpose, random_words, scaled


class Place(NamedTuple):
    """Where a sample comes from: tokens [start, start + seq_len + 1) of the store of corpus number `corpus`, which are
    window number `window` of the grid of epoch `epoch`."""

    corpus: int
    epoch: int
    window: int
    start: int


class Windows:
    """The windows of a store of `num_tokens` (more than seq_len) tokens, numbered from 0 without end.

    windows_per_epoch: windows with the same number // windows_per_epoch make an epoch. With shift s and W windows, the
    tokens at [s + 1, s + W * seq_len] of the store are targets once each; the others, which lie at its two ends, are
    fewer than 2 * seq_len and are not.

    corpus: number of the store in a mixture; each has a permutation of its own.
    """

    def __init__(self, num_tokens: int, *, seq_len: int, seed: int, corpus: int = 0):
        self.num_tokens = num_tokens
        self.seq_len = seq_len
        self.seed = seed
        self.corpus = corpus
        # A shift may not cost a store of less than two windows its only one.
        self._num_shifts = min(seq_len, num_tokens - seq_len)
        self.windows_per_epoch = (num_tokens - self._num_shifts) // seq_len
        self._epochs: dict[int, tuple[Permutation, int]] = {}

    def locate(self, number: int) -> Place:
        """Where window `number` lies."""
        epoch, turn = divmod(number, self.windows_per_epoch)
        permutation, shift = self._epoch(epoch)
        window = permutation(turn)
        return Place(self.corpus, epoch, window, shift + window * self.seq_len)

    def number_of(self, epoch: int, window: Index) -> Index:
        """The number of window `window` (an int, or a uint64 array) of the grid of `epoch`: the inverse of `locate`."""
        permutation, _ = self._epoch(epoch)
        return permutation.inverse(window) + epoch * self.windows_per_epoch

    def holding(self, starts: np.ndarray, stops: np.ndarray, epoch: int) -> np.ndarray:
        """The numbers of the windows of an epoch that hold a token of one of the ranges [start, stop), each once.

        starts, stops: int64 [n]. Returns uint64, unsorted.
        """
        _, shift = self._epoch(epoch)
        first = np.maximum(-((shift + self.seq_len - starts) // self.seq_len), 0)
        last = np.minimum((stops - 1 - shift) // self.seq_len, self.windows_per_epoch - 1)
        counts = np.maximum(last - first + 1, 0)
        before = np.cumsum(counts) - counts
        windows = np.repeat(first - before, counts) + np.arange(counts.sum())
        return self.number_of(epoch, np.unique(windows).astype(np.uint64))

    def _epoch(self, epoch: int) -> tuple[Permutation, int]:
        """Order and shift of an epoch; the shift of the first is 0, so that a short run misses the least."""
        known = self._epochs.get(epoch)
        if known is None:
            permutation = Permutation.from_seed(
                self.windows_per_epoch, self.seed, Purpose.WINDOW_ORDER, epoch, part=self.corpus
            )
            word = random_words(self.seed, Purpose.GRID_SHIFT, epoch, part=self.corpus)[0]
            known = (permutation, scaled(word, self._num_shifts) if epoch else 0)
            self._epochs = {epoch: known}  # one is enough: windows are asked for in order
        return known
