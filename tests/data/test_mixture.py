"""The mixture: an exact, invertible rule of shares; caps and stages; streams over several corpora."""

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcoder.config.schema import Corpus, DataConfig, Stage
from jaxcoder.data.mixture import Mixture, Phase, exact, make_mixture
from jaxcoder.data.stream import SampleStream
from jaxcoder.errors import ConfigError, DataError


def mixture(weights, caps=None, *later):
    phases = [Phase(start, tuple(map(exact, row))) for start, row in [(0, weights), *later]]
    return Mixture(phases, caps or [None] * len(weights))


def check(mix: Mixture, samples: int) -> list[int]:
    """Runs through the samples one by one, comparing all three functions; returns what each corpus gave."""
    given_so_far = [0] * mix.num_corpora
    for index in range(samples):
        assert mix.counts(index) == tuple(given_so_far)
        corpus, number = mix.source(index)
        assert number == given_so_far[corpus]
        assert mix.index_of(corpus, number) == index
        given_so_far[corpus] += 1
    return given_so_far


WEIGHT = st.sampled_from([0, 0.1, 0.3, 1, 2.5, 1e-3, 7, 1 / 3])


@st.composite
def mixtures(draw):
    size = draw(st.integers(1, 8))
    rows = st.lists(WEIGHT, min_size=size, max_size=size).filter(any)
    starts = sorted(draw(st.sets(st.integers(1, 400), max_size=2)))
    caps = draw(st.lists(st.none() | st.integers(1, 200), min_size=size, max_size=size))
    return mixture(draw(rows), caps, *((start, draw(rows)) for start in starts)), caps


@settings(max_examples=60, deadline=None)
@given(mixtures())
def test_counts_source_and_inverse_agree(mix_and_caps):
    mix, caps = mix_and_caps
    end = 700 if mix.num_samples is None else min(mix.num_samples, 700)
    given_in_all = check(mix, end)
    assert all(cap is None or count <= cap for cap, count in zip(caps, given_in_all))
    if end == mix.num_samples:
        assert mix.counts(end + 10**9) == tuple(given_in_all)
        with pytest.raises(ConfigError, match="raise max_epochs"):
            mix.source(end)
        assert all(mix.index_of(corpus, count) is None for corpus, count in enumerate(given_in_all))


@settings(max_examples=60, deadline=None)
@given(st.lists(WEIGHT, min_size=1, max_size=60).filter(any), st.integers(0, 10**13))
def test_shares_stay_exact_at_any_length(weights, index):
    mix = mixture(weights)
    total = sum(map(exact, weights))
    for weight, count in zip(weights, mix.counts(index)):
        assert abs(count - exact(weight) / total * index) < 3
    corpus, number = mix.source(index)
    assert mix.index_of(corpus, number) == index and mix.counts(index)[corpus] == number


def test_two_corpora_are_never_half_a_sample_off():
    mix = mixture([0.7, 0.3])
    for index in range(2000):
        assert abs(mix.counts(index)[0] - Fraction(7, 10) * index) <= Fraction(1, 2)
    assert mix.counts(10**15) == (7 * 10**14, 3 * 10**14)


def test_caps_hand_their_share_to_the_others():
    mix = mixture([0.5, 0.3, 0.2], [100, None, None])
    assert mix.counts(200) == (100, 60, 40)
    assert mix.counts(200 + 500) == (100, 60 + 300, 40 + 200)
    assert {mix.source(index)[0] for index in range(200, 700)} == {1, 2}
    assert mix.index_of(0, 99) < 200 and mix.index_of(0, 100) is None and mix.num_samples is None
    assert mixture([1, 1], [30, 50]).num_samples == 80
    assert mixture([1, 0], [30, None]).num_samples == 30
    later = mixture([1, 0], [30, None], (20, [0, 1]))  # the cap is not reached before the weights change
    assert later.num_samples is None and later.counts(100) == (20, 80)


