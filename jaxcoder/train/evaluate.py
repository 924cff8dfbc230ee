"""Held-out loss and bits per byte over a fixed set of windows: in total, by language, by corpus and by position.

A target token counts for the language of its document, end tokens too. The loss by position shows whether the model
uses its context: it should fall with the position.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from jaxcoder.config import RunConfig
from jaxcoder.data.stream import SampleStream
from jaxcoder.formatting import escape_control
from jaxcoder.models.protocol import Model
from jaxcoder.record.alarms import LANGUAGE_PREFIX
from jaxcoder.train.inputs import HeldOutStream, held_out_batches, own_share, shard_batch
from jaxcoder.train.step import make_eval_step

UNKNOWN = "unknown"


@dataclass
class Sums:
    """Summed loss in nats, number of tokens, and bytes of their text."""

    nats: float = 0.0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, nats: float, tokens: int, text_bytes: int) -> None:
        self.nats, self.tokens, self.text_bytes = self.nats + nats, self.tokens + tokens, self.text_bytes + text_bytes

    def metrics(self, prefix: str) -> dict[str, float]:
        """loss (nats per token), bits_per_byte, tokens."""
        return {
            f"{prefix}/loss": self.nats / max(self.tokens, 1),
            f"{prefix}/bits_per_byte": self.nats / math.log(2) / max(self.text_bytes, 1),
            f"{prefix}/tokens": self.tokens,
        }


class HeldOut:
    """Evaluates a model on the held-out streams of a run; compiles once."""

    def __init__(self, config: RunConfig, streams: list[HeldOutStream], mesh: Mesh):
        self._config, self._streams, self._mesh = config, streams, mesh
        self._languages = [_Languages(held_out.stream) for held_out in streams]
        self._step = make_eval_step()

    def __call__(self, model: Model, poll: Callable[[], object] = lambda: None) -> dict[str, float]:
        """eval/{loss, bits_per_byte, tokens}, and the same under eval/lang/NAME, eval/position/FIRST-LAST and, with
        several held-out stores, eval/corpus/NAME. Call with the mesh in scope. poll: called before every batch."""
        everything = Sums()
        by_language: dict[str, Sums] = {}
        by_corpus: dict[str, Sums] = {}
        by_position = [Sums() for _ in position_ranges(self._config.model.max_seq_len)]
        for held_out, languages in zip(self._streams, self._languages, strict=True):
            corpus_sums = by_corpus.setdefault(held_out.name, Sums())
            for name, nats, tokens, text_bytes in self._evaluate(model, held_out.stream, languages, by_position, poll):
                for total in (everything, corpus_sums, by_language.setdefault(name, Sums())):
                    total.add(nats, tokens, text_bytes)
        metrics = everything.metrics("eval")
        for name, sums in sorted(by_language.items()):
            metrics |= sums.metrics(f"{LANGUAGE_PREFIX}{name}")
        for (first, last), sums in zip(position_ranges(self._config.model.max_seq_len), by_position, strict=True):
            if sums.tokens:
                metrics |= sums.metrics(f"eval/position/{first}-{last}")
        if len(by_corpus) > 1:
            for name, sums in by_corpus.items():
                metrics |= sums.metrics(f"eval/corpus/{name}")
        return metrics

    def _evaluate(
        self,
        model: Model,
        stream: SampleStream,
        languages: "_Languages",
        by_position: list[Sums],
        poll: Callable[[], object],
    ) -> Iterator[tuple[str, float, int, int]]:
        """(language, nats, tokens, bytes of text) per batch and language; adds to `by_position`."""
        lasts = [last for _, last in position_ranges(self._config.model.max_seq_len)]
        batch_size = self._config.microbatch_size or self._config.global_batch_size
        num_windows = self._config.eval.num_windows
        for samples, batch in held_out_batches(stream, num_windows=num_windows, batch_size=batch_size):
            poll()
            counts = batch.loss_mask > 0
            device_batch = shard_batch(own_share(batch, self._mesh), self._mesh)
            nats = np.asarray(self._step(model, device_batch), np.float64)[counts]
            numbers = languages.of_targets(samples)[counts]
            assert stream.token_bytes is not None  # synthetic streams alone have none
            text_bytes = stream.token_bytes[batch.targets[counts]]
            ranges = np.searchsorted(lasts, batch.positions[counts])
            for total, sums in zip(by_position, _sums(ranges, len(by_position), nats, text_bytes), strict=True):
                total.add(*sums)
            for name, sums in zip(languages.names, _sums(numbers, len(languages.names), nats, text_bytes), strict=True):
                if sums[1]:
                    yield name, *sums


def _sums(groups: np.ndarray, count: int, nats: np.ndarray, text_bytes: np.ndarray) -> list[tuple[float, int, int]]:
    """(nats, tokens, bytes of text) of each group; groups[i] is the group of target i."""
    columns = [np.bincount(groups, weights, count) for weights in (nats, None, text_bytes)]
    return [(float(nats), int(tokens), int(size)) for nats, tokens, size in zip(*columns, strict=True)]


def position_ranges(seq_len: int) -> list[tuple[int, int]]:
    """(first, last) of at most nine ranges, each as long as all before it: 0-31, 32-63, 64-127, ... for 8192 tokens."""
    first = max(1, -(-seq_len // 256))
    ranges, start = [], 0
    while start < seq_len:
        end = min(max(2 * start, first), seq_len)
        ranges.append((start, end - 1))
        start = end
    return ranges


class _Languages:
    """The language of each target of a held-out window."""

    def __init__(self, stream: SampleStream):
        import pyarrow.compute as pc

        self._stream = stream
        (self._store,) = stream.stores
        column = pc.dictionary_encode(self._store.documents["lang"].combine_chunks())
        self._of_document = column.indices.to_numpy()
        self.names = [escape_control(name) or UNKNOWN for name in column.dictionary.to_pylist()]

    def of_targets(self, samples: list[int]) -> np.ndarray:
        """int [B, S]: index into `names` of the language of each target of these windows (without FIM)."""
        starts = np.array([self._stream.locate(sample).start for sample in samples])
        indices = starts[:, None] + 1 + np.arange(self._stream.seq_len)
        documents = np.searchsorted(self._store.document_offsets, indices, side="right") - 1
        return self._of_document[documents]
