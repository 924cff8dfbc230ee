"""The resources of a training run, opened in dependency order and closed in reverse.

Hosts are compared and the run's directory is claimed before anything is computed, so that a wrong start fails within
seconds and changes nothing on disk.
"""

import contextlib
import dataclasses
import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

import jaxcoder
from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.config import RunConfig
from jaxcoder.config.mesh import resolve_mesh
from jaxcoder.config.validate import validate
from jaxcoder.data.loader import Batch, batches
from jaxcoder.errors import ConfigError
from jaxcoder.formatting import plural
from jaxcoder.models.flops import num_parameters
from jaxcoder.protocols import MetricWriter
from jaxcoder.record.console import TrainingProgress, clear_live_line
from jaxcoder.record.event_log import CategoryTimer, EventLog, new_attempt
from jaxcoder.record.metrics import JsonlWriter, MultiWriter, TensorBoardWriter, last_metrics
from jaxcoder.runtime import (
    CoordinatedStop,
    GracefulStop,
    ProcessGroup,
    Watchdog,
    acquire_run_lock,
    on_signal,
    out_of_memory_explained,
    process_started,
    resume_command,
    share_cache,
)
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.train import host_check
from jaxcoder.train.alarm_hooks import AlarmHooks
from jaxcoder.train.evaluate import HeldOut
from jaxcoder.train.inputs import host_share, open_streams, prefetch_to_devices
from jaxcoder.train.memory_estimate import saved_bytes
from jaxcoder.train.profile import Profiler, ProfileSteps
from jaxcoder.train.restore import OpenWeights, initial_weights, restore_or_initialize
from jaxcoder.train.run_directory import RunDirectory, with_absolute_paths
from jaxcoder.train.run_end import record_run_end
from jaxcoder.train.state import TrainState
from jaxcoder.train.step_log import StepLog

AlterBatch = Callable[[int, Batch], Batch]
"""(step, this process's share of its batch) -> what is trained on instead."""

_HOSTS_EVERY = 30.0  # seconds between two records of the slowest host
_DIRECTORY_EVERY = 5.0  # seconds between two checks that the output directory still exists
_FAILURE_SECONDS = 20.0  # in which all processes report the failure of an evaluation
_RECENT_RECORDS = 50  # of metrics.jsonl, among which is the evaluation of the restored step

logger = logging.getLogger(__name__)


