"""Hooks on the metrics of each step: log alarms, list the files of a loss spike, stop after many skipped steps."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from jaxcoder.config import RunConfig
from jaxcoder.data.schedule import StepHistory
from jaxcoder.data.stream import SampleStream, WindowStream
from jaxcoder.data.trace import Tracer, describe_batch
from jaxcoder.errors import TrainingError
from jaxcoder.protocols import MetricWriter
from jaxcoder.record.alarms import Alarms, LossSpike
from jaxcoder.record.metrics import last_metrics
from jaxcoder.train.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_MAX_LINES = 24
_MAX_DOCUMENTS = 20_000_000  # the table of more documents would take gigabytes of memory
_HISTORY = 2000  # records that the alarms read after a restart


class AlarmHooks:
    """Called with the metrics of every step, and with those of every evaluation, in order.

    step, samples: where the run continues. Raises TrainingError when too many steps in a row were skipped.
    """

    def __init__(
        self,
        config: RunConfig,
        stream: WindowStream,
        directory: RunDirectory,
        writer: MetricWriter,
        *,
        step: int,
        samples: int,
    ):
        self._config, self._stream, self._directory = config, stream, directory
        self._writer = writer
        self._history = StepHistory(config.global_batch_size, config.data.stages, [(step, samples)] if step else ())
        self._alarms = Alarms()
        self._skipped_in_row = 0
        if step:
            self._alarms.catch_up(last_metrics(directory.metrics_file, _HISTORY))

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        if "skipped" in metrics:
            self._count_skips(step, metrics)
        for alarm in self._alarms(step, metrics):
            self._writer.write(step, {f"alarm/{alarm.rule}": alarm.message})
            logger.warning(f"step {step:,}: {alarm.rule}: {alarm.message}")
            if alarm.rule == LossSpike.name:
                self._log_files(step)

    def _count_skips(self, step: int, metrics: Mapping[str, Any]) -> None:
        if not metrics["skipped"]:
            self._skipped_in_row = 0
            return
        self._skipped_in_row += 1
        what = "loss" if not math.isfinite(metrics["loss"]) else "gradient norm"
        is_finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        problem = f"above {self._config.optimizer.skip_grad_norm_above:g}" if is_finite else "not finite"
        value = f" {metrics['grad_norm']:.4g}" if is_finite else ""
        so_far = f"{metrics['skipped_steps']:.0f} so far"
        logger.warning(f"step {step:,}: skipped, its {what}{value} is {problem} ({so_far})")
        if self._skipped_in_row == 1:
            self._log_files(step)
        limit = self._config.optimizer.max_skipped_steps
        if self._skipped_in_row >= limit:
            first = step - limit + 1
            raise TrainingError(
                f"the {what} was {problem} in {limit} steps in a row ({first:,} to {step:,}), which were skipped: see "
                f"their files with `jaxcoder data trace {self._directory.path} --step {first}`, lower "
                "optimizer.peak_learning_rate, or raise optimizer.max_skipped_steps; the same command continues from "
                "the last checkpoint."
            )

    def _log_files(self, step: int) -> None:
        if not isinstance(self._stream, SampleStream):
            return
        command = f"jaxcoder data trace {self._directory.path} --step {step}"
        if sum(store.num_documents for store in self._stream.stores) > _MAX_DOCUMENTS:
            logger.warning(f"  `{command}` lists the files in its batch")
            return
        tracer = Tracer(self._stream, self._history, self._config.num_steps)
        for number, line in enumerate(describe_batch(tracer, step)):
            if number == _MAX_LINES:
                logger.warning(f"  and more: `{command}` lists them all")
                break
            logger.warning(f"  {line}")
