"""From the data room to the devices: which streams a run reads, and batches laid out on the mesh.

Shapes: B global batch, S sequence.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcoder.config import RunConfig
from jaxcoder.data.loader import Batch, make_batch
from jaxcoder.data.store import TokenStore
from jaxcoder.data.stream import SampleStream, WindowStream, synthetic_stream
from jaxcoder.errors import ConfigError
from jaxcoder.tokenizer.tokenizer import Tokenizer

SYNTHETIC = "synthetic"


def open_streams(config: RunConfig) -> tuple[WindowStream, SampleStream | None, Tokenizer | None]:
    """What the run trains on, what it is evaluated on (or None), and the tokenizer of both (None if synthetic).

    Held-out windows are read without FIM, always in the order of seed 0, so that runs can be compared.
    """
    if not config.data.store:
        raise ConfigError(
            "data.store is not set: give `--data.store DIR`, a token store made by `jaxcoder data build`, "
            "or `--data synthetic` to try the machine."
        )
    if config.data.store == SYNTHETIC:
        return synthetic_stream(config.model, config.seed), None, None
    store = TokenStore.open(config.data.store)
    store.check_vocabulary(config.model.vocab_size)
    tokenizer = store.tokenizer()
    stream = SampleStream(store, tokenizer, config.data, seq_len=config.model.max_seq_len, seed=config.seed)
    if config.data.eval_store is None:
        return stream, None, tokenizer
    plain = replace(config.data, fim_rate=0.0)
    eval_store = TokenStore.open(config.data.eval_store)
    return stream, SampleStream(eval_store, tokenizer, plain, seq_len=config.model.max_seq_len, seed=0), tokenizer


def place(batch: Batch, mesh: Mesh) -> Batch:
    """A global batch on the devices, its rows split over `data` and `fsdp`; returns before the copy is done."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def text_bytes(batch: Batch, token_bytes: np.ndarray | None) -> int | None:
    """Bytes of text behind the targets that count, for bits per byte; None where ids stand for no text."""
    return None if token_bytes is None else int(token_bytes[batch.targets[batch.loss_mask > 0]].sum(dtype=np.int64))


def held_out_batches(stream: SampleStream, *, num_windows: int, batch_size: int) -> Iterator[Batch]:
    """The first windows of the held-out stream, each once; the last batch is filled up with rows that do not count."""
    num_windows = min(num_windows, stream.windows_per_epoch)
    for first in range(0, num_windows, batch_size):
        count = min(batch_size, num_windows - first)
        windows = np.stack([stream.sample(min(first + row, num_windows - 1)) for row in range(batch_size)])
        batch = make_batch(
            windows, end_id=stream.end_id, pad_id=stream.pad_id, document_mask=stream.document_mask
        )
        yield batch._replace(loss_mask=batch.loss_mask * (np.arange(batch_size) < count)[:, None].astype(np.float32))


@contextlib.contextmanager
def one_ahead(batches: Iterator[Batch], mesh: Mesh) -> Iterator[Iterator[tuple[Batch, Batch]]]:
    """(on the host, on the devices) of each batch, the next one already being copied while one is used."""

    def generate():
        ahead = None
        for batch in batches:
            following = batch, place(batch, mesh)
            if ahead is not None:
                yield ahead
            ahead = following

    generator = generate()
    try:
        yield generator
    finally:
        generator.close()