class TrainSession:
    """A context manager around the loop, which advances `state`, `step` and `samples`.

    config: with the sizes of the mesh resolved. step, samples: completed optimizer steps and the windows that they
    consumed. batches: (on the host, on the devices) of every remaining step.
    """

    state: TrainState
    step: int
    samples: int
    batches: Iterator[tuple[Batch, Batch]]
    writer: MetricWriter

    def __init__(
        self,
        config: RunConfig,
        *,
        accept_config_change: bool,
        directory_is_shared: bool,
        open_weights: OpenWeights,
        profile_steps: ProfileSteps | None,
        alter_batch: AlterBatch | None,
    ):
        self.config = config = with_absolute_paths(config)
        self.directory = RunDirectory.of(config)
        self._accept_config_change, self._directory_is_shared = accept_config_change, directory_is_shared
        self._open_weights, self._profile_steps, self._alter_batch = open_weights, profile_steps, alter_batch
        self._next_hosts = time.monotonic() + _HOSTS_EVERY
        self._next_directory_check = 0.0

    def __enter__(self) -> "TrainSession":
        with contextlib.ExitStack() as stack:
            stack.callback(clear_live_line)
            # Reports an error of one process to the others, which would otherwise hang in a collective.
            self.group = stack.enter_context(ProcessGroup())
            self._check_hosts()
            self._claim_directory(stack)
            self._start_monitoring(stack)
            self._restore(stack)
            self._open_input_and_output(stack)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *exc_info: Any) -> bool | None:
        return self._exits.__exit__(*exc_info)

    def _check_hosts(self) -> None:
        """Checks that all processes have the same configuration and data, before the directory is touched."""
        host_check.check_configuration(self.config, self.group, self._validate)
        self.config = dataclasses.replace(self.config, mesh=resolve_mesh(self.config.mesh, len(jax.devices())))
        self.mesh = make_mesh(self.config.mesh)
        self._stream, self._held_out_streams, self.tokenizer = open_streams(self.config)
        self.token_bytes = self._stream.token_bytes
        self.data = host_check.check_data(self._stream, self._held_out_streams, self.group)

    def _validate(self) -> None:
        validate(self.config, len(jax.devices()))
        if self._profile_steps is not None and self._profile_steps.first > self.config.num_steps:
            raise ConfigError(
                f"--profile-steps starts at step {self._profile_steps.first:,}, but the run has "
                f"{self.config.num_steps:,} steps: give earlier ones."
            )

    def _claim_directory(self, stack: contextlib.ExitStack) -> None:
        """Process 0 claims the directory and acquires its run lock."""
        self._weights = initial_weights(self.config, self.tokenizer, self.directory.checkpoints, self._open_weights)

        def claim(_: object) -> None:
            self.directory.claim(
                self.config,
                data=self.data,
                accept_config_change=self._accept_config_change,
                is_shared=self._directory_is_shared,
            )
            self.directory.identify()
            host_check.check_disk(self.directory.path, saved_bytes(self.config))
            stack.enter_context(acquire_run_lock(self.directory.path))

        self.group.agree("claim", None, claim)
        if self.group.count > 1:
            share_cache(self.directory.compiled)

    def _start_monitoring(self, stack: contextlib.ExitStack) -> None:
        """Opens events, goodput, signals and the watchdog: failures from here on are recorded."""
        group, directory, enter = self.group, self.directory, stack.enter_context
        attempt = group.agree("attempt", new_attempt(), lambda ids: ids[0])
        events = EventLog(directory.events_file, attempt=attempt, is_writing=group.index == 0)
        self.events = enter(contextlib.closing(events))
        self.timer = CategoryTimer(events, process_started())
        self._record_begin()
        self.stop_signal = enter(GracefulStop())
        self.stop = CoordinatedStop(self.stop_signal, group)
        self.watchdog = enter(
            Watchdog(
                group,
                self.config.watchdog,
                stacks=lambda step: directory.stacks_file(step, group.index),
                on_end=lambda message, step: events.write_end(step, "watchdog", message, process=group.index),
            )
        )
        self.step = 0
        enter(record_run_end(events, self.timer, group, self.watchdog, lambda: self.step))
        enter(out_of_memory_explained(self.config))
        enter(jax.set_mesh(self.mesh))
        host_check.check_clocks(group)
        host_check.check_devices(self.mesh)

    def _record_begin(self) -> None:
        self.events.write(
            "begin",
            process_started=process_started(),
            processes=self.group.count,
            devices=self.mesh.size,
            device_kind=self.mesh.devices.flat[0].device_kind,
            hosts=self.group.hosts,
            mesh=dict(self.mesh.shape),
            version=jaxcoder.__version__,
            code=host_check.source_hash(),
            jax=jax.__version__,
            command=resume_command(),
        )

    def _restore(self, stack: contextlib.ExitStack) -> None:
        self.checkpointer = stack.enter_context(
            Checkpointer(
                self.directory.checkpoints,
                self.config.checkpoint,
                run=self.config,
                tokenizer_files=self.tokenizer.files() if self.tokenizer else None,
            )
        )
        logger.info(describe(self.config, self.mesh))
        with self.timer.measure("restore"):
            self.state, self.step, self.samples = restore_or_initialize(
                self.config, self.mesh, self.checkpointer, self._weights, self.tokenizer
            )
        if self.step > self.config.num_steps:
            raise ConfigError(
                f"num_steps is {self.config.num_steps:,}, but `{self.directory.path}` has reached step {self.step:,}: "
                "give at least that, or another --output-dir."
            )
        if 0 < self.step < self.config.num_steps:
            logger.info(f"Continuing after step {self.step:,}.")

    def _open_input_and_output(self, stack: contextlib.ExitStack) -> None:
        config, directory, enter = self.config, self.directory, stack.enter_context
        self.writer = enter(contextlib.closing(self._open_writers()))
        if self.group.index == 0:
            directory.adopt(config, self.data)
        self.events.write("ready", step=self.step, samples=self.samples)
        self.alarm_hooks = AlarmHooks(
            config, self._stream, directory, self.writer, step=self.step, samples=self.samples
        )
        self.log = StepLog(config, self.writer, TrainingProgress(config.num_steps), self.alarm_hooks)
        self.held_out = HeldOut(config, self._held_out_streams, self.mesh) if self._held_out_streams else None
        self.profiler = enter(
            Profiler(
                self._profile_steps,
                directory.profile,
                lambda first, last: self.events.write("profile", first=first, last=last, directory=directory.profile),
            )
        )
        enter(on_signal(signal.SIGUSR1, self.profiler.request))
        self.batches = enter(self._open_batches())

    def _open_writers(self) -> MetricWriter:
        """metrics.jsonl and, if configured, TensorBoard, in process 0. Records after the restored step are dropped."""
        writers: list[MetricWriter] = []
        if self.group.index == 0:
            writers.append(JsonlWriter(self.directory.metrics_file, resume_from_step=self.step))
            if self.config.tensorboard:
                writers.append(TensorBoardWriter(self.directory.tensorboard, resume_from_step=self.step))
        return MultiWriter(writers)

    @contextlib.contextmanager
    def _open_batches(self) -> Iterator[Iterator[tuple[Batch, Batch]]]:
        """Batches read by worker processes; the next two are already being copied to the devices."""
        index, count = host_share(self.mesh)
        with batches(
            self._stream,
            global_batch_size=self.config.global_batch_size,
            stages=self.config.data.stages,
            first_sample=self.samples,
            process_index=index,
            process_count=count,
        ) as source:
            remaining: Iterator[Batch] = itertools.islice(source, self.config.num_steps - self.step)
            if self._alter_batch is not None:
                remaining = map(self._alter_batch, itertools.count(self.step + 1), remaining)
            with prefetch_to_devices(remaining, self.mesh) as prefetched:
                yield prefetched

    def saved_evaluation(self) -> dict[str, float]:
        """The evaluation metrics of the restored step in metrics.jsonl; {} if that step was not evaluated."""

        def read(_: object) -> dict[str, float]:
            records = last_metrics(self.directory.metrics_file, _RECENT_RECORDS)
            evaluated = [record for record in records if record["step"] == self.step and "eval_seconds" in record]
            return {name: value for name, value in evaluated[-1].items() if "eval/" in name} if evaluated else {}

        return self.group.agree("evaluated", None, read)

    def all_failed(self, work: str) -> bool:
        """Called after `work` between two steps has failed: whether it fails in every process, within a few seconds.

        A process without the failure would hang in a collective, so then the run has to end.
        """
        self.group.post(f"failed/{work}/{self.group.index}", "")
        deadline = time.monotonic() + _FAILURE_SECONDS
        while len(self.group.posted(f"failed/{work}")) < self.group.count:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def record_progress(self) -> None:
        """Writes finished saves, goodput and the slowest host, when they are due."""
        for saved in self.checkpointer.take_finished():
            self.events.write(
                "saved", step=saved.step, blocked=saved.blocked, seconds=saved.seconds, bytes=saved.num_bytes
            )
        self.timer.write(self.step)
        if time.monotonic() > self._next_directory_check:
            self._next_directory_check = time.monotonic() + _DIRECTORY_EVERY
            self.directory.check()
        if time.monotonic() > self._next_hosts and (work := self.watchdog.host_work()) is not None:
            self._next_hosts = time.monotonic() + _HOSTS_EVERY
            self.writer.write(
                self.step,
                {
                    "hosts/slowest": work.slowest,
                    "hosts/slowest_name": self.group.hosts[work.slowest],
                    "hosts/slowest_seconds": work.seconds,
                    "hosts/median_seconds": work.median,
                    "hosts/count": work.count,
                },
            )


def describe(config: RunConfig, mesh: Mesh) -> str:
    """One line: the model, the batch, the devices and the mesh."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    tokens = config.global_batch_size * config.model.max_seq_len
    return (
        f"Training {config.name}: {num_parameters(config.model):,} parameters, {tokens:,} tokens a step, "
        f"{config.num_steps:,} steps, on {plural(mesh.size, mesh.devices.flat[0].device_kind + ' device')} "
        f"as a mesh of {axes}."
    )
