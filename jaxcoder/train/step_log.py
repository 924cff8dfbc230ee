"""The metrics of each step, fetched one step late, so that the host does not wait for the running step.

Model FLOPs utilisation (MFU): FLOPs of `models/flops.py` (recomputation not counted) for all tokens of the batch,
divided by the step's time and by the devices' dense bf16 peak.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from jaxcoder.config import RunConfig
from jaxcoder.models.flops import training_flops_per_token
from jaxcoder.protocols import MetricWriter
from jaxcoder.record.console import TrainingProgress
from jaxcoder.record.memory import host_memory
from jaxcoder.train.devices import device_memory, find_chip


@dataclass(frozen=True, kw_only=True)
class _Pending:
    step: int
    metrics: dict[str, jax.Array]
    samples: int
    batch_size: int
    text_bytes: int | None
    data_wait: float
    counts: dict[str, float]


class StepLog:
    """Takes the device arrays of a step and writes the metrics of the previous one.

    Metrics: loss (nats per token), bits_per_byte, grad_norm, learning_rate, tokens (that count in the loss),
    samples (of the run so far), skipped, skipped_steps, batch_hash; step_time, data_wait in seconds; tokens_per_second;
    flops_per_second_per_device and mfu (where the peak is known); host_memory, device_memory, device_memory_peak in
    bytes, of the process that writes.
    """

    def __init__(
        self,
        config: RunConfig,
        writer: MetricWriter,
        progress: TrainingProgress,
        hooks: Callable[[int, Mapping[str, float]], None],
    ):
        """hooks: called with (step, metrics) of every step after they have been written."""
        self._config, self._writer, self._progress, self._hooks = config, writer, progress, hooks
        self._flops_per_window = (
            training_flops_per_token(config.model, config.model.max_seq_len) * config.model.max_seq_len
        )
        self._chip = find_chip(jax.devices()[0].device_kind)
        self._pending: _Pending | None = None
        self._last_time: float | None = None
        self.blocked = 0.0
        """Total seconds that the host has waited here for the devices."""

    def record(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        *,
        samples: int,
        batch_size: int,
        text_bytes: int | None,
        data_wait: float,
        counts: dict[str, float],
    ) -> None:
        """Takes a dispatched step, whose metrics are still being computed.

        samples: consumed by the run, this step included. data_wait: seconds spent waiting for the batch. counts:
        further metrics, known on the host.
        """
        self.flush()
        self._pending = _Pending(
            step=step,
            metrics=metrics,
            samples=samples,
            batch_size=batch_size,
            text_bytes=text_bytes,
            data_wait=data_wait,
            counts=counts,
        )

    def flush(self) -> None:
        """Waits for the pending step and writes it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        asked = time.monotonic()
        values = {name: value.item() for name, value in jax.device_get(pending.metrics).items()}
        self.blocked += time.monotonic() - asked
        if pending.text_bytes:
            nats = values["loss"] * values["tokens"]
            values["bits_per_byte"] = nats / math.log(2) / pending.text_bytes
        values |= self._speed(pending, values["tokens"])
        values |= {"data_wait": pending.data_wait, "samples": pending.samples, "host_memory": host_memory()}
        values |= device_memory() | pending.counts
        if pending.step % self._config.log_every_steps == 0 or pending.step == self._config.num_steps:
            self._writer.write(pending.step, values)
        self._progress.update(
            step=pending.step,
            loss=values["loss"],
            bits_per_byte=values.get("bits_per_byte"),
            tokens_per_second=values.get("tokens_per_second"),
            mfu=values.get("mfu"),
        )
        self._hooks(pending.step, values)

    def _speed(self, pending: _Pending, tokens: float) -> dict[str, float]:
        """Empty for the first step and after a pause, whose time is not a step time."""
        now = time.monotonic()
        before, self._last_time = self._last_time, now
        if before is None:
            return {}
        seconds = max(now - before, 1e-9)
        flops = self._flops_per_window * pending.batch_size / seconds / jax.device_count()
        speed = {"step_time": seconds, "tokens_per_second": tokens / seconds, "flops_per_second_per_device": flops}
        return speed if self._chip is None else speed | {"mfu": flops / self._chip.peak_flops}

    def pause(self) -> None:
        """To be called after a save or an evaluation: the time until the next step is not a step time."""
        self._last_time = None
