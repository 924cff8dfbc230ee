"""Traces a step to the files in its batch, and a file to every past and future step that reads it.

Training records nothing for this. A step's samples follow from the schedule, the location of a sample in its store from
the mixture and the permutation, its documents from the store's table; each of these functions is invertible. A query
reads the table of documents and takes a few microseconds per window.

A batch is described by its windows before FIM, which inserts sentinels and truncates at the right end: a document with
only a few tokens at the end of a window may have been truncated.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxcoder.data.schedule import StepHistory
from jaxcoder.data.store import TokenStore
from jaxcoder.data.stream import SampleStream
from jaxcoder.data.windows import Place
from jaxcoder.errors import DataError
from jaxcoder.formatting import escape_control


class TracedDocument(NamedTuple):
    """A document in a window: its tokens, end token included, are [start, stop) of the window."""

    repo_name: str
    path: str
    lang: str
    start: int
    stop: int


class TracedRow(NamedTuple):
    """A row of a batch: its sample, the location in the store, and its documents in order."""

    row: int
    sample: int
    place: Place
    documents: list[TracedDocument]


class Reading(NamedTuple):
    """A row of a step's batch with one of the requested documents."""

    step: int
    row: int
    sample: int
    corpus: int
    epoch: int


class Documents(NamedTuple):
    """Documents of one corpus: `rows` are their numbers in its store, int64 ascending."""

    corpus: int
    rows: np.ndarray


class Tracer:
    """Traces one run. history: the samples of its steps. num_steps: steps of the run."""

    def __init__(self, stream: SampleStream, history: StepHistory, num_steps: int):
        self.stream, self.history, self.num_steps = stream, history, num_steps

    def batch(self, step: int) -> Iterator[TracedRow]:
        """The rows of the batch of `step` (1 is the first). DataError if the run has no such step."""
        first, size = self._span(step)
        for row in range(size):
            yield self._row(row, first + row)

    def row(self, step: int, row: int) -> TracedRow:
        """One row of that batch."""
        first, size = self._span(step)
        if not 0 <= row < size:
            raise DataError(f"Step {step} has the rows 0 to {size - 1}, not row {row}.")
        return self._row(row, first + row)

    def _span(self, step: int) -> tuple[int, int]:
        if not 1 <= step <= self.num_steps:
            raise DataError(f"The run has the steps 1 to {self.num_steps:,}, not step {step:,}.")
        return self.history.samples_of(step)

    def _row(self, row: int, sample: int) -> TracedRow:
        place = self.stream.locate(sample)
        documents = documents_within(
            self.stream.stores[place.corpus], place.start, place.start + self.stream.seq_len + 1
        )
        return TracedRow(row, sample, place, documents)

    def find(self, *, path: str | None = None, repo_name: str | None = None) -> list[Documents]:
        """The documents with this path, or "repository/path", or of this repository. DataError if there are none."""
        found = [
            Documents(number, rows)
            for number, store in enumerate(self.stream.stores)
            if len(rows := matching(store, path=path, repo_name=repo_name))
        ]
        if not found:
            raise DataError(self._nothing_found(path, repo_name))
        return found

    def readings(self, found: list[Documents]) -> list[Reading]:
        """Every row with one of the documents, of all steps of the run, in order."""
        total, _ = self.history.samples_of(self.num_steps + 1)
        counts = self.stream.mixture.counts(total)
        readings = []
        for corpus, rows in found:
            windows = self.stream.windows[corpus]
            offsets = self.stream.stores[corpus].document_offsets
            starts, stops = offsets[rows], offsets[rows + 1]
            for epoch in range(-(-counts[corpus] // windows.windows_per_epoch)):
                for number in windows.holding(starts, stops, epoch).tolist():
                    sample = self.stream.mixture.index_of(corpus, number)
                    if sample is not None and sample < total:
                        step, row = self.history.step_of(sample)
                        readings.append(Reading(step, row, sample, corpus, epoch))
        return sorted(readings)

    def _nothing_found(self, path: str | None, repo_name: str | None) -> str:
        stores = ", ".join(store.path for store in self.stream.stores)
        column, value = ("path", path) if path is not None else ("repo_name", repo_name or "")
        similar = [name for store in self.stream.stores for name in containing(store, column, value, most=3)]
        hint = f"it has {', '.join(map(escape_control, similar[:3]))}" if similar else "check the spelling"
        what = "file" if path is not None else "repository"
        return f"No document of {stores} has the {what} {value!r}: {hint}."


def documents_within(store: TokenStore, start: int, stop: int) -> list[TracedDocument]:
    """The documents with a token in [start, stop) of the store; their positions are relative to `start`."""
    offsets = store.document_offsets
    first = int(np.searchsorted(offsets, start, side="right")) - 1
    last = int(np.searchsorted(offsets, stop, side="left"))
    rows = store.documents.slice(first, last - first).select(["repo_name", "path", "lang"]).to_pylist()
    return [
        TracedDocument(
            row["repo_name"], row["path"], row["lang"], max(int(begin), start) - start, min(int(end), stop) - start
        )
        for row, begin, end in zip(rows, offsets[first:last], offsets[first + 1 : last + 1], strict=True)
    ]


def matching(store: TokenStore, *, path: str | None = None, repo_name: str | None = None) -> np.ndarray:
    """Numbers of the documents with this path (or "repository/path") and of this repository, int64 ascending."""
    import pyarrow.compute as pc

    table, mask = store.documents, None
    if path is not None:
        mask = pc.equal(table["path"], path)
        if "/" in path:
            mask = pc.or_(mask, pc.equal(pc.binary_join_element_wise(table["repo_name"], table["path"], "/"), path))
    if repo_name is not None:
        of_repository = pc.equal(table["repo_name"], repo_name)
        mask = of_repository if mask is None else pc.and_(mask, of_repository)
    if mask is None:
        return np.arange(store.num_documents)
    return np.flatnonzero(mask.to_numpy())


def containing(store: TokenStore, column: str, text: str, *, most: int) -> list[str]:
    """Up to `most` values of a column that contain the last component of `text`."""
    import pyarrow.compute as pc

    values = store.documents[column]
    hits = values.filter(pc.match_substring(values, text.rstrip("/").rpartition("/")[2]))
    return pc.unique(hits).slice(0, most).to_pylist() if text else []


def describe_row(stream: SampleStream, traced: TracedRow) -> list[str]:
    """One line for the row and one for each of its documents."""
    place = traced.place
    end = place.start + stream.seq_len + 1
    lines = [
        f"row {traced.row}: sample {traced.sample:,}, tokens {place.start:,} to {end:,} of "
        f"{stream.stores[place.corpus].path}, epoch {place.epoch}"
    ]
    for document in traced.documents:
        name = escape_control(" ".join(filter(None, (document.repo_name, document.path)))) or "(no name)"
        lines.append(f"    {document.stop - document.start:>7,} tokens  {name}")
    return lines


def describe_batch(tracer: Tracer, step: int, *, most_rows: int | None = None) -> Iterator[str]:
    """The lines of `jaxcoder data trace --step`, which the training loop also logs for a loss spike."""
    first, size = tracer.history.samples_of(step)
    yield f"step {step:,}: samples {first:,} to {first + size - 1:,}"
    for traced in tracer.batch(step):
        if traced.row == most_rows:
            yield f"and {size - most_rows} more rows"
            return
        yield from describe_row(tracer.stream, traced)
