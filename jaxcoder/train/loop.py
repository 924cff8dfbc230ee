"""The training loop: see that all hosts agree, claim the run's directory, restore or begin, then step until done or
asked to stop.

One step: take the next batch (already on the devices) -> dispatch the jitted step -> read the metrics of the step
before -> evaluate and save when due -> leave when a signal came. `step` counts completed optimizer steps, `samples` the
windows that they consumed: the whole position in the data.
"""

import contextlib
import dataclasses
import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

import jaxcoder
from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.config import RunConfig
from jaxcoder.config.mesh import resolve_mesh
from jaxcoder.config.validate import validate
from jaxcoder.data.loader import Batch, batches
from jaxcoder.data.schedule import BatchSchedule
from jaxcoder.data.stream import WindowStream
from jaxcoder.errors import ConfigError, Interrupted
from jaxcoder.formatting import plural
from jaxcoder.models.flops import num_parameters
from jaxcoder.models.protocol import Model
from jaxcoder.protocols import MetricWriter
from jaxcoder.record.console import TrainingProgress, clear_live_line
from jaxcoder.record.event_log import EventLog, Spent, new_attempt
from jaxcoder.record.metrics import JsonlWriter, MultiWriter, TensorBoardWriter
from jaxcoder.runtime import (
    CommonStop,
    GracefulStop,
    Peers,
    Watchdog,
    held_alone,
    on_signal,
    out_of_memory_explained,
    process_started,
    resume_command,
    share_cache,
)
from jaxcoder.runtime.watchdog import DATA, STEP
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.train import host_check
from jaxcoder.train.alarm_hooks import Watch
from jaxcoder.train.batch_statistics import fim_shares, text_bytes
from jaxcoder.train.evaluate import HeldOut
from jaxcoder.train.inputs import host_share, open_streams, placed_ahead
from jaxcoder.train.memory_estimate import saved_bytes
from jaxcoder.train.profile import Profiler, ProfileSteps
from jaxcoder.train.restore import OpenWeights, open_own_weights, restore_or_begin, starting_weights
from jaxcoder.train.run_directory import RunDirectory
from jaxcoder.train.run_end import endings_told
from jaxcoder.train.state import TrainState, flatten_state
from jaxcoder.train.step import make_train_step
from jaxcoder.train.step_log import StepLog

Evaluation = Callable[[Model], Mapping[str, float]]
"""Something else to measure on the weights at the cadence of the held-out loss, such as infilling; its metrics by name
("eval/..."). Called in every process, with the mesh in scope."""

AlterBatch = Callable[[int, Batch], Batch]
"""(step, this process's share of its batch) -> what is trained on instead."""

logger = logging.getLogger(__name__)

