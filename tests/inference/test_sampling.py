"""Choosing tokens: nuclei against sorting, frequencies against probabilities, settings at their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcoder.errors import ConfigError
from jaxcoder.inference.sampling import Sampling, choose, most_likely, stack

keep = jax.jit(most_likely)
pick = jax.jit(choose)


def by_sorting(probabilities, top_p, top_k):
    """The same nucleus in float64, one row."""
    order = np.argsort(-probabilities, kind="stable")
    kept = np.zeros(len(probabilities), bool)
    kept[order[:top_k]] = True
    mass = np.cumsum(probabilities[order][:top_k].astype(np.float64))
    kept[order[:top_k]] = mass - probabilities[order][:top_k] < top_p * mass[-1]
    return kept


@pytest.mark.parametrize("top_p, top_k", [(1.0, 1000), (0.9, 1000), (1.0, 7), (0.5, 20), (1e-9, 1000), (1.0, 1)])
def test_nuclei_equal_those_of_sorting(top_p, top_k):
    rng = np.random.default_rng(0)
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(rng.normal(size=(4, 1000)) * 3, jnp.float32)))
    kept = keep(probabilities, np.full(4, top_p, np.float32), np.full(4, top_k, np.int32))
    for row in range(4):
        np.testing.assert_array_equal(kept[row], by_sorting(probabilities[row], top_p, top_k))


def test_equally_likely_tokens_stay_together():
    probabilities = np.array([[0.4, 0.2, 0.2, 0.2, 0.0]], np.float32)
    kept = keep(probabilities, np.array([0.5], np.float32), np.array([100], np.int32))
    assert kept[0].tolist() == [True, True, True, True, False]


def draw(logits, count=20_000, **settings):
    """Tokens at `count` positions of one row."""
    rows = stack([Sampling(**settings)])
    many = jax.vmap(lambda position: choose(logits[None], rows, position[None])[0])
    return np.bincount(np.asarray(jax.jit(many)(jnp.arange(count))), minlength=len(logits)) / count


def test_frequencies_are_the_probabilities():
    logits = jnp.asarray([0.0, 1.0, 2.0, 3.0, -np.inf])
    for temperature in (0.5, 1.0, 2.0):
        expected = jax.nn.softmax(logits / temperature)
        np.testing.assert_allclose(draw(logits, temperature=temperature), expected, atol=0.012)
    np.testing.assert_allclose(draw(logits, temperature=1.0, top_k=2), [0, 0, 0.2689, 0.7311, 0], atol=0.012)
    np.testing.assert_allclose(draw(logits, temperature=1.0, top_p=0.6), [0, 0, 0, 1, 0])


def test_a_token_depends_on_its_seed_sample_and_position_alone():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 50)), jnp.float32)
    settings = [Sampling(temperature=1.0, seed=seed, sample=sample) for seed in (0, 1, 2**63) for sample in (0, 1)]
    together = pick(jnp.repeat(logits, 6, 0), stack(settings), jnp.full(6, 9))
    alone = [int(pick(logits, stack([one]), jnp.asarray([9]))[0]) for one in settings]
    assert together.tolist() == alone
    runs = [tuple(int(pick(logits, stack([one]), jnp.asarray([p]))[0]) for p in range(12)) for one in settings]
    assert len(set(runs)) == 6


def test_greedy_and_sampled_rows_in_one_batch():
    logits = jnp.asarray([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]])
    rows = stack([Sampling(), Sampling(temperature=100.0, seed=4)])
    chosen = np.array([pick(logits, rows, jnp.full(2, position)) for position in range(40)])
    assert (chosen[:, 0] == 1).all() and len(set(chosen[:, 1])) == 3


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-40}, {"temperature": 1e-9}, {"temperature": 1e30}, {"top_p": 1e-60}]
)
def test_extreme_settings_choose_something_possible(settings):
    logits = jnp.asarray([-np.inf, 300.0, 2.0, -400.0, -np.inf])
    frequencies = draw(logits, count=50, **{"temperature": 1.0, **settings})
    assert frequencies[[0, 4]].sum() == 0
    if settings.get("temperature") != 1e30:
        assert frequencies[1] == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"top_k": 0}, "top-k 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


def test_a_top_k_beyond_int32_keeps_all():
    assert stack([Sampling(top_k=10**12)]).top_k[0] == stack([Sampling()]).top_k[0] == 2**31 - 1
