"""The input pipeline: the streams that a run reads, and its batches sharded over the mesh.

Shapes: B global batch, S sequence.
"""

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcoder.config import DataConfig, RunConfig
from jaxcoder.config.mesh import DimRules
from jaxcoder.data.loader import Batch, make_batch
from jaxcoder.data.open import SYNTHETIC, open_stream
from jaxcoder.data.store import TokenStore
from jaxcoder.data.stream import SampleStream, WindowStream, synthetic_stream
from jaxcoder.errors import ConfigError
from jaxcoder.tokenizer.tokenizer import Tokenizer

BATCH = DimRules().of("batch")
"""Mesh axes that shard the rows of a batch."""

_HASHED_BYTES = 1 << 30  # a store of up to this size is read and compared before the first step: about a second


class HeldOutStream(NamedTuple):
    """Windows of one held-out store, without FIM; `name` is the corpus's."""

    name: str
    stream: SampleStream


def open_streams(config: RunConfig) -> tuple[WindowStream, list[HeldOutStream], Tokenizer | None]:
    """(training stream, held-out streams, their tokenizer or None if the data is synthetic).

    Held-out windows are read without FIM, in the permutation of seed 0, so that runs can be compared. Raises DataError
    if a store of up to 1 GiB has altered files; larger ones are checked as they are read.
    """
    if config.data.store == SYNTHETIC:
        return synthetic_stream(config.model, config.seed), [], None
    stream = open_stream(config)
    for store in stream.stores:
        store.verify(at_most=_HASHED_BYTES)
    plain = replace(config.data, fim_rate=0.0, corpora=(), stages=())
    held_out = []
    for name, path in held_out_stores(config.data):
        store = TokenStore.open(path)
        store.verify(at_most=_HASHED_BYTES)
        windows = SampleStream(store, stream.tokenizer, plain, seq_len=config.model.max_seq_len, seed=0)
        held_out.append(HeldOutStream(name, windows))
    return stream, held_out, stream.tokenizer


def held_out_stores(data: DataConfig) -> list[tuple[str, str]]:
    """(name, path) of the held-out stores: of the run, then of its corpora."""
    of_run = [(_name("", data.eval_store), data.eval_store)] if data.eval_store else []
    return of_run + [(_name(c.name, c.store), c.eval_store) for c in data.corpora if c.eval_store]


def _name(name: str, path: str) -> str:
    return name or path.rstrip("/").rsplit("/", 1)[-1]


def host_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process loads block `index` of `count` equal contiguous blocks of a global batch.

    Processes with the same rows (their devices differ only in axes that do not shard the batch) load the same block.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    indices = _row_sharding(mesh).addressable_devices_indices_map((shards, 1)).values()
    rows = sorted({row for index in indices if index for row in range(*index[0].indices(shards))})
    count, rest = divmod(shards, len(rows))
    if rest or rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise ConfigError(
            f"process {jax.process_index()} has the rows {rows} of {shards} shards of the batch, which are not one "
            "contiguous block: order the mesh so that the devices of a process are neighbours in "
            f"{' x '.join(BATCH)}."
        )
    return rows[0] // len(rows), count


def own_share(batch: Batch, mesh: Mesh) -> Batch:
    """The rows of a global batch that this process loads."""
    index, count = host_share(mesh)
    size = len(batch.inputs) // count
    return jax.tree.map(lambda x: x[index * size : (index + 1) * size], batch)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A process's rows of a global batch on its devices, sharded over the batch axes; the copy is asynchronous."""
    sharding = _row_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _row_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH, None))


def held_out_batches(stream: SampleStream, *, num_windows: int, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """(samples, batch): the first windows of a held-out stream, each once; padding rows of the last batch have a loss
    mask of 0."""
    num_windows = min(num_windows, stream.windows_per_epoch)
    for first in range(0, num_windows, batch_size):
        count = min(batch_size, num_windows - first)
        samples = [min(first + row, num_windows - 1) for row in range(batch_size)]
        batch = make_batch(
            np.stack([stream.sample(sample) for sample in samples]),
            end_id=stream.end_id,
            pad_id=stream.pad_id,
            document_mask=stream.document_mask,
            pad_in_loss=stream.pad_in_loss,
        )
        counts = (np.arange(batch_size) < count)[:, None].astype(np.float32)
        yield samples, batch._replace(loss_mask=batch.loss_mask * counts)


@contextlib.contextmanager
def prefetch_to_devices(
    batches: Iterator[Batch], mesh: Mesh, ahead: int = 2
) -> Iterator[Iterator[tuple[Batch, Batch]]]:
    """(on the host, on the devices) of each batch; the next `ahead` ones are already being copied."""

    def generate():
        placed = deque((batch, shard_batch(batch, mesh)) for batch in itertools.islice(batches, ahead))
        for batch in batches:
            placed.append((batch, shard_batch(batch, mesh)))
            yield placed.popleft()
        yield from placed

    generator = generate()
    try:
        yield generator
    finally:
        generator.close()