def test_stages_begin_where_they_say():
    mix = mixture([1, 0], None, (10, [0, 1]), (30, [1, 1]))
    assert mix.counts(10) == (10, 0) and mix.counts(30) == (10, 20) and mix.counts(50) == (20, 30)
    assert mix.index_of(0, 9) == 9 and mix.index_of(1, 0) == 10 and 30 <= mix.index_of(0, 10) <= 31


def test_from_a_config():
    corpora = (Corpus(store="a"), Corpus(store="b", max_epochs=0.5))
    mix = make_mixture(DataConfig(corpora=corpora), [30, 10], [300, 100])
    assert mix.counts(20) == (15, 5) and mix.counts(120) == (115, 5)
    with pytest.raises(
        ConfigError, match="data.corpora.1.max_epochs is 0.5, which is less than one window of the 1 of b"
    ):
        make_mixture(DataConfig(corpora=corpora), [30, 1], [300, 10])
    # A stage that changes the batch alone does not disturb the mixture.
    weighted = (Corpus(store="a", weight=1.0), Corpus(store="b", weight=3.0))
    stages = (Stage(from_sample=0), Stage(from_sample=7, global_batch_size=4), Stage(from_sample=9, weights=(2.0, 6.0)))
    one = make_mixture(DataConfig(corpora=weighted), [30, 10], [300, 100])
    three = make_mixture(DataConfig(corpora=weighted, stages=stages), [30, 10], [300, 100])
    assert all(one.source(index) == three.source(index) for index in range(200))


class _Numbered:
    """A store whose tokens are their own places, above those of the stores before it."""

    def __init__(self, num_tokens, base, fingerprint="f"):
        self.num_tokens, self.base, self.tokenizer_fingerprint = num_tokens, base, fingerprint
        self.path, self.token_bytes = f"store-{base}", None

    def check_tokenizer(self, tokenizer):
        pass

    def start_reading(self, start, stop):
        assert 0 <= start < stop <= self.num_tokens
        return lambda: np.arange(self.base + start, self.base + stop, dtype=np.int32)

    def read(self, start, stop):
        return self.start_reading(start, stop)()


SIZES = (1009, 403, 170)


def numbered_stream(tokenizer, data, seq_len=16, seed=5):
    stores = [_Numbered(size, 10_000 * number) for number, size in enumerate(SIZES)]
    return SampleStream(stores, tokenizer, data, seq_len=seq_len, seed=seed)


def three(*weights, max_epochs=(None, None, None), **rest):
    corpora = tuple(Corpus(store=str(n), weight=w, max_epochs=m) for n, (w, m) in enumerate(zip(weights, max_epochs)))
    return DataConfig(corpora=corpora, fim_rate=0.0, **rest)


def test_every_token_of_every_corpus_is_a_target_once_an_epoch_but_for_the_edges(tokenizer):
    """Whatever the weights: after e epochs of a corpus every token was a target e times, edges counted exactly."""
    stream = numbered_stream(tokenizer, three(0.2, 0.5, 0.3))
    windows = [w.windows_per_epoch for w in stream.windows]
    samples = 1500
    counts = stream.mixture.counts(samples)
    targets = [Counter() for _ in SIZES]
    for window in stream.samples(0, samples):
        assert np.array_equal(np.diff(window), np.ones(16))
        corpus = window[0] // 10_000
        targets[corpus].update((window[1:] - 10_000 * corpus).tolist())
    for corpus, size in enumerate(SIZES):
        epochs, rest = divmod(counts[corpus], windows[corpus])
        assert epochs >= 4
        low, high = np.full(size, epochs), np.full(size, epochs + (rest > 0))
        for epoch in range(epochs + 1):  # what the shift leaves at both ends of an epoch
            starts = [stream.windows[corpus].locate(epoch * windows[corpus] + n).start for n in range(windows[corpus])]
            shift = min(starts)
            outside = np.ones(size, bool)
            outside[shift + 1 : shift + 1 + 16 * windows[corpus]] = False
            if epoch < epochs:
                low[outside] -= 1
                high[outside] -= 1
            elif rest:
                high[outside] -= 1
        seen = np.array([targets[corpus][token] for token in range(size)])
        assert (low <= seen).all() and (seen <= high).all()
        assert seen.sum() == 16 * counts[corpus]
        if epochs:
            assert (seen[32:-32] >= epochs).all() and (seen[32:-32] <= epochs + 1).all()