_HOSTS_EVERY = 30.0  # seconds between two records of the slowest host


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a finished run left things."""

    directory: RunDirectory
    step: int
    eval_metrics: dict[str, float]
    """Of the last step (`HeldOut`, and every `Evaluation`); empty without a held-out store."""
    late_stop: int
    """Exit code of a SIGTERM or Ctrl-C that came after the last step, for whoever has more to do; else 0."""

    def raise_late_stop(self) -> None:
        """For a recipe that has a report to make: Interrupted if a stop was asked for after the last step."""
        if self.late_stop:
            raise Interrupted(
                "stopped; the training is finished and saved, its report is not.",
                exit_code=self.late_stop,
                resume_command=resume_command(),
            )


def train(
    config: RunConfig,
    *,
    accept_config_change: bool = False,
    directory_is_shared: bool = False,
    open_weights: OpenWeights = open_own_weights,
    evaluations: Sequence[Evaluation] = (),
    profile_steps: ProfileSteps | None = None,
    alter_batch: AlterBatch | None = None,
) -> TrainResult:
    """Trains to `config.num_steps`, continuing from the newest good checkpoint in the run's directory.

    directory_is_shared: the run's directory may hold other things too (a recipe's).
    open_weights: opens `config.init_from`.
    alter_batch: changes batches before they are used, for drills.
    Raises ConfigError and DataError before anything is computed; Interrupted, after saving, on SIGTERM or Ctrl-C;
    TrainingError when too many steps in a row are not finite; LostProcessError when another process is gone.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(clear_live_line)
        peers = stack.enter_context(Peers())
        host_check.check_configuration(config, peers, lambda: _check(config, profile_steps))
        config = dataclasses.replace(config, mesh=resolve_mesh(config.mesh, len(jax.devices())))
        mesh = make_mesh(config.mesh)
        stream, held_out_streams, tokenizer = open_streams(config)
        host_check.check_data(stream, held_out_streams, peers)
        directory = RunDirectory.of(config)
        weights = starting_weights(config, tokenizer, directory.checkpoints, open_weights)

        def claim(_: object) -> None:
            directory.claim(config, accept_config_change=accept_config_change, is_shared=directory_is_shared)
            host_check.check_disk(directory.path, saved_bytes(config))
            stack.enter_context(held_alone(directory.path))

        peers.agree("claim", None, claim)  # process 0 alone touches the directory
        if peers.count > 1:
            share_cache(directory.compiled)
        attempt = peers.agree("attempt", new_attempt(), lambda ids: ids[0])
        events = stack.enter_context(
            contextlib.closing(EventLog(directory.events_file, attempt=attempt, is_writing=peers.index == 0))
        )
        spent = Spent(events, process_started())
        began(events, mesh, peers)
        stop = stack.enter_context(GracefulStop())
        watchdog = stack.enter_context(
            Watchdog(
                peers,
                config.watchdog,
                stacks=lambda step: directory.stacks_file(step, peers.index),
                on_end=lambda message, step: events.say_end(step, "watchdog", message, process=peers.index),
            )
        )
        ending = stack.enter_context(endings_told(events, spent, peers, watchdog))
        common_stop = CommonStop(stop, peers)
        stack.enter_context(out_of_memory_explained(config))
        stack.enter_context(jax.set_mesh(mesh))
        host_check.check_clocks(peers)
        host_check.check_devices(mesh)
        save_tokenizer = tokenizer.save if tokenizer else None
        checkpointer = stack.enter_context(
            Checkpointer(directory.checkpoints, config.checkpoint, run=config, save_tokenizer=save_tokenizer)
        )
        logger.info(describe(config, mesh))
        with spent.on("restore"):
            state, step, samples = restore_or_begin(config, mesh, checkpointer, weights, tokenizer)
        ending.step = step
        if step:
            logger.info(f"Continuing after step {step:,}.")
        writer = stack.enter_context(contextlib.closing(open_writers(config, directory, step)))
        if peers.index == 0:
            directory.adopt(config)
        events.write("ready", step=step, samples=samples)
        watch = Watch(config, stream, directory, writer, step=step, samples=samples)
        schedule = BatchSchedule.of(config.global_batch_size, config.data, batch=step, sample=samples)
        profiler = Profiler(
            profile_steps,
            directory.profile,
            lambda first, last: events.write("profile", first=first, last=last, directory=directory.profile),
        )
        run = Run(
            config=config,
            state=state,
            step=step,
            samples=samples,
            batches=stack.enter_context(open_batches(config, stream, mesh, step, samples, alter_batch)),
            train_steps={size: make_train_step(sized(config, size)) for size in schedule.batch_sizes},
            tokenizer=tokenizer,
            token_bytes=stream.token_bytes,
            log=StepLog(config, writer, TrainingProgress(config.num_steps), watch),
            held_out=HeldOut(config, held_out_streams, mesh) if held_out_streams else None,
            evaluations=evaluations,
            writer=writer,
            watch=watch,
            checkpointer=checkpointer,
            profiler=stack.enter_context(profiler),
            peers=peers,
            watchdog=watchdog,
            events=events,
            spent=spent,
        )
        stack.enter_context(on_signal(signal.SIGUSR1, profiler.request))
        while run.step < config.num_steps:
            ending.step = run.step
            if common_stop.is_now(run.step):
                run.save()
                run.wait_for_save()
                raise Interrupted(
                    f"stopped after step {run.step:,}, which is saved in `{directory.checkpoints}`.",
                    exit_code=common_stop.exit_code,
                    resume_command=resume_command(),
                )
            run.take_step()
            is_last = run.step == config.num_steps
            if is_last or run.step % config.eval.every_steps == 0:
                run.evaluate()
            if is_last or checkpointer.is_due(run.step):
                run.save()
        ending.step = run.step
        if not run.eval_metrics:  # the run was complete already
            run.eval_metrics = run.measure()
        run.wait_for_save()
        return TrainResult(directory=directory, step=run.step, eval_metrics=run.eval_metrics, late_stop=stop.exit_code)


