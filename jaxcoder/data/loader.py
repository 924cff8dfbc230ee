"""Windows -> batches of NumPy arrays, prefetched by threads, one contiguous block of rows per host.

Row r of the global batch after n consumed samples is sample n + r; host h of H loads rows [h * B / H, (h + 1) * B / H).
A batch is thus the same for any number of hosts and threads and after any restart, and the state of the iteration is
one number: the samples consumed. `schedule.py` gives the size of the next batch.

Shapes: B rows of this host, S = seq_len.
Reference: https://google-grain.readthedocs.io (random access; its own iterator state is not used).
"""

import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcoder.config.schema import Stage
from jaxcoder.data.schedule import BatchSchedule
from jaxcoder.data.stream import WindowStream
from jaxcoder.errors import ConfigError

_NUM_THREADS = 1  # tensorstore has its own threads; two grain threads contend for the GIL and are slower
_BATCHES_AHEAD = 2
_ROWS_TOGETHER = 8  # read concurrently from the store by one thread: half the time of serial reads
_ENDLESS = 1 << 62
_CLOSE_SECONDS = 30


class Batch(NamedTuple):
    """The rows of a global batch on one host.

    inputs, targets: int32 [B, S]; targets are the inputs shifted by one token.
    loss_mask: float32 [B, S], 0 where the target is padding (unless data.pad_in_loss), else 1.
    positions: int32 [B, S], rows of the position table; with `document_mask` they restart at 0 in each document.
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
    """A batch from windows, int32 [B, S + 1]. Padding is the run of `pad_id` at a window's right end.

    An end token belongs to the document that it ends; a piece transformed by FIM is one document. With `pad_in_loss`
    padding counts in the loss, as in StarCoder's training.
    """
    inputs, targets = windows[:, :-1], windows[:, 1:]
    filled = _filled(windows, pad_id)[:, None]
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    loss_mask = ((positions < filled - 1) | pad_in_loss).astype(np.float32)
    if not document_mask:
        return Batch(inputs, targets, loss_mask, positions, None)
    segment_ids, positions = _segments(inputs, end_id)
    for row in np.flatnonzero(filled[:, 0] < inputs.shape[1]):
        segment_ids[row, filled[row, 0] :] = positions[row, filled[row, 0] :] = 0
    return Batch(inputs, targets, loss_mask, positions, segment_ids)


def _segments(inputs: np.ndarray, end_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(number of the document in its row, from 1; position in the document, from 0) of every token, int32 [B, S]."""
    num_rows, length = inputs.shape
    is_end = np.zeros(inputs.shape, bool) if end_id is None else inputs == end_id
    is_end[:, -1] = True  # a row ends with a document, or a part of one
    stops = np.flatnonzero(is_end).astype(np.int32) + 1
    starts = np.concatenate([[0], stops[:-1]]).astype(np.int32)
    per_row = np.bincount((stops - 1) // length, minlength=num_rows)
    first_of_row = np.repeat(np.cumsum(per_row) - per_row, per_row)
    numbers = (np.arange(len(stops)) - first_of_row + 1).astype(np.int32)
    lengths = stops - starts
    positions = np.arange(inputs.size, dtype=np.int32) - np.repeat(starts, lengths)
    return np.repeat(numbers, lengths).reshape(inputs.shape), positions.reshape(inputs.shape)


def _filled(windows: np.ndarray, pad_id: int | None) -> np.ndarray:
    """int32 [B]: number of tokens of each window before its padding."""
    filled = np.full(len(windows), windows.shape[1], np.int32)
    if pad_id is not None:
        for row in np.flatnonzero(windows[:, -1] == pad_id):
            content = np.flatnonzero(windows[row] != pad_id)
            filled[row] = content[-1] + 1 if len(content) else 0
    return filled


class Batches:
    """An infinite iterator of `Batch`, and a context manager that ends its threads. Made by `batches`."""

    def __init__(self, stream: WindowStream, *, groups: "_Groups", num_threads: int):
        import grain

        self._stream = stream
        self._groups = groups
        self._num_batches = 0
        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=_BATCHES_AHEAD * groups.most_per_batch
        )
        self._windows = iter(grain.MapDataset.source(groups).to_iter_dataset(options))

    @property
    def samples_consumed(self) -> int:
        """The state of the iteration: samples of all hosts up to the last batch returned, since the start of the
        run."""
        return self._groups.schedule.samples_of(self._num_batches)[0]

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        count = self._groups.in_batch(self._num_batches)
        windows = np.concatenate([next(self._windows) for _ in range(count)])
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
        """Ends the threads and waits for them; a second call does nothing."""
        self._windows.close()  # does not wait for reads in progress
        for thread in self._groups.threads - {threading.current_thread()}:
            thread.join(_CLOSE_SECONDS)


def batches(
    stream: WindowStream,
    *,
    global_batch_size: int,
    first_sample: int,
    stages: Sequence[Stage] = (),
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = _NUM_THREADS,
) -> Batches:
    """Batches from sample `first_sample` on: `with batches(...) as source: for batch in source: ...`.

    stages: changes of the global batch size, by samples consumed.
    The iteration raises errors of the stream (a damaged store). ConfigError if a batch size is not divisible by the
    number of processes.
    """
    schedule = BatchSchedule(global_batch_size, stages, sample=first_sample)
    for size in schedule.batch_sizes:
        if size < 1 or size % process_count:
            raise ConfigError(
                f"global_batch_size {size} is not divisible by the {process_count} processes: make it a multiple of "
                f"{process_count}."
            )
    return Batches(stream, groups=_Groups(stream, schedule, process_index, process_count), num_threads=num_threads)


class _Groups:
    """A random-access source for grain: the rows of one host in the order of its batches, in groups of a few rows."""

    def __init__(self, stream: WindowStream, schedule: BatchSchedule, process_index: int, process_count: int):
        self._stream = stream
        self.schedule = schedule
        self._index, self._count = process_index, process_count
        self._first_groups = [0]  # of each range of equal batch sizes
        for one, following in zip(schedule.runs, schedule.runs[1:], strict=False):
            num_batches = following.first_batch - one.first_batch
            self._first_groups.append(self._first_groups[-1] + num_batches * self._in_batch_of(one.batch_size))
        self.most_per_batch = max(self._in_batch_of(size) for size in schedule.batch_sizes)
        self.threads: set[threading.Thread] = set()

    def in_batch(self, batch: int) -> int:
        """Number of groups of this host's rows of a batch."""
        return self._in_batch_of(self.schedule.samples_of(batch)[1])

    def _in_batch_of(self, size: int) -> int:
        return -(-(size // self._count) // _ROWS_TOGETHER)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, group: int) -> np.ndarray:
        """int32 [rows, S + 1]: group `group` of this host."""
        self.threads.add(threading.current_thread())
        group = int(group)
        number = bisect_right(self._first_groups, group) - 1
        run = self.schedule.runs[number]
        batches, group_of_batch = divmod(group - self._first_groups[number], self._in_batch_of(run.batch_size))
        rows = run.batch_size // self._count
        first = run.first_sample + batches * run.batch_size + self._index * rows
        start = group_of_batch * _ROWS_TOGETHER
        return np.stack(self._stream.samples(first + start, first + min(start + _ROWS_TOGETHER, rows)))