def test_a_sample_depends_on_seed_number_and_stages_alone(tokenizer):
    stages = (Stage(from_sample=0), Stage(from_sample=100, weights=(0.0, 1.0, 1.0)))
    data = three(0.2, 0.5, 0.3, stages=stages)
    stream = numbered_stream(tokenizer, data)
    forwards = {index: stream.sample(index) for index in range(300)}
    fresh = numbered_stream(tokenizer, data)
    for index in random.Random(0).sample(range(300), 300):
        assert np.array_equal(fresh.sample(index), forwards[index])
        place = fresh.locate(index)
        assert fresh.index_of(place.epoch, place.window, place.corpus) == index
    assert all(place.corpus != 0 for place in map(stream.locate, range(100, 300)))
    # Equal corpora are read in orders of their own.
    twins = SampleStream([_Numbered(1009, 0), _Numbered(1009, 0)], tokenizer,
                         DataConfig(fim_rate=0.0), seq_len=16, seed=5)  # fmt: skip
    orders = [[w.locate(number).window for number in range(60)] for w in twins.windows]
    assert orders[0] != orders[1]


def test_one_corpus_is_the_same_as_one_store(tokenizer):
    alone = SampleStream(_Numbered(1009, 0), tokenizer, DataConfig(fim_rate=0.0), seq_len=16, seed=5)
    mixed = numbered_stream(tokenizer, three(1.0, 0.0, 0.0))
    for index in range(200):
        assert np.array_equal(alone.sample(index), mixed.sample(index))


def test_the_cap_is_a_number_of_epochs(tokenizer):
    stream = numbered_stream(tokenizer, three(1.0, 1.0, 1.0, max_epochs=(1.0, 2.0, 0.5)))
    sizes = [w.windows_per_epoch for w in stream.windows]
    assert stream.mixture.num_samples == sizes[0] + 2 * sizes[1] + sizes[2] // 2
    places = [stream.locate(index) for index in range(stream.mixture.num_samples)]
    assert Counter((p.corpus, p.epoch) for p in places) == {
        (0, 0): sizes[0], (1, 0): sizes[1], (1, 1): sizes[1], (2, 0): sizes[2] // 2,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="raise max_epochs"):
        stream.sample(len(places))


def test_bad_mixtures_are_one_sentence(tokenizer):
    for data, expected in (
        (three(-1.0, 1.0, 1.0), "data.corpora.0.weight is -1.0, but must be 0 or larger"),
        (three(0.0, 0.0, 0.0), "are all 0, so nothing would be read"),
        (three(float("nan"), 1.0, 1.0), "data.corpora.0.weight is nan, but must be a finite number"),
        (three(1.0, 1.0, 1.0, stages=(Stage(from_sample=5),)), "the first stage must begin at 0"),
    ):
        with pytest.raises(ConfigError, match=expected):
            numbered_stream(tokenizer, data)
    with pytest.raises(DataError, match="store-10000 has 403 tokens, fewer than one window of 500"):
        numbered_stream(tokenizer, three(1.0, 1.0, 1.0), seq_len=500)
    stores = [_Numbered(100, 0), _Numbered(100, 10_000, fingerprint="g")]
    with pytest.raises(DataError, match="store-0 and store-10000 were written with different tokenizers"):
        SampleStream(stores, tokenizer, DataConfig(), seq_len=16, seed=0)
