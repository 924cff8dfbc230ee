"""Every random number of the data room: words of a counter-based generator, a pure function of seed, purpose and place.

Nothing here has state, so no draw depends on what was drawn before it, on the number of hosts or threads, or on a
restart. Only raw 64-bit words are taken from NumPy, whose bit generators are stable between versions (the
distributions built on them are not).
Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011): Philox4x64-10.
"""

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from jaxcoder.errors import ConfigError

WORD = 1 << 64


class Purpose(IntEnum):
    """One number per use, so that two uses never share a word. The numbers are part of what a seed means: keep them."""

    FIM = 0
    WINDOW_ORDER = 1
    GRID_SHIFT = 2
    DOCUMENT_ORDER = 3
    SYNTHETIC = 4


def random_words(seed: int, purpose: Purpose, index: int, *, part: int = 0, count: int = 4) -> np.ndarray:
    """`count` uniform words, uint64 [count], that belong to (seed, purpose, index, part) alone.

    `index` is a sample or an epoch, `part` something inside it (a piece); both are 0 or more and below 2**63.
    """
    return np.random.Philox(key=seed, counter=[0, purpose, part, index]).random_raw(count)


def words_by_part(seed: int, purpose: Purpose, index: int) -> Callable[[int], list[int]]:
    """`random_words` of (seed, purpose, index, part) for many parts: part -> four words, at a fraction of the cost."""
    generator = np.random.Philox(key=seed, counter=[0, purpose, 0, index])
    state = generator.state  # setting it is several times as fast as making a generator
    counter = state["state"]["counter"]

    def words(part: int) -> list[int]:
        counter[2] = part
        generator.state = state
        return generator.random_raw(4).tolist()

    return words


def check_seed(seed: int) -> int:
    """The seed itself; ConfigError if the generator cannot take it."""
    if not 0 <= seed < WORD:
        raise ConfigError(f"The seed {seed} cannot be used: choose one from 0 to 2**64 - 1.")
    return seed


def scaled(word: int, size: int) -> int:
    """A uniform integer in [0, size) from one uniform word (biased by less than size / 2**64)."""
    return (int(word) * size) >> 64


def happens(word: int, rate: float) -> bool:
    """True with probability `rate`, from one uniform word: never at 0, always at 1."""
    return int(word) < rate * WORD
