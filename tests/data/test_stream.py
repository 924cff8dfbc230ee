"""The stream: a pure function of (seed, i); before FIM every token is a target once an epoch, but for counted edges."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from hostile import hostile_documents

from jaxcoder.config.schema import DataConfig, ModelConfig
from jaxcoder.data.build import build_store
from jaxcoder.data.stream import SampleStream, SyntheticStream, synthetic_stream
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.io.document_files import write_documents
from jaxcoder.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def make_stream(store, tokenizer):
    def make(seq_len=64, seed=3, **config):
        return SampleStream(store, tokenizer, DataConfig(**config), seq_len=seq_len, seed=seed)

    return make


class _CountingStore:
    """A store of `num_tokens` tokens, each its own place."""

    def __init__(self, num_tokens, tokenizer):
        self.num_tokens = num_tokens
        self.path = "counting"
        self.token_bytes = None

    def check_tokenizer(self, tokenizer):
        pass

    def read(self, start, stop):
        assert 0 <= start < stop <= self.num_tokens
        return np.arange(start, stop, dtype=np.int32)

    def start_reading(self, start, stop):
        return lambda: self.read(start, stop)


@pytest.mark.parametrize(
    "num_tokens, seq_len",
    [(1000, 16), (1009, 16), (17, 16), (18, 16), (31, 16), (32, 16), (33, 16), (7, 1)],
)
def test_every_token_is_a_target_once_an_epoch_but_for_the_edges(tokenizer, num_tokens, seq_len):
    stream = SampleStream(
        _CountingStore(num_tokens, tokenizer), tokenizer, DataConfig(fim_rate=0.0), seq_len=seq_len, seed=5
    )
    per_epoch = stream.windows_per_epoch
    assert per_epoch == max(1, (num_tokens - seq_len) // seq_len)
    epochs, total, expected = 12, np.zeros(num_tokens, int), np.zeros(num_tokens, int)
    shifts = set()
    for epoch in range(epochs):
        seen = np.zeros(num_tokens, int)
        windows = [stream.sample(i) for i in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        for window in windows:
            assert len(window) == seq_len + 1 and np.array_equal(np.diff(window), np.ones(seq_len))
            np.add.at(seen, window[1:], 1)
        shift = min(window[0] for window in windows)
        shifts.add(int(shift))
        edges = np.ones(num_tokens, int)
        edges[: shift + 1] = 0  # the first token of the grid is only ever an input
        edges[shift + 1 + per_epoch * seq_len :] = 0
        assert np.array_equal(seen, edges)
        assert num_tokens - seen.sum() == num_tokens - per_epoch * seq_len < 2 * seq_len
        total += seen
        expected += edges
    assert np.array_equal(total, expected)
    assert total.max() == epochs or num_tokens < 3 * seq_len
    assert 0 in shifts and (len(shifts) > 4 or num_tokens - seq_len < 20)
    middle = total[2 * seq_len : num_tokens - 2 * seq_len]
    assert (middle == epochs).all()


def test_epochs_have_other_orders_and_locate_is_inverted(make_stream):
    stream = make_stream()
    per_epoch = stream.windows_per_epoch
    orders = []
    for epoch in range(3):
        places = [stream.locate(i) for i in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert {place.epoch for place in places} == {epoch}
        assert sorted(place.window for place in places) == list(range(per_epoch))
        for turn, place in enumerate(places):
            assert stream.index_of(place.epoch, place.window) == epoch * per_epoch + turn
        orders.append([place.window for place in places])
    assert orders[0] != orders[1] != orders[2] != sorted(orders[2])


def test_a_sample_is_a_slice_of_the_store(make_stream, store):
    stream = make_stream(fim_rate=0.0)
    for i in (0, 5, 10**6):
        start = stream.locate(i).start
        assert np.array_equal(stream.sample(i), store.read(start, start + 65))
        assert np.array_equal(stream.sample(i), stream.raw_window(i))


def test_samples_depend_on_seed_and_index_alone(make_stream):
    stream = make_stream()
    forwards = {i: stream.sample(i) for i in range(300)}
    fresh = make_stream()
    for i in random.Random(0).sample(range(300), 300):
        assert np.array_equal(fresh.sample(i), forwards[i])
    other = make_stream(seed=4)
    same = sum(np.array_equal(other.sample(i), forwards[i]) for i in range(300))
    assert same < 5


def test_fim_is_drawn_anew_in_every_epoch(tokenizer):
    store = _CountingStore(17, tokenizer)
    store.read = lambda start, stop: np.array(tokenizer.encode("x" * 40)[:17] * 2, np.int32)[:17]
    stream = SampleStream(store, tokenizer, DataConfig(fim_rate=1.0), seq_len=16, seed=5)
    assert len({stream.sample(i).tobytes() for i in range(20)}) > 5


def test_windows_with_fim_keep_their_length(make_stream, tokenizer):
    stream = make_stream(seq_len=33, fim_rate=1.0)
    assert all(stream.sample(i).shape == (34,) for i in range(200))
    assert any(tokenizer.fim.middle in stream.sample(i) for i in range(5))


def test_bad_input(store, tokenizer, make_stream, tmp_path):
    with pytest.raises(DataError, match="fewer than one window of 100000"):
        make_stream(seq_len=100_000)
    make_stream(seq_len=store.num_tokens - 1).sample(3)
    with pytest.raises(DataError, match="fewer than one window"):
        make_stream(seq_len=store.num_tokens)
    for field in ("fim_rate", "fim_spm_rate"):
        for rate in (-0.1, 1.5, float("nan")):
            with pytest.raises(ConfigError, match=f"data.{field} is "):
                make_stream(**{field: rate})
    with pytest.raises(ConfigError, match="seed -1"):
        make_stream(seed=-1)
    with pytest.raises(DataError, match="another tokenizer"):
        SampleStream(store, train_tokenizer(["text"], vocab_size=300), DataConfig(), seq_len=8, seed=0)


def test_a_tokenizer_without_fim_needs_rate_zero(store, tokenizer):
    without = SimpleNamespace(fim=None, eos_id=tokenizer.eos_id, fingerprint=tokenizer.fingerprint)
    with pytest.raises(ConfigError, match="data.fim_rate must be 0"):
        SampleStream(store, without, DataConfig(), seq_len=8, seed=0)
    stream = SampleStream(store, without, DataConfig(fim_rate=0.0), seq_len=8, seed=0)
    assert stream.pad_id is None and stream.sample(0).shape == (9,)


def test_no_seed_reuses_the_order_of_documents(tokenizer, tmp_path):
    # The same seed serves build and stream: their draws must not coincide.
    write_documents(hostile_documents(200), tmp_path / "d.jsonl")
    store = build_store(tmp_path / "d.jsonl", tokenizer, tmp_path / "s", seed=3)
    stream = SampleStream(store, tokenizer, DataConfig(), seq_len=16, seed=3)
    order = [stream.locate(i).window for i in range(stream.windows_per_epoch)]
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 5 / np.sqrt(len(order))


def test_synthetic():
    model = ModelConfig(num_layers=1, embed_dim=8, num_heads=1, head_dim=8, mlp_dim=8, vocab_size=500, max_seq_len=32)
    stream = synthetic_stream(model, 7)
    windows = np.stack([stream.sample(i) for i in range(200)])
    assert windows.shape == (200, 33) and windows.dtype == np.int32
    assert windows.min() == 0 and windows.max() == 499
    assert abs(windows.mean() - 249.5) < 5 * 144 / np.sqrt(windows.size)
    assert len({window.tobytes() for window in windows}) == 200
    again = SyntheticStream(vocab_size=500, seq_len=32, seed=7)
    assert np.array_equal(again.sample(100), windows[100])
