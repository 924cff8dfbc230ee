"""Columns of metrics.jsonl: (step, value) of every key as arrays, and statistics for reports.

The file is read in one pass: the records of 250,000 steps as dictionaries would take gigabytes.
"""

import itertools
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxcoder.record.metrics import NOT_FINITE, read_records


@dataclass(frozen=True)
class Series:
    """steps: int64 [N], strictly ascending. values: float64 [N]. If a step was written twice, the later line counts."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        return float(self.values[-1])

    def finite(self) -> "Series":
        """Without NaN and infinities."""
        return self.where(np.isfinite(self.values))

    def where(self, mask: np.ndarray) -> "Series":
        return Series(self.steps[mask], self.values[mask])

    def between(self, first: int, last: int) -> "Series":
        """Of the steps first..last."""
        return self.where((self.steps >= first) & (self.steps <= last))

    def at(self, steps: np.ndarray) -> np.ndarray:
        """Values at these steps, NaN where there is none."""
        if not len(self):
            return np.full(len(steps), np.nan)
        places = np.minimum(np.searchsorted(self.steps, steps), len(self) - 1)
        return np.where(self.steps[places] == steps, self.values[places], np.nan)

    def scaled(self, factor: float) -> "Series":
        return Series(self.steps, self.values * factor)

    def recent(self, share: float = 0.1) -> float | None:
        """The median of the last `share` of the finite values; None without one."""
        values = self.finite().values
        return float(np.median(values[-max(int(len(values) * share), 1) :])) if len(values) else None


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))


@dataclass(frozen=True)
class Columns:
    """numbers: a Series of every key with numbers. texts: key -> [(step, text), ...] of every other, in order."""

    numbers: dict[str, Series] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Series:
        return self.numbers.get(key, EMPTY)

    def matching(self, prefix: str, suffix: str) -> dict[str, Series]:
        """The part of the key between prefix and suffix -> its series, in order of name."""
        size = len(prefix) + len(suffix)
        return {
            key[len(prefix) : len(key) - len(suffix)]: series
            for key, series in sorted(self.numbers.items())
            if key.startswith(prefix) and key.endswith(suffix) and len(key) > size
        }

    @property
    def last_step(self) -> int | None:
        """The newest step with a number; None without one."""
        return max((int(series.steps[-1]) for series in self.numbers.values()), default=None)


def read_columns(path: str | Path) -> Columns:
    """The columns of a metrics.jsonl, torn lines left out. DataError when there is no file."""
    steps: dict[str, array] = {}
    values: dict[str, array] = {}
    texts: dict[str, list[tuple[int, str]]] = {}
    for _, record in read_records(path):
        step = record.pop("step")
        for key, value in record.items():
            if value.__class__ is str and value not in NOT_FINITE:
                texts.setdefault(key, []).append((step, value))
                continue
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                continue
            if key not in steps:
                steps[key], values[key] = array("q"), array("d")
            steps[key].append(step)
            values[key].append(number)
    return Columns({key: _series(steps[key], values[key]) for key in steps}, texts)


def _series(steps: array, values: array) -> Series:
    step_array, value_array = np.frombuffer(steps, np.int64), np.frombuffer(values, np.float64)
    if np.all(step_array[1:] > step_array[:-1]):
        return Series(step_array, value_array)
    order = np.argsort(step_array, kind="stable")
    step_array, value_array = step_array[order], value_array[order]
    is_last = np.append(step_array[1:] != step_array[:-1], True)
    return Series(step_array[is_last], value_array[is_last])


def position_losses(columns: Columns) -> dict[tuple[int, int], Series]:
    """(first, last) position of each bucket of a window -> its held-out loss, in order."""
    series = columns.matching("eval/position/", "/loss")
    buckets = {name: re.fullmatch(r"(\d+)-(\d+)", name) for name in series}
    losses = {(int(match[1]), int(match[2])): series[name].finite() for name, match in buckets.items() if match}
    return dict(sorted(losses.items()))


def thinned(series: Series, most: int = 600) -> Series:
    """About 2 x `most` finite points that look the same in a chart.

    They are the minimum and the maximum of each of `most` blocks of steps, and the first and the last point.
    """
    series = series.finite()
    if len(series) <= 2 * most:
        return series
    edges = np.linspace(0, len(series), most + 1).astype(np.int64)
    keep = {0, len(series) - 1}
    for start, stop in itertools.pairwise(edges):
        block = series.values[start:stop]
        keep.update((int(start + block.argmin()), int(start + block.argmax())))
    places = np.array(sorted(keep))
    return Series(series.steps[places], series.values[places])


def smoothed(series: Series, share: float = 0.03) -> Series:
    """Centred moving average of the finite values over about `share` of them; the window shrinks at both ends."""
    series = series.finite()
    size = len(series)
    reach = int(share * size / 2)
    if not reach:
        return series
    sums = np.concatenate([[0.0], np.cumsum(series.values)])
    places = np.arange(size)
    reaches = np.minimum(reach, np.minimum(places, size - 1 - places))
    return Series(series.steps, (sums[places + reaches + 1] - sums[places - reaches]) / (2 * reaches + 1))


def _blocks(series: Series, count: int) -> tuple[Series, np.ndarray]:
    """The finite values, and int64 edges that cut them into at most `count` equal blocks."""
    series = series.finite()
    return series, np.linspace(0, len(series), min(count, len(series)) + 1).astype(np.int64)


def block_medians(series: Series, count: int) -> Series:
    """The median of each of at most `count` equal blocks of the finite values, at the first step of the block."""
    series, edges = _blocks(series, count)
    medians = [float(np.median(series.values[start:stop])) for start, stop in itertools.pairwise(edges)]
    return Series(series.steps[edges[:-1]], np.array(medians)) if len(series) else EMPTY


def block_means(series: Series, count: int = 60) -> Series:
    """Like `block_medians`, with means."""
    series, edges = _blocks(series, count)
    if not len(series):
        return EMPTY
    return Series(series.steps[edges[:-1]], np.add.reduceat(series.values, edges[:-1]) / np.diff(edges))
