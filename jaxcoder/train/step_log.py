"""The numbers of each step, fetched one step late, so that the host never waits for the step that is running."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax

from jaxcoder.config import RunConfig
from jaxcoder.observability.console import TrainingLine
from jaxcoder.protocols import MetricWriter


@dataclass(frozen=True, kw_only=True)
class _Pending:
    step: int
    metrics: dict[str, jax.Array]
    samples: int
    text_bytes: int | None
    data_wait: float


class StepLog:
    """Takes the device arrays of a step and writes those of the step before."""

    def __init__(
        self, config: RunConfig, writer: MetricWriter, line: TrainingLine, on_loss: Callable[[int, float], None]
    ):
        """on_loss: is told (step, loss) of every step, once it has been written."""
        self._config, self._writer, self._line, self._on_loss = config, writer, line, on_loss
        self._pending: _Pending | None = None
        self._last_time: float | None = None

    def record(
        self, step: int, metrics: dict[str, jax.Array], *, samples: int, text_bytes: int | None, data_wait: float
    ) -> None:
        """The step has been dispatched: its metrics are still being computed.

        samples: consumed by the run so far, this step included. data_wait: seconds without a batch.
        """
        self.flush()
        self._pending = _Pending(
            step=step, metrics=metrics, samples=samples, text_bytes=text_bytes, data_wait=data_wait
        )

    def flush(self) -> None:
        """Waits for the pending step and writes it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(pending.metrics).items()}
        if pending.text_bytes:
            nats = values["loss"] * values["tokens"]
            values["bits_per_byte"] = nats / math.log(2) / pending.text_bytes
        now = time.monotonic()
        if self._last_time is not None:
            values["step_time"] = now - self._last_time
            values["tokens_per_second"] = values["tokens"] / max(values["step_time"], 1e-9)
        self._last_time = now
        values["data_wait"] = pending.data_wait
        values["samples"] = pending.samples
        if pending.step % self._config.log_every_steps == 0 or pending.step == self._config.num_steps:
            self._writer.write(pending.step, values)
        self._line.update(
            step=pending.step,
            loss=values["loss"],
            bits_per_byte=values.get("bits_per_byte"),
            tokens_per_second=values.get("tokens_per_second"),
        )
        self._on_loss(pending.step, values["loss"])

    def pause(self) -> None:
        """Something else ran (a save, an evaluation): the time until the next step is not a step time."""
        self._last_time = None
