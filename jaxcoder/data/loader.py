"""Windows -> batches of NumPy arrays, prefetched by threads, one contiguous block of rows per host.

Row r of the global batch that follows n consumed samples is sample n + r; host h of H holds rows
[h * B / H, (h + 1) * B / H). So a batch is the same for any number of hosts and threads and after any restart, and
the state of the iteration is one number: the samples consumed.

Shapes: B rows of this host, S = seq_len.
Reference: https://google-grain.readthedocs.io (random access; its own iterator state is not used).
"""

import threading
from typing import NamedTuple

import numpy as np

from jaxcoder.data.stream import WindowStream
from jaxcoder.errors import ConfigError

_NUM_THREADS = 2  # tensorstore and tiktoken work outside the interpreter lock, the rest shares one core
_BATCHES_AHEAD = 2
_ENDLESS = 1 << 62
_CLOSE_SECONDS = 30


class Batch(NamedTuple):
    """One host's share of a global batch.

    inputs, targets: int32 [B, S], targets one token later.
    loss_mask: float32 [B, S], 0 where the target is padding (unless data.pad_in_loss), else 1.
    positions: int32 [B, S], rows of the position table; from 0 again in each document with `document_mask`.
    segment_ids: int32 [B, S], 1, 2, ... for the documents of a window and 0 for padding; None without `document_mask`.
    """

    inputs: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray | None


def make_batch(
    windows: np.ndarray, *, end_id: int | None, pad_id: int | None, document_mask: bool, pad_in_loss: bool = False
) -> Batch:
    """A batch from windows, int32 [B, S + 1]. Padding is the run of `pad_id` at a window's right end, if any.

    An end token belongs to the document that it ends; a piece that FIM rearranged is one document. With `pad_in_loss`
    padding counts in the loss, as it did when StarCoder was trained.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    is_pad = _trailing(windows == pad_id) if pad_id is not None else np.zeros(windows.shape, bool)
    loss_mask = (~is_pad[:, 1:] | pad_in_loss).astype(np.float32)
    places = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    if not document_mask:
        return Batch(inputs, targets, loss_mask, places, None)
    is_end = inputs == end_id if end_id is not None else np.zeros(inputs.shape, bool)
    begins = np.zeros_like(is_end)
    begins[:, 1:] = is_end[:, :-1]
    outside = is_pad[:, :-1]
    segment_ids = np.where(outside, 0, 1 + np.cumsum(begins, axis=1, dtype=np.int32))
    first_places = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return Batch(inputs, targets, loss_mask, np.where(outside, 0, places - first_places), segment_ids)


def _trailing(mask: np.ndarray) -> np.ndarray:
    """True where the mask is true from there to the end of the row."""
    return np.logical_and.accumulate(mask[:, ::-1], axis=1)[:, ::-1]


class Batches:
    """An endless iterator of `Batch`, and a context manager that ends its threads. Made by `batches`."""

    def __init__(self, stream: WindowStream, *, rows: "_Rows", num_threads: int):
        import grain

        self._rows = rows
        self._num_batches = 0
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=_BATCHES_AHEAD * rows.per_host)
        self._windows = iter(
            grain.MapDataset.source(rows)
            .to_iter_dataset(options)
            .batch(rows.per_host, drop_remainder=True, batch_fn=np.stack)
        )
        self._stream = stream

    @property
    def samples_consumed(self) -> int:
        """Samples of all hosts up to the last batch returned, those before the start included: the whole state."""
        return self._rows.first_sample + self._num_batches * self._rows.global_batch_size

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        windows = next(self._windows)
        self._num_batches += 1
        return make_batch(
            windows,
            end_id=self._stream.end_id,
            pad_id=self._stream.pad_id,
            document_mask=self._stream.document_mask,
            pad_in_loss=self._stream.pad_in_loss,
        )

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and wait for them; a second call does nothing."""
        self._windows.close()  # lets go of the threads without waiting for what they are reading
        for thread in self._rows.threads - {threading.current_thread()}:
            thread.join(_CLOSE_SECONDS)


def batches(
    stream: WindowStream,
    *,
    global_batch_size: int,
    first_sample: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = _NUM_THREADS,
) -> Batches:
    """Batches from sample `first_sample` on: use as `with batches(...) as source: for batch in source: ...`.

    Errors of the stream (a damaged store) come out of the iteration as they are. ConfigError if the hosts cannot share
    the batch evenly.
    """
    if global_batch_size < 1 or global_batch_size % process_count:
        raise ConfigError(
            f"global_batch_size {global_batch_size} cannot be shared evenly by {process_count} processes: make it a "
            f"multiple of {process_count}."
        )
    rows = _Rows(stream, first_sample, global_batch_size, process_index, process_count)
    return Batches(stream, rows=rows, num_threads=num_threads)


class _Rows:
    """The rows of one host in the order of its batches, as a random-access source for grain."""

    def __init__(self, stream: WindowStream, first_sample: int, global_batch_size: int, process_index: int, count: int):
        self._stream = stream
        self.first_sample = first_sample
        self.global_batch_size = global_batch_size
        self.per_host = global_batch_size // count
        self._offset = first_sample + process_index * self.per_host
        self.threads: set[threading.Thread] = set()

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, row: int) -> np.ndarray:
        self.threads.add(threading.current_thread())
        step, row_of_batch = divmod(int(row), self.per_host)
        return self._stream.sample(self._offset + step * self.global_batch_size + row_of_batch)
