"""The permutation: one-to-one, inverted exactly, the same for ints and arrays, keyed, fixed for ever, mixed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcoder.data.permutation import Permutation
from jaxcoder.data.randomness import Purpose, happens, random_words, scaled


def permutation(size, seed=0, index=0):
    return Permutation.from_seed(size, seed, Purpose.WINDOW_ORDER, index)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1023, 1024, 1025, 40_000])
def test_is_one_to_one_and_inverted(size):
    every = np.arange(size, dtype=np.uint64)
    order = permutation(size, seed=size)
    items = order(every)
    assert np.array_equal(np.sort(items), every)
    assert np.array_equal(order.inverse(items), every)


@given(size=st.integers(1, 1 << 62), seed=st.integers(0, 2**64 - 1), data=st.data())
@settings(max_examples=200, deadline=None)
def test_inverse_on_large_ranges_and_ints_equal_arrays(size, seed, data):
    order = permutation(size, seed)
    index = data.draw(st.integers(0, size - 1))
    item = order(index)
    assert 0 <= item < size
    assert order.inverse(item) == index
    array = np.array([index], np.uint64)
    assert int(order(array)[0]) == item
    assert int(order.inverse(order(array))[0]) == index


def test_keys_give_unrelated_orders():
    size = 5_000
    every = np.arange(size, dtype=np.uint64)
    orders = [permutation(size, seed, index)(every) for seed, index in [(0, 0), (0, 1), (1, 0), (2**63, 5)]]
    for first in range(len(orders)):
        for second in range(first):
            fixed = int((orders[first] == orders[second]).sum())
            assert fixed < 12  # expectation 1, as between two random permutations


@pytest.mark.parametrize("size", [5, 8, 60])
def test_small_ranges_are_mixed(size):
    # Every item comes first about equally often: chi-square against the uniform, far beyond any sane quantile.
    trials = 400 * size
    counts = np.bincount([permutation(size, 7, index)(0) for index in range(trials)], minlength=size)
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    assert chi_square < size + 8 * np.sqrt(2 * size)


def test_the_order_of_a_seed_never_changes():
    # These values define what a seed means; a change would silently reorder every resumed run.
    assert [permutation(1000, 1234, 0)(i) for i in range(5)] == GOLDEN_ORDER
    assert random_words(1234, Purpose.FIM, 17, part=3).tolist()[:2] == GOLDEN_WORDS


GOLDEN_ORDER = [393, 189, 533, 94, 429]
GOLDEN_WORDS = [118385799773165684, 9392308770882055207]


def test_words_to_decisions():
    assert not happens(0, 0.0) and happens(2**64 - 1, 1.0)
    assert happens(2**63 - 1, 0.5) and not happens(2**63, 0.5)
    assert scaled(0, 10) == 0 and scaled(2**64 - 1, 10) == 9
