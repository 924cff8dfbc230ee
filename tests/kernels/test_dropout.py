"""The dropout hash: uniform, independent across coordinates, the same whatever tile is asked for."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcoder.kernels.dropout.api import fold_in, keep_mask, make_key


def mask(key, rate, shape, starts=(0, 0, 0)):
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
