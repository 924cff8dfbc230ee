"""Dropout masks as a pure function of coordinates: stateless and independent of block sizes and meshes.

The bit of an element is a hash of a key (2 words) and the element's global coordinates (sample, head, query, key for
attention; sample, position, feature elsewhere), so that any backend can compute any tile of the mask. The hash is
`lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018): two multiplications and three shifts on 32-bit lanes,
which vector units support.
"""

import enum

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B9


class Site(enum.IntEnum):
    """The place of a mask in the model; part of its key."""

    EMBED = 0
    ATTENTION = 1
    ATTENTION_RESIDUAL = 2
    MLP_RESIDUAL = 3


def lowbias32(x: jax.Array) -> jax.Array:
    """Bijective mixing of uint32 words, any shape."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def make_key(seed: jax.Array | int, step: jax.Array | int) -> jax.Array:
    """The key of one training step, uint32 (2,)."""
    start = jnp.stack([jnp.asarray(seed, jnp.uint32), jnp.asarray(seed, jnp.uint32) ^ jnp.uint32(_GOLDEN)])
    return fold_in(start, step)


def fold_in(key: jax.Array, *data: jax.Array | int) -> jax.Array:
    """A key, uint32 (2,), that also depends on the scalars `data`."""
    words = key[0], key[1]
    for value in data:
        words = _fold(*words, jnp.asarray(value, jnp.uint32))
    return jnp.stack(words)


def keep_mask(key: jax.Array, rate: float, *coordinates: jax.Array) -> jax.Array:
    """True where an element survives dropout at `rate`.

    Args:
        key: uint32 (2,).
        rate: probability of dropping, in [0, 1).
        coordinates: integer arrays that broadcast against each other, outermost first. The last one costs one hash
            per element of the result; the others are hashed at their own, smaller shape.
    Returns:
        bool of the broadcast shape.
    """
    return survives(outer_words(key, *coordinates[:-1]), coordinates[-1], rate)


def outer_words(key: jax.Array, *coordinates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hash of all but the last coordinate of `keep_mask`: two uint32 words of their broadcast shape."""
    words = key[0], key[1]
    for coordinate in coordinates:
        words = _fold(*words, coordinate.astype(jnp.uint32))
    return words


def survives(words: tuple[jax.Array, jax.Array], last: jax.Array, rate: float) -> jax.Array:
    """`keep_mask` from the words of the outer coordinates and the last coordinate, which broadcast."""
    a, b = words
    # With one word, rows whose words differ by a multiple of the constant would be shifted copies of each other.
    bits = lowbias32((a + last.astype(jnp.uint32) * jnp.uint32(_GOLDEN)) ^ b)
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def later(words: tuple[jax.Array, jax.Array], offset: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The words for last coordinates that start at `offset`: survives(words, offset + i) == survives(later, i)."""
    a, b = words
    return a + jnp.asarray(offset).astype(jnp.uint32) * jnp.uint32(_GOLDEN), b


def _fold(a: jax.Array, b: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    a = lowbias32((a + x * jnp.uint32(_GOLDEN)) ^ b)
    return a, lowbias32(b + a)