def _check(config: RunConfig, profile_steps: ProfileSteps | None) -> None:
    validate(config, len(jax.devices()))
    if profile_steps is not None and profile_steps.first > config.num_steps:
        raise ConfigError(
            f"--profile-steps begins at step {profile_steps.first:,}, but the run has {config.num_steps:,}: give earlier "
            "ones."
        )


def began(events: EventLog, mesh: Mesh, peers: Peers) -> None:
    """The first event of this start of the run's processes."""
    events.write(
        "begin",
        process_started=process_started(),
        processes=peers.count,
        devices=mesh.size,
        device_kind=mesh.devices.flat[0].device_kind,
        hosts=peers.hosts,
        mesh=dict(mesh.shape),
        version=jaxcoder.__version__,
        code=host_check.source_hash(),
        jax=jax.__version__,
        command=resume_command(),
    )


@dataclass(kw_only=True)
class Run:
    """Where a run stands, and what it does at a step."""

    config: RunConfig
    state: TrainState
    step: int
    samples: int
    batches: Iterator[tuple[Batch, Batch]]
    """(on the host, on the devices)"""
    train_steps: dict[int, Callable]
    """The jitted step for each batch size."""
    tokenizer: Tokenizer | None
    token_bytes: jax.typing.ArrayLike | None
    log: StepLog
    held_out: HeldOut | None
    evaluations: Sequence[Evaluation]
    writer: MetricWriter
    watch: Watch
    checkpointer: Checkpointer
    profiler: Profiler
    peers: Peers
    watchdog: Watchdog
    events: EventLog
    spent: Spent
    eval_metrics: dict[str, float] = field(default_factory=dict)
    _compiled: set[int] = field(default_factory=set)
    _hosts_due: float = field(default_factory=lambda: time.monotonic() + _HOSTS_EVERY)

    def take_step(self) -> None:
        """The next batch, one update; while that runs, the metrics of the step before are written."""
        number, asked, blocked = self.step + 1, time.monotonic(), self.log.blocked
        self.profiler.before(number)
        self.watchdog.enter(DATA, number)
        with self.spent.on("data_wait"):
            batch, device_batch = next(self.batches)
        waited = time.monotonic() - asked
        size = len(device_batch.inputs)
        is_first = size not in self._compiled
        self.watchdog.enter("start" if is_first else STEP, number)
        with self.spent.on("compile" if is_first else "step"):
            own_bytes = text_bytes(batch, self.token_bytes)
            # The other processes' rows are of the same mixture: their bytes are estimated by this one's, exact for one.
            whole_bytes = None if own_bytes is None else own_bytes * (size // len(batch.inputs))
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                self.state, metrics = self.train_steps[size](self.state, device_batch)
            self.step, self.samples = number, self.samples + size
            self.log.record(
                number,
                metrics,
                samples=self.samples,
                batch_size=size,
                text_bytes=whole_bytes,
                data_wait=waited,
                counts=fim_shares(batch, self.tokenizer),
            )
            if is_first:
                self.log.flush()  # so that what it took is not taken for a step's
                self._compiled.add(size)
            self.profiler.after(number, self.log.flush)
        if not is_first:
            self.watchdog.worked(time.monotonic() - asked - (self.log.blocked - blocked))
        self.checkpointer.poll()
        self.report()

    def report(self) -> None:
        """What became of saves, where the time went, which host is slowest."""
        for saved in self.checkpointer.take_finished():
            self.events.write(
                "saved", step=saved.step, blocked=saved.blocked, seconds=saved.seconds, bytes=saved.num_bytes
            )
        self.spent.write(self.step)
        if time.monotonic() > self._hosts_due and (work := self.watchdog.host_work()) is not None:
            self._hosts_due = time.monotonic() + _HOSTS_EVERY
            self.writer.write(
                self.step,
                {
                    "hosts/slowest": work.slowest,
                    "hosts/slowest_name": self.peers.hosts[work.slowest],
                    "hosts/slowest_seconds": work.seconds,
                    "hosts/median_seconds": work.median,
                    "hosts/count": work.count,
                },
            )

    def evaluate(self) -> None:
        """`measure`, written, said and watched."""
        if self.held_out is None and not self.evaluations:
            return
        self.log.flush()
        began = time.monotonic()
        self.eval_metrics = metrics = self.measure()
        self.writer.write(self.step, metrics | {"eval_seconds": time.monotonic() - began})
        logger.info(f"step {self.step:,}: {said(metrics)}")
        self.watch(self.step, metrics)
        self.log.pause()
        self.spent.write(self.step, now=True)

    def measure(self) -> dict[str, float]:
        """Held-out loss and everything else that is to be measured on these weights, without dropout."""
        self.watchdog.enter("evaluate", self.step)
        with self.spent.on("evaluate"):
            metrics = {} if self.held_out is None else self.held_out(self.state.model)
            for evaluation in self.evaluations:
                metrics |= evaluation(self.state.model)
        return metrics

    def save(self) -> None:
        """Starts a checkpoint of this step, which is finished in the background."""
        self.log.flush()
        self.watchdog.enter("save", self.step)
        began = time.monotonic()
        with self.spent.on("save"):
            is_saving = self.checkpointer.save(
                self.step, flatten_state(self.state), {"samples": self.samples}, force=True
            )
        if is_saving:
            self.writer.write(self.step, {"checkpoint_seconds": time.monotonic() - began})
        self.log.pause()
        self.spent.write(self.step, now=True)

    def wait_for_save(self) -> None:
        """Returns when the last save is whole."""
        self.watchdog.enter("save", self.step)
        with self.spent.on("save"):
            self.checkpointer.wait()
        self.report()


@contextlib.contextmanager
def open_batches(
    config: RunConfig,
    stream: WindowStream,
    mesh: Mesh,
    step: int,
    samples: int,
    alter_batch: AlterBatch | None,
) -> Iterator[Iterator[tuple[Batch, Batch]]]:
    """The batches from `samples` to the end of the run, (on the host, on the devices); the latter two ahead."""
    index, count = host_share(mesh)
    with batches(
        stream,
        global_batch_size=config.global_batch_size,
        stages=config.data.stages,
        first_sample=samples,
        process_index=index,
        process_count=count,
    ) as source:
        source = itertools.islice(source, config.num_steps - step)
        if alter_batch is not None:
            source = map(alter_batch, itertools.count(step + 1), source)
        with placed_ahead(source, mesh) as placed:
            yield placed


def sized(config: RunConfig, global_batch_size: int) -> RunConfig:
    """The config of the steps with this batch size."""
    return dataclasses.replace(config, global_batch_size=global_batch_size)


def open_writers(config: RunConfig, directory: RunDirectory, step: int) -> MetricWriter:
    """metrics.jsonl, and TensorBoard when asked for, by process 0; lines after `step` will be written again."""
    if jax.process_index():
        return MultiWriter([])
    writers: list[MetricWriter] = [JsonlWriter(directory.metrics_file, resume_from_step=step)]
    if config.tensorboard:
        writers.append(TensorBoardWriter(directory.tensorboard, resume_from_step=step))
    return MultiWriter(writers)


def describe(config: RunConfig, mesh: Mesh) -> str:
    """One line: what is trained, on what, laid out how."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = f"{plural(mesh.size, f'{mesh.devices.flat[0].device_kind} device')}"
    tokens = config.global_batch_size * config.model.max_seq_len
    return (
        f"Training {config.name}: {num_parameters(config.model):,} parameters, {tokens:,} tokens a step, "
        f"{config.num_steps:,} steps, on {devices} as a mesh of {axes}."
    )


def said(metrics: Mapping[str, float]) -> str:
    """The gist of an evaluation, in a line."""
    parts = []
    if "eval/loss" in metrics:
        parts.append(f"held-out loss {metrics['eval/loss']:.4f}, {metrics['eval/bits_per_byte']:.4f} bits per byte")
    if "eval/infill/exact_match" in metrics:
        exact, similar = metrics["eval/infill/exact_match"], metrics["eval/infill/edit_similarity"]
        parts.append(f"infilled lines exact {exact:.1%}, edit similarity {similar:.3f}")
    return "; ".join(parts) or "evaluated"
