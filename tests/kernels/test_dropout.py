"""The dropout hash: uniform, independent across coordinates, the same whatever tile is asked for."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcoder.kernels.dropout.api import Site, fold_in, keep_mask, later, make_key, outer_words, survives


def mask(key, rate, shape, starts=(0, 0, 0)):
    assert len(shape) == len(starts)
    coordinates = [
        (jnp.arange(n) + start).reshape((-1,) + (1,) * (len(shape) - 1 - i))
        for i, (n, start) in enumerate(zip(shape, starts))
    ]
    return np.asarray(keep_mask(key, rate, *coordinates))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_is_met_within_binomial_bounds(rate):
    shape = (8, 64, 512)
    count = np.prod(shape)
    kept = mask(make_key(1234, 7), rate, shape).sum()
    assert abs(kept - count * (1 - rate)) < 5 * np.sqrt(count * rate * (1 - rate))


def test_neighbours_are_independent():
    drawn = mask(make_key(1, 2), 0.5, (16, 64, 512)).astype(np.float64) - 0.5
    for axis in range(3):
        a, b = np.take(drawn, range(drawn.shape[axis] - 1), axis), np.take(drawn, range(1, drawn.shape[axis]), axis)
        assert abs((a * b).mean() / 0.25) < 5 / np.sqrt(a.size)
    other = mask(make_key(1, 3), 0.5, (16, 64, 512)).astype(np.float64) - 0.5
    assert abs((drawn * other).mean() / 0.25) < 5 / np.sqrt(drawn.size)


def test_a_tile_is_a_part_of_the_whole():
    key = fold_in(make_key(5, 6), 1, 2)
    whole = mask(key, 0.3, (4, 20, 30))
    np.testing.assert_array_equal(mask(key, 0.3, (2, 5, 7), (1, 10, 20)), whole[1:3, 10:15, 20:27])


def test_every_word_of_the_key_counts():
    keys = [make_key(0, 0), make_key(1, 0), make_key(0, 1), fold_in(make_key(0, 0), 0), fold_in(make_key(0, 0), 1)]
    masks = [mask(key, 0.5, (1, 4, 64)).tobytes() for key in keys]
    assert len(set(masks)) == len(masks)


RATE, LAYERS, HEADS, LENGTH = 0.1, 6, 12, 256


@pytest.fixture(scope="module")
def attention_masks():
    """bool (layers, heads, queries, keys): which probabilities a model drops, in one step."""
    step = make_key(1234, 7)
    shape, starts = (1, HEADS, LENGTH, LENGTH), (0, 0, 0, 0)
    masks = [mask(fold_in(step, Site.ATTENTION, layer), RATE, shape, starts)[0] for layer in range(LAYERS)]
    return ~np.stack(masks)


@pytest.mark.parametrize(
    "kept_dims", [(0,), (1,), (2,), (3,), (0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (0, 1, 2), (0, 1, 3)]
)
def test_no_layer_head_row_or_key_is_dropped_more_than_others(attention_masks, kept_dims):
    """Chi-square over the counts of each: binomials, whose squares add up to their number."""
    summed = tuple(i for i in range(4) if i not in kept_dims)
    counts = attention_masks.sum(summed)
    trials = attention_masks.size // counts.size
    variance = trials * RATE * (1 - RATE)
    chi_square = ((counts - trials * RATE) ** 2 / variance).sum()
    spread = np.sqrt(counts.size * (2 + (1 - 6 * RATE * (1 - RATE)) / variance))
    assert abs(chi_square - counts.size) < 4 * spread


@pytest.mark.parametrize(
    "shift",
    [
        (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 1, 1, 0), (1, 1, 0, 0), (2, 3, 5, 7),
        (0, 0, 128, 0), (0, 0, 0, 128),
    ],
)  # fmt: skip
def test_what_is_dropped_at_one_place_says_nothing_about_another(attention_masks, shift):
    """Chi-square of the 2 x 2 table of two places, `shift` apart in layer, head, query and key."""
    here = attention_masks[tuple(slice(s, None) for s in shift)]
    there = attention_masks[tuple(slice(None, n - s) for s, n in zip(shift, attention_masks.shape))]
    table = np.bincount(2 * here.ravel() + there.ravel(), minlength=4).reshape(2, 2)
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 16  # one degree of freedom: four standard deviations


def test_the_hash_is_uniform_at_every_rate():
    """Masks of one key at growing rates are the hash's distribution function: chi-square over its 16 steps, 15 free."""
    key, shape = make_key(3, 3), (4, 64, 512)
    kept = [mask(key, i / 16, shape).sum() for i in range(16)] + [0]
    counts, expected = -np.diff(kept), np.prod(shape) / 16
    assert kept[0] == np.prod(shape) and (counts > 0).all()
    assert ((counts - expected) ** 2 / expected).sum() < 15 + 4 * np.sqrt(30)


def test_keys_can_count_from_anywhere():
    words = outer_words(make_key(5, 6), jnp.arange(10)[:, None])
    whole = survives(words, jnp.arange(5000), 0.3)
    np.testing.assert_array_equal(survives(later(words, 4900), jnp.arange(100), 0.3), whole[:, 4900:])
