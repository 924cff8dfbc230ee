"""A keyed permutation of [0, size) without a table, and its inverse.

A Feistel network permutes [0, 2**(2 k)), the smallest such range that contains [0, size); values outside [0, size) are
permuted again until they are inside (cycle walking), fewer than four times on average. Memory is O(1): the round keys.
Reference: Black and Rogaway, Ciphers with arbitrary finite domains (CT-RSA 2002).
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from jaxcoder.data.randomness import Purpose, random_words

NUM_ROUNDS = 8  # 4 suffice for a pseudorandom permutation of a large domain; small domains mix worse
_MASK64 = (1 << 64) - 1

Index = TypeVar("Index", int, np.ndarray)


class Permutation:
    """`permutation(i)` is the i-th item, `permutation.inverse(item)` its index.

    Both take a Python int or a uint64 array of any shape, with values in [0, size), and return the same type.
    """

    def __init__(self, size: int, round_keys: Sequence[int]):
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation needs a size from 1 to 2**62, got {size}")
        self.size = size
        self._keys = tuple(int(key) for key in round_keys)
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1

    @classmethod
    def from_seed(cls, size: int, seed: int, purpose: Purpose, index: int, *, part: int = 0) -> "Permutation":
        """The permutation of (seed, purpose, index, part)."""
        return cls(size, random_words(seed, purpose, index, part=part, count=NUM_ROUNDS).tolist())

    def __call__(self, index: Index) -> Index:
        return self._walk(index, self._forward)

    def inverse(self, item: Index) -> Index:
        """The index of `item`: `inverse(permutation(i)) == i`."""
        return self._walk(item, self._backward)

    def _walk(self, value, step):
        if isinstance(value, np.ndarray):
            value = step(value.astype(np.uint64))
            while (outside := value >= self.size).any():
                value[outside] = step(value[outside])
            return value
        value = step(int(value))
        while value >= self.size:
            value = step(value)
        return value

    def _forward(self, value):
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ self._mix(right, key)
        return (left << self._half_bits) | right

    def _backward(self, value):
        left, right = value >> self._half_bits, value & self._half_mask
        for key in reversed(self._keys):
            left, right = right ^ self._mix(left, key), left
        return (left << self._half_bits) | right

    def _mix(self, half, key):
        # The 64-bit finalizer of MurmurHash3. The masks make Python ints wrap like uint64.
        mixed = half ^ key
        mixed = ((mixed ^ (mixed >> 33)) * 0xFF51AFD7ED558CCD) & _MASK64
        mixed = ((mixed ^ (mixed >> 33)) * 0xC4CEB9FE1A85EC53) & _MASK64
        return (mixed ^ (mixed >> 33)) & self._half_mask
