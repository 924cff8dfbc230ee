"""The training loop: claim the run's directory, restore or begin, then step until done or asked to stop.

One step: take the next batch (already on the devices) -> dispatch the jitted step -> read the metrics of the step
before -> evaluate and save when due -> leave when a signal came. `step` counts completed optimizer steps, `samples` the
windows that they consumed: the whole position in the data.
"""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.config import RunConfig
from jaxcoder.config.validate import resolve_mesh, validate
from jaxcoder.data.loader import Batch, batches
from jaxcoder.data.schedule import BatchSchedule
from jaxcoder.data.stream import WindowStream
from jaxcoder.errors import ConfigError, Interrupted
from jaxcoder.models.flops import num_parameters
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.observability.console import TrainingLine
from jaxcoder.observability.metrics import JsonlWriter, MultiWriter, TensorBoardWriter
from jaxcoder.protocols import MetricWriter
from jaxcoder.runtime import CommonStop, GracefulStop, held_alone, out_of_memory_explained, resume_command
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.train.begin import OpenWeights, open_own_weights, restore_or_begin, starting_weights
from jaxcoder.train.evaluate import HeldOut
from jaxcoder.train.inputs import host_share, open_streams, placed_ahead, text_bytes
from jaxcoder.train.profile import Profiler, ProfileSteps
from jaxcoder.train.run_directory import RunDirectory
from jaxcoder.train.state import TrainState, flatten_state
from jaxcoder.train.step import make_train_step
from jaxcoder.train.step_log import StepLog
from jaxcoder.train.watch import Watch

