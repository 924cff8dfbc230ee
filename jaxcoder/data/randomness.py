"""Random numbers of the data pipeline: words of a counter-based generator, a pure function of seed, purpose and index.

Without state, a draw does not depend on earlier draws, the number of hosts or threads, or restarts. Only raw 64-bit
words are taken from NumPy, whose bit generators are stable between versions (its distributions are not).
Reference: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011): Philox4x64-10.
"""

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from jaxcoder.errors import ConfigError

WORD = 1 << 64


class Purpose(IntEnum):
    """One number per use, so that no two uses share a word. Never change a number: it would change all runs."""

    FIM = 0
    WINDOW_ORDER = 1
    GRID_SHIFT = 2
    DOCUMENT_ORDER = 3
    SYNTHETIC = 4


def random_words(seed: int, purpose: Purpose, index: int, *, part: int = 0, count: int = 4) -> np.ndarray:
    """`count` uniform words, uint64 [count]: a function of (seed, purpose, index, part).

    index: a sample or an epoch. part: within it, for example a piece. Both are in [0, 2**63).
    """
    return np.random.Philox(key=seed, counter=[0, purpose, part, index]).random_raw(count)


def words_by_part(seed: int, purpose: Purpose, index: int) -> Callable[[int], list[int]]:
    """`random_words` for many parts at a lower cost: a function from part to four words."""
    generator = np.random.Philox(key=seed, counter=[0, purpose, 0, index])
    state = generator.state  # setting the state is several times as fast as constructing a generator
    counter = state["state"]["counter"]

    def words(part: int) -> list[int]:
        counter[2] = part
        generator.state = state
        return generator.random_raw(4).tolist()

    return words


def check_seed(seed: int) -> int:
    """The seed itself; ConfigError if the generator cannot take it."""
    if not 0 <= seed < WORD:
        raise ConfigError(f"The seed {seed} is invalid: give 0 to 2**64 - 1.")
    return seed


def scaled(word: int, size: int) -> int:
    """A uniform integer in [0, size) from one uniform word (biased by less than size / 2**64)."""
    return (int(word) * size) >> 64


def happens(word: int, rate: float) -> bool:
    """True with probability `rate`, from one uniform word: never at 0, always at 1."""
    return int(word) < rate * WORD
