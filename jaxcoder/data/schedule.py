"""The samples of each batch, with batch sizes that may change between stages.

A batch has the size of the stage of its first sample, even if the next stage starts within it. The schedule starts at a
position (batches, samples): (0, 0) for a new run, the checkpoint's position after a restart, so that sizes may also
change between restarts.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxcoder.config.schema import DataConfig, Stage


class EqualBatches(NamedTuple):
    """Consecutive batches of one size, from batch `first_batch`, whose first sample is `first_sample`."""

    first_batch: int
    first_sample: int
    batch_size: int


class BatchSchedule:
    """Batches from a position on. runs: the ranges of equal sizes, in order; the last has no end."""

    def __init__(self, global_batch_size: int, stages: Sequence[Stage] = (), *, batch: int = 0, sample: int = 0):
        self.runs: list[EqualBatches] = list(_equal_batches(global_batch_size, stages, batch, sample))
        self._batches = [run.first_batch for run in self.runs]
        self._samples = [run.first_sample for run in self.runs]

    @classmethod
    def of(cls, global_batch_size: int, data: DataConfig, *, batch: int = 0, sample: int = 0) -> "BatchSchedule":
        """The schedule of a run's config."""
        return cls(global_batch_size, data.stages, batch=batch, sample=sample)

    def samples_of(self, batch: int) -> tuple[int, int]:
        """(first sample, size) of a batch, which is not before the position."""
        run = self.runs[max(bisect_right(self._batches, batch) - 1, 0)]
        return run.first_sample + (batch - run.first_batch) * run.batch_size, run.batch_size

    def batch_of(self, sample: int) -> tuple[int, int]:
        """(batch, row) of a sample, which is not before the position."""
        run = self.runs[max(bisect_right(self._samples, sample) - 1, 0)]
        batches, row = divmod(sample - run.first_sample, run.batch_size)
        return run.first_batch + batches, row

    @property
    def batch_sizes(self) -> set[int]:
        """All batch sizes."""
        return {run.batch_size for run in self.runs}


def _equal_batches(global_batch_size: int, stages: Sequence[Stage], batch: int, sample: int) -> Iterator[EqualBatches]:
    stages = stages or [Stage(from_sample=0)]
    for stage, end in zip(stages, [*(stage.from_sample for stage in stages[1:]), None], strict=True):
        size = stage.global_batch_size or global_batch_size
        if end is None:
            yield EqualBatches(batch, sample, size)
        elif sample < end:
            count = -((sample - end) // size)
            yield EqualBatches(batch, sample, size)
            batch, sample = batch + count, sample + count * size


class StepHistory:
    """The samples of each step of a run: from its metrics if they have the step, else from the config's schedule.

    Step 1 is the first. logged: (step, samples consumed by the run including this step) from metrics.jsonl, ascending;
    () for a run that has not started.
    """

    def __init__(self, global_batch_size: int, stages: Sequence[Stage], logged: Sequence[tuple[int, int]] = ()):
        self._size, self._stages = global_batch_size, stages
        known = [(0, 0), *logged]
        self._steps = [step for step, _ in known]
        self._samples = [samples for _, samples in known]

    @property
    def last_step(self) -> int:
        """The last logged step; 0 without one."""
        return self._steps[-1]

    def samples_of(self, step: int) -> tuple[int, int]:
        """(first sample, size) of a step's batch."""
        before = bisect_right(self._steps, step - 1) - 1
        first, size = self._from(before).samples_of(step - 1)
        following = before + 1
        if following < len(self._steps) and self._steps[following] == step:
            size = self._samples[following] - first
        return first, size

    def step_of(self, sample: int) -> tuple[int, int]:
        """(step, row) of a sample."""
        before = bisect_right(self._samples, sample) - 1
        following = before + 1
        if following < len(self._steps) and self._steps[following] == self._steps[before] + 1:
            return self._steps[following], sample - self._samples[before]
        batch, row = self._from(before).batch_of(sample)
        return batch + 1, row

    def _from(self, known: int) -> BatchSchedule:
        return BatchSchedule(self._size, self._stages, batch=self._steps[known], sample=self._samples[known])
