"""The windows of one token store: in every epoch a shifted grid over its tokens, in a random permutation.

A window has seq_len + 1 tokens and a stride of seq_len: adjacent windows share one token, and every token is a target
once per epoch. All epochs except the first shift the grid, so that documents are cut at other positions. The location
of a window, and the windows of a position, are computed without a table.
"""

from typing import NamedTuple

import numpy as np

from jaxcoder.data.permutation import Index, Permutation
from jaxcoder.data.randomness import Purpose, random_words, scaled


class Place(NamedTuple):
    """The location of a sample: tokens [start, start + seq_len + 1) of the store of corpus `corpus`, which are window
    `window` of the grid of epoch `epoch`."""

    corpus: int
    epoch: int
    window: int
    start: int


class Windows:
    """The windows of a store of `num_tokens` (more than seq_len) tokens, numbered from 0 across all epochs.

    windows_per_epoch: window n is in epoch n // windows_per_epoch. With shift s and W windows per epoch, the tokens
    [s + 1, s + W * seq_len] of the store are targets once; fewer than 2 * seq_len tokens at its two ends are not.

    corpus: index of the store in a mixture; each corpus has its own permutation.
    """

    def __init__(self, num_tokens: int, *, seq_len: int, seed: int, corpus: int = 0):
        self.num_tokens = num_tokens
        self.seq_len = seq_len
        self.seed = seed
        self.corpus = corpus
        # A store of less than two windows must keep one window under every shift.
        self._num_shifts = min(seq_len, num_tokens - seq_len)
        self.windows_per_epoch = (num_tokens - self._num_shifts) // seq_len
        self._epochs: dict[int, tuple[Permutation, int]] = {}

    def locate(self, number: int) -> Place:
        """The location of window `number`."""
        epoch, index = divmod(number, self.windows_per_epoch)
        permutation, shift = self._epoch(epoch)
        window = permutation(index)
        return Place(self.corpus, epoch, window, shift + window * self.seq_len)

    def number_of(self, epoch: int, window: Index) -> Index:
        """The inverse of `locate`: the number of window `window` (an int or a uint64 array) of the grid of `epoch`."""
        permutation, _ = self._epoch(epoch)
        return permutation.inverse(window) + epoch * self.windows_per_epoch

    def holding(self, starts: np.ndarray, stops: np.ndarray, epoch: int) -> np.ndarray:
        """The numbers of the windows of an epoch that overlap one of the ranges [start, stop), without duplicates.

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
        """Permutation and shift of an epoch; the first has shift 0, which skips the fewest tokens."""
        known = self._epochs.get(epoch)
        if known is None:
            permutation = Permutation.from_seed(
                self.windows_per_epoch, self.seed, Purpose.WINDOW_ORDER, epoch, part=self.corpus
            )
            word = random_words(self.seed, Purpose.GRID_SHIFT, epoch, part=self.corpus)[0]
            known = (permutation, scaled(word, self._num_shifts) if epoch else 0)
            self._epochs = {epoch: known}  # one is enough: windows are read in order
        return known
