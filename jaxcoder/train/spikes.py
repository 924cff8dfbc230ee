"""Notices a step whose loss jumps, and says which files its batch held (`data/trace.py`)."""

import math
from collections.abc import Callable

from jaxcoder.config import RunConfig
from jaxcoder.data.schedule import StepHistory
from jaxcoder.data.stream import SampleStream, WindowStream
from jaxcoder.data.trace import Tracer, describe_batch

_MEMORY = 0.98  # of the running mean and deviation: about the last fifty steps
_FIRST_STEPS = 50  # the loss falls too fast to say anything
_DEVIATIONS = 8.0
_LEAST_JUMP = 0.1  # nats per token
_QUIET_STEPS = 100  # between two reports
_MOST_LINES = 24
_MOST_DOCUMENTS = 20_000_000  # the table of more would take gigabytes of this process's memory


class SpikeWatch:
    """`is_spike(loss)` for each step in order: whether it stands out of the steps before it, or is not finite."""

    def __init__(self):
        self._count, self._mean, self._variance = 0, 0.0, 0.0

    def is_spike(self, loss: float) -> bool:
        """loss: nats per token. A spike does not enter the mean, so that a run of them is noticed as one."""
        if not math.isfinite(loss):
            return True
        jump = loss - self._mean
        limit = max(_DEVIATIONS * math.sqrt(self._variance), _LEAST_JUMP)
        if self._count >= _FIRST_STEPS and jump > limit:
            self._mean += (1 - _MEMORY) * limit  # a loss that stays up becomes the usual one
            return True
        self._count += 1
        share = max(1 - _MEMORY, 1 / self._count)
        self._mean += share * jump
        self._variance = (1 - share) * (self._variance + share * jump * jump)
        return False


class SpikeReport:
    """Called with every step's loss: says what was in the batch of one that jumps, at most every hundred steps."""

    def __init__(
        self,
        config: RunConfig,
        stream: WindowStream,
        say: Callable[[str], None],
        *,
        directory: str,
        step: int,
        samples: int,
    ):
        self._watch, self._say, self._directory = SpikeWatch(), say, directory
        self._next_step = 0
        self._tracer = None
        if isinstance(stream, SampleStream):
            history = StepHistory(config.global_batch_size, config.data.stages, [(step, samples)] if step else ())
            self._tracer = Tracer(stream, history, config.num_steps)

    def __call__(self, step: int, loss: float) -> None:
        if not self._watch.is_spike(loss) or self._tracer is None or step < self._next_step:
            return
        self._next_step = step + _QUIET_STEPS
        command = f"jaxcoder data trace {self._directory} --step {step}"
        if sum(store.num_documents for store in self._tracer.stream.stores) > _MOST_DOCUMENTS:
            self._say(f"step {step:,}: the loss jumped to {loss:.4f}; `{command}` lists the files in its batch.")
            return
        self._say(f"step {step:,}: the loss jumped to {loss:.4f}; in its batch were:")
        for number, line in enumerate(describe_batch(self._tracer, step)):
            if number == _MOST_LINES:
                self._say(f"  and more: `{command}` lists them all.")
                break
            self._say(f"  {line}")
