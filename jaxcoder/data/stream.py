"""The training stream: sample i is a window of token ids, a pure function of (seed, i) and the config.

    sample i  --mixture.py-->  (corpus, its j-th window)  --windows.py-->  tokens [a, b) of its store
              --store.py-->    ids                        --fim.py-->      ids with fill-in-the-middle

All arrows except the last are invertible, so a file can be traced to the steps that read it (`trace.py`).

StarCoder permutes the documents in every epoch; here the store has one fixed permutation.
Reference: the BigCode project's Megatron-LM fork, megatron/data/gpt_dataset.py.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxcoder.config.schema import DataConfig, ModelConfig
from jaxcoder.config.validate import data_problems
from jaxcoder.data.fim import Fim
from jaxcoder.data.mixture import make_mixture
from jaxcoder.data.randomness import Purpose, check_seed, random_words
from jaxcoder.data.store import TokenStore
from jaxcoder.data.windows import Place, Windows
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.tokenizer.tokenizer import Tokenizer


class WindowStream(Protocol):
    """Numbered windows, as the loader reads them. end_id: ends a document; pad_id: padding; None if there is none.

    token_bytes: int32 [vocab_size], bytes of text of each id; None if ids have no text.
    """

    seq_len: int
    end_id: int | None
    pad_id: int | None
    document_mask: bool
    pad_in_loss: bool
    token_bytes: np.ndarray | None

    def sample(self, index: int) -> np.ndarray:
        """Window `index` (any number from 0), int32 [seq_len + 1]."""

    def samples(self, start: int, stop: int) -> list[np.ndarray]:
        """The windows start, ..., stop - 1: the same as `sample`, but faster."""


class SampleStream:
    """The stream of one store, or of the stores of `config.corpora` in their order. Thread-safe.

    stores, windows: of each corpus. mixture: the corpus of each sample. windows_per_epoch: summed over the corpora.

    Raises DataError if a store has another tokenizer or is shorter than one window; ConfigError for invalid rates,
    weights, caps or stages, or FIM with a tokenizer without FIM tokens.
    """

    def __init__(
        self,
        stores: TokenStore | Sequence[TokenStore],
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        seq_len: int,
        seed: int,
    ):
        self.stores = list(stores) if isinstance(stores, Sequence) else [stores]
        check_stores(self.stores, tokenizer, seq_len)
        for problem in data_problems(config):
            raise ConfigError(problem)
        self._fim = Fim(tokenizer, config)
        self.tokenizer = tokenizer
        self.config = config
        self.seq_len = seq_len
        self.seed = check_seed(seed)
        self.end_id: int | None = tokenizer.eos_id
        self.pad_id: int | None = tokenizer.fim.pad if tokenizer.fim else None
        self.document_mask = config.document_mask
        self.pad_in_loss = config.pad_in_loss
        self.token_bytes: np.ndarray | None = self.stores[0].token_bytes
        self.windows = [
            Windows(store.num_tokens, seq_len=seq_len, seed=seed, corpus=number)
            for number, store in enumerate(self.stores)
        ]
        sizes = [windows.windows_per_epoch for windows in self.windows]
        self.windows_per_epoch = sum(sizes)
        self.mixture = make_mixture(config, sizes, [store.num_tokens for store in self.stores])

    def locate(self, index: int) -> Place:
        """The location of sample `index`. ConfigError if the caps allow fewer samples."""
        corpus, number = self.mixture.source(index)
        return self.windows[corpus].locate(number)

    def index_of(self, epoch: int, window: int, corpus: int = 0) -> int | None:
        """The inverse of `locate`: the sample of a window of an epoch; None if it does not occur."""
        return self.mixture.index_of(corpus, self.windows[corpus].number_of(epoch, window))

    def raw_window(self, index: int) -> np.ndarray:
        """Sample `index` before FIM: int32 [seq_len + 1]. DataError if the store is damaged there."""
        place = self.locate(index)
        return self.stores[place.corpus].read(place.start, place.start + self.seq_len + 1)

    def sample(self, index: int) -> np.ndarray:
        """Sample `index` after FIM, int32 [seq_len + 1], padded at its right end."""
        return self._fim(self.raw_window(index), seed=self.seed, sample=index)

    def samples(self, start: int, stop: int) -> list[np.ndarray]:
        """The samples start, ..., stop - 1, equal to `sample`, read from the stores concurrently."""
        places = [self.locate(index) for index in range(start, stop)]
        reads = [self.stores[p.corpus].start_reading(p.start, p.start + self.seq_len + 1) for p in places]
        return [self._fim(read(), seed=self.seed, sample=index) for index, read in enumerate(reads, start)]


def check_stores(stores: Sequence[TokenStore], tokenizer: Tokenizer, seq_len: int) -> None:
    """Raises DataError unless all stores have this tokenizer and at least one window."""
    for store in stores[1:]:
        if store.tokenizer_fingerprint != stores[0].tokenizer_fingerprint:
            raise DataError(
                f"The token stores {stores[0].path} and {store.path} were written with different tokenizers "
                f"(fingerprints {stores[0].tokenizer_fingerprint[:12]} and {store.tokenizer_fingerprint[:12]}), so one "
                "model cannot read both: build one of them again."
            )
    for store in stores:
        store.check_tokenizer(tokenizer)
        if store.num_tokens < seq_len + 1:
            raise DataError(
                f"The token store {store.path} has {store.num_tokens} tokens, fewer than one window of {seq_len} + 1: "
                "give it more documents, or set model.max_seq_len lower."
            )


class SyntheticStream:
    """Uniform random ids, to try a machine without data."""

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
        """Window `index`, int32 [seq_len + 1], a pure function of (seed, index)."""
        words = random_words(self.seed, Purpose.SYNTHETIC, index, count=self.seq_len + 1)
        return (words % np.uint64(self.vocab_size)).astype(np.int32)

    def samples(self, start: int, stop: int) -> list[np.ndarray]:
        """The windows start, ..., stop - 1."""
        return [self.sample(index) for index in range(start, stop)]


def synthetic_stream(model: ModelConfig, seed: int) -> SyntheticStream:
    """The synthetic stream that fits a model: its vocabulary, its window."""
    return SyntheticStream(vocab_size=model.vocab_size, seq_len=model.max_seq_len, seed=seed)
