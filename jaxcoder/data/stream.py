"""The training stream: sample i is a window of token ids, a pure function of (seed, i).

An epoch lays a grid of windows over the store: each holds seq_len + 1 tokens and begins seq_len after the one before,
so that it shares one token with it and every token is a target once. The windows of an epoch come in the order of a
keyed permutation; every epoch but the first shifts the grid, so that documents are cut elsewhere. Then
fill-in-the-middle is applied to the window (`fim.py`, where its draws are made).

The original shuffles the documents anew in every epoch; here their order is fixed when the store is built.
Reference: what StarCoder does is in the BigCode project's Megatron-LM fork, megatron/data/gpt_dataset.py.
"""

from typing import NamedTuple, Protocol

import numpy as np

from jaxcoder.config.schema import DataConfig, ModelConfig
from jaxcoder.data.fim import Fim
from jaxcoder.data.order import Permutation
from jaxcoder.data.randomness import Purpose, check_seed, random_words, scaled
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.tokenizer.tokenizer import Tokenizer


class WindowStream(Protocol):
    """What the loader reads: numbered windows. `end_id` ends a document, `pad_id` fills; None where there is none.

    token_bytes: int32 [vocab_size], bytes of text behind each id, None where ids stand for no text.
    """

    seq_len: int
    end_id: int | None
    pad_id: int | None
    document_mask: bool
    pad_in_loss: bool
    token_bytes: np.ndarray | None

    def sample(self, index: int) -> np.ndarray:
        """Window number `index` (0 or more, without end), int32 [seq_len + 1]."""


class Place(NamedTuple):
    """Where a sample comes from: tokens [start, start + seq_len + 1) of the store, window number `window` of the
    grid of epoch `epoch`."""

    epoch: int
    window: int
    start: int


class SampleStream:
    """The stream over one store. Safe to use from several threads.

    windows_per_epoch: samples with the same i // windows_per_epoch make an epoch. With shift s and W windows, the
    tokens at [s + 1, s + W * seq_len] of the store are targets once each; the others, which lie at its two ends, are
    fewer than 2 * seq_len and are not.

    Raises DataError if the tokenizer is not the store's or the store is shorter than one window; ConfigError for rates
    outside [0, 1], or FIM with a tokenizer that cannot express it.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, config: DataConfig, *, seq_len: int, seed: int):
        store.check_tokenizer(tokenizer)
        for field, rate in (("fim_rate", config.fim_rate), ("fim_spm_rate", config.fim_spm_rate)):
            if not 0 <= rate <= 1:
                raise ConfigError(f"data.{field} is {rate}, but it is a share: give a number from 0 to 1.")
        self._fim = Fim(tokenizer, config)
        if store.num_tokens < seq_len + 1:
            raise DataError(
                f"The token store {store.path} has {store.num_tokens} tokens, fewer than one window of {seq_len} + 1: "
                "give it more documents, or set model.max_seq_len lower."
            )
        self.store = store
        self.tokenizer = tokenizer
        self.config = config
        self.seq_len = seq_len
        self.seed = check_seed(seed)
        self.end_id: int | None = tokenizer.eos_id
        self.pad_id: int | None = tokenizer.fim.pad if tokenizer.fim else None
        self.document_mask = config.document_mask
        self.pad_in_loss = config.pad_in_loss
        self.token_bytes: np.ndarray | None = store.token_bytes
        # A shift may not cost a store of less than two windows its only one.
        self._num_shifts = min(seq_len, store.num_tokens - seq_len)
        self.windows_per_epoch = (store.num_tokens - self._num_shifts) // seq_len
        self._epochs: dict[int, tuple[Permutation, int]] = {}

    def locate(self, index: int) -> Place:
        """Where sample `index` comes from."""
        epoch, turn = divmod(index, self.windows_per_epoch)
        order, shift = self._epoch(epoch)
        window = order(turn)
        return Place(epoch, window, shift + window * self.seq_len)

    def index_of(self, epoch: int, window: int) -> int:
        """The sample that is window number `window` of the grid of `epoch`: the inverse of `locate`."""
        order, _ = self._epoch(epoch)
        return epoch * self.windows_per_epoch + order.inverse(window)

    def raw_window(self, index: int) -> np.ndarray:
        """Sample `index` before FIM: int32 [seq_len + 1]. DataError if the store is damaged there."""
        start = self.locate(index).start
        return self.store.read(start, start + self.seq_len + 1)

    def sample(self, index: int) -> np.ndarray:
        """Sample `index`, int32 [seq_len + 1], padded at its right end where FIM made it shorter."""
        return self._fim(self.raw_window(index), seed=self.seed, sample=index)

    def _epoch(self, epoch: int) -> tuple[Permutation, int]:
        """Order and shift of an epoch; the shift of the first is 0, so that a short run misses the least."""
        known = self._epochs.get(epoch)
        if known is None:
            order = Permutation.from_seed(self.windows_per_epoch, self.seed, Purpose.WINDOW_ORDER, epoch)
            word = random_words(self.seed, Purpose.GRID_SHIFT, epoch)[0]
            known = (order, scaled(word, self._num_shifts) if epoch else 0)
            self._epochs = {epoch: known}  # one is enough: samples are asked for in order
        return known


class SyntheticStream:
    """Uniform random ids, to try a machine before there is data: nothing is read, and there is nothing to learn."""

    def __init__(self, *, vocab_size: int, seq_len: int, seed: int):
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.seed = check_seed(seed)
        self.end_id: int | None = None
        self.pad_id: int | None = None
        self.document_mask = False
        self.pad_in_loss = False
        self.token_bytes: np.ndarray | None = None

    def sample(self, index: int) -> np.ndarray:
        """Window number `index`, int32 [seq_len + 1], a pure function of (seed, index)."""
        words = random_words(self.seed, Purpose.SYNTHETIC, index, count=self.seq_len + 1)
        return (words % np.uint64(self.vocab_size)).astype(np.int32)


def synthetic_stream(model: ModelConfig, seed: int) -> SyntheticStream:
    """The synthetic stream that fits a model: its vocabulary, its window."""
    return SyntheticStream(vocab_size=model.vocab_size, seq_len=model.max_seq_len, seed=seed)