Evaluation = Callable[[GPTBigCode], Mapping[str, float]]
"""Something else to measure on the weights at the cadence of the held-out loss, such as infilling; its metrics by name
("eval/..."). Called in every process, with the mesh in scope."""


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
) -> TrainResult:
    """Trains to `config.num_steps`, continuing from the newest good checkpoint in the run's directory.

    directory_is_shared: the run's directory may hold other things too (a recipe's).
    open_weights: opens `config.init_from`.
    Raises ConfigError and DataError before anything is computed; Interrupted, after saving, on SIGTERM or Ctrl-C;
    TrainingError when too many steps in a row are not finite.
    """
    validate(config, len(jax.devices()))
    if profile_steps is not None and profile_steps.first > config.num_steps:
        raise ConfigError(
            f"--profile-steps begins at step {profile_steps.first:,}, but the run has {config.num_steps:,}: give earlier "
            "ones."
        )
    config = dataclasses.replace(config, mesh=resolve_mesh(config.mesh, len(jax.devices())))
    mesh = make_mesh(config.mesh)
    stream, held_out_streams, tokenizer = open_streams(config)
    directory = RunDirectory.of(config)
    weights = starting_weights(config, tokenizer, directory.checkpoints, open_weights)
    directory.claim(config, accept_config_change=accept_config_change, is_shared=directory_is_shared)

    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(held_alone(directory.path))
        # One process reports.
        silent = stack.enter_context(open(os.devnull, "w")) if jax.process_index() else None
        line = stack.enter_context(TrainingLine(config.num_steps, stream=silent))
        stop = stack.enter_context(GracefulStop())
        common_stop = CommonStop(stop)
        stack.enter_context(out_of_memory_explained(config))
        stack.enter_context(jax.set_mesh(mesh))
        save_tokenizer = tokenizer.save if tokenizer else None
        checkpointer = stack.enter_context(
            Checkpointer(
                directory.checkpoints, config.checkpoint, run=config, save_tokenizer=save_tokenizer, warn=line.say
            )
        )
        line.say(describe(config, mesh))
        state, step, samples = restore_or_begin(config, mesh, checkpointer, weights, tokenizer)
        if step:
            line.say(f"Continuing after step {step:,}.")
        writer = stack.enter_context(contextlib.closing(open_writers(config, directory, step)))
        directory.adopt(config)
        watch = Watch(config, stream, directory, writer, line.say, step=step, samples=samples)
        schedule = BatchSchedule.of(config.global_batch_size, config.data, batch=step, sample=samples)
        run = Run(
            config=config,
            state=state,
            step=step,
            samples=samples,
            batches=stack.enter_context(open_batches(config, stream, mesh, step, samples)),
            train_steps={size: make_train_step(sized(config, size)) for size in schedule.batch_sizes},
            token_bytes=stream.token_bytes,
            log=StepLog(config, writer, line, watch),
            held_out=HeldOut(config, held_out_streams, mesh) if held_out_streams else None,
            evaluations=evaluations,
            writer=writer,
            watch=watch,
            line=line,
            checkpointer=checkpointer,
            profiler=stack.enter_context(Profiler(profile_steps, directory.profile, line.say)),
        )
        while run.step < config.num_steps:
            if common_stop.is_now(run.step):
                run.save()
                checkpointer.wait()
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
        if not run.eval_metrics:  # the run was complete already
            run.eval_metrics = run.measure()
        checkpointer.wait()
        return TrainResult(
            directory=directory, step=run.step, eval_metrics=run.eval_metrics, late_stop=stop.exit_code
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
    token_bytes: jax.typing.ArrayLike | None
    log: StepLog
    held_out: HeldOut | None
    evaluations: Sequence[Evaluation]
    writer: MetricWriter
    watch: Watch
    line: TrainingLine
    checkpointer: Checkpointer
    profiler: Profiler
    eval_metrics: dict[str, float] = field(default_factory=dict)

    def take_step(self) -> None:
        """The next batch, one update; while that runs, the metrics of the step before are written."""
        self.profiler.before(self.step + 1)
        asked = time.monotonic()
        batch, device_batch = next(self.batches)
        waited = time.monotonic() - asked
        size = len(device_batch.inputs)
        own_bytes = text_bytes(batch, self.token_bytes)
        # The other processes' rows are of the same mixture: their bytes are estimated by this one's, exact for one process.
        whole_bytes = None if own_bytes is None else own_bytes * (size // len(batch.inputs))
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, metrics = self.train_steps[size](self.state, device_batch)
        self.step, self.samples = self.step + 1, self.samples + size
        self.log.record(
            self.step,
            metrics,
            samples=self.samples,
            batch_size=size,
            text_bytes=whole_bytes,
            data_wait=waited,
        )
        self.profiler.after(self.step, self.log.flush)
        self.checkpointer.poll()

    def evaluate(self) -> None:
        """`measure`, written, said and watched."""
        if self.held_out is None and not self.evaluations:
            return
        self.log.flush()
        began = time.monotonic()
        self.eval_metrics = metrics = self.measure()
        self.writer.write(self.step, metrics | {"eval_seconds": time.monotonic() - began})
        self.line.say(f"step {self.step:,}: {said(metrics)}")
        self.watch(self.step, metrics)
        self.log.pause()

    def measure(self) -> dict[str, float]:
        """Held-out loss and everything else that is to be measured on these weights, without dropout."""
        metrics = {} if self.held_out is None else self.held_out(self.state.model)
        for evaluation in self.evaluations:
            metrics |= evaluation(self.state.model)
        return metrics

    def save(self) -> None:
        """Starts a checkpoint of this step, which is finished in the background."""
        self.log.flush()
        began = time.monotonic()
        if self.checkpointer.save(self.step, flatten_state(self.state), {"samples": self.samples}, force=True):
            self.writer.write(self.step, {"checkpoint_seconds": time.monotonic() - began})
        self.log.pause()


@contextlib.contextmanager
def open_batches(
    config: RunConfig, stream: WindowStream, mesh: Mesh, step: int, samples: int
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
        with placed_ahead(itertools.islice(source, config.num_steps - step), mesh) as placed:
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
    devices = f"{mesh.size} {mesh.devices.flat[0].device_kind} device{'s' if mesh.size > 1 else ''}"
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
