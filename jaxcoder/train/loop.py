"""The training loop: claim the run's directory, restore or initialise, then step until done or asked to stop.

One step: take the next batch (already on the devices) -> dispatch the jitted step -> read the metrics of the step
before -> evaluate and save when due -> leave when a signal came. `step` counts completed optimizer steps, `samples` the
windows that they consumed: the whole position in the data.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.config import RunConfig
from jaxcoder.config.validate import resolve_mesh, validate
from jaxcoder.data.loader import batches
from jaxcoder.data.schedule import BatchSchedule
from jaxcoder.errors import CheckpointError, Interrupted
from jaxcoder.models.flops import num_parameters
from jaxcoder.observability.console import TrainingLine
from jaxcoder.observability.metrics import JsonlWriter, MultiWriter, TensorBoardWriter
from jaxcoder.protocols import MetricWriter
from jaxcoder.runtime import GracefulStop, held_alone, out_of_memory_explained, resume_command
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.train.begin import (
    OpenWeights,
    StartingWeights,
    begin,
    check_tokenizer,
    open_own_weights,
    starting_weights,
    tokenizer_beside,
)
from jaxcoder.train.evaluate import HeldOut
from jaxcoder.train.inputs import host_share, open_streams, placed_ahead, text_bytes
from jaxcoder.train.run_directory import RunDirectory
from jaxcoder.train.spikes import SpikeReport
from jaxcoder.train.state import TrainState, abstract_state, flatten_state, initial_state, unflatten_state
from jaxcoder.train.step import make_train_step
from jaxcoder.train.step_log import StepLog


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a finished run left things."""

    directory: RunDirectory
    step: int
    eval_metrics: dict[str, float]
    """eval_loss, eval_bits_per_byte, eval_tokens after the last step; empty without a held-out store."""
    late_stop: int
    """Exit code of a SIGTERM or Ctrl-C that came after the last step, for whoever has more to do; else 0."""


def train(
    config: RunConfig,
    *,
    accept_config_change: bool = False,
    directory_is_shared: bool = False,
    open_weights: OpenWeights = open_own_weights,
) -> TrainResult:
    """Trains to `config.num_steps`, continuing from the newest good checkpoint in the run's directory.

    directory_is_shared: the run's directory may hold other things too (a recipe's).
    open_weights: opens `config.init_from`.
    Raises ConfigError and DataError before anything is computed; Interrupted, after saving, on SIGTERM or Ctrl-C.
    """
    validate(config, len(jax.devices()))
    config = dataclasses.replace(config, mesh=resolve_mesh(config.mesh, len(jax.devices())))
    mesh = make_mesh(config.mesh)
    stream, eval_stream, tokenizer = open_streams(config)
    directory = RunDirectory.of(config)
    weights = starting_weights(config, tokenizer, directory.checkpoints, open_weights)
    directory.claim(config, accept_config_change=accept_config_change, is_shared=directory_is_shared)

    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(held_alone(directory.path))
        line = stack.enter_context(TrainingLine(config.num_steps))
        stop = stack.enter_context(GracefulStop())
        stack.enter_context(out_of_memory_explained(config))
        stack.enter_context(jax.set_mesh(mesh))
        checkpointer = stack.enter_context(
            Checkpointer(
                directory.checkpoints,
                config.checkpoint,
                run=config,
                save_tokenizer=tokenizer.save if tokenizer else None,
                warn=line.say,
            )
        )
        line.say(describe(config, mesh))

        state, step, samples = restore_or_initialise(config, mesh, checkpointer, weights, tokenizer)
        writer = stack.enter_context(contextlib.closing(open_writers(config, directory, step)))
        directory.adopt(config)
        spikes = SpikeReport(config, stream, line.say, directory=directory.path, step=step, samples=samples)
        log = StepLog(config, writer, line, on_loss=spikes)
        held_out = HeldOut(config, eval_stream, mesh) if eval_stream else None
        eval_metrics: dict[str, float] = {}
        schedule = BatchSchedule.of(config.global_batch_size, config.data, batch=step, sample=samples)
        train_steps = {size: make_train_step(sized(config, size)) for size in schedule.batch_sizes}
        process_index, process_count = host_share(mesh)
        source = stack.enter_context(
            batches(
                stream,
                global_batch_size=config.global_batch_size,
                stages=config.data.stages,
                first_sample=samples,
                process_index=process_index,
                process_count=process_count,
            )
        )
        placed = stack.enter_context(placed_ahead(itertools.islice(source, config.num_steps - step), mesh))
        if step:
            line.say(f"Continuing after step {step:,}.")

        def save() -> None:
            checkpointer.save(step, flatten_state(state), {"samples": samples}, force=True)
            log.pause()

        while step < config.num_steps:
            if stop.requested is not None:
                log.flush()
                save()
                checkpointer.wait()
                raise Interrupted(
                    f"stopped after step {step:,}, which is saved in `{directory.checkpoints}`.",
                    exit_code=stop.exit_code,
                    resume_command=resume_command(),
                )
            asked = time.monotonic()
            batch, device_batch = next(placed)
            waited = time.monotonic() - asked
            size = len(device_batch.inputs)
            state, metrics = train_steps[size](state, device_batch)
            step, samples = step + 1, samples + size
            log.record(
                step, metrics, samples=samples, text_bytes=text_bytes(batch, stream.token_bytes), data_wait=waited
            )
            checkpointer.poll()

            is_last = step == config.num_steps
            if held_out and (is_last or step % config.eval.every_steps == 0):
                log.flush()
                eval_metrics = held_out(state.model)
                writer.write(step, eval_metrics)
                line.say(
                    f"step {step:,}: held-out loss {eval_metrics['eval_loss']:.4f}, "
                    f"{eval_metrics['eval_bits_per_byte']:.4f} bits per byte"
                )
                log.pause()
            if is_last or checkpointer.is_due(step):
                save()
        log.flush()
        checkpointer.wait()
        if held_out and not eval_metrics:  # The run was complete already.
            eval_metrics = held_out(state.model)
        return TrainResult(directory=directory, step=step, eval_metrics=eval_metrics, late_stop=stop.exit_code)


def restore_or_initialise(
    config: RunConfig,
    mesh: Mesh,
    checkpointer: Checkpointer,
    weights: StartingWeights | None,
    tokenizer: Tokenizer | None,
) -> tuple[TrainState, int, int]:
    """The newest good checkpoint on this mesh, whatever mesh wrote it, or the weights that the run begins with, or
    random ones; its step and samples."""
    step = checkpointer.latest_step()
    if step is None and weights is not None:
        return begin(config, weights), 0, 0
    if step is None and config.init_from:
        raise CheckpointError(
            f"no checkpoint in `{checkpointer.directory}` is whole, so the run cannot go on: delete that directory to "
            f"begin again with the weights of `{config.init_from}`."
        )
    if step is None:
        return jax.jit(lambda: initial_state(config))(), 0, 0
    saved = checkpointer.directory / str(step)
    check_tokenizer(str(saved), tokenizer_beside(saved), tokenizer)
    abstract = abstract_state(config, mesh)
    samples = checkpointer.manifest(step).metadata["samples"]
    return unflatten_state(abstract, checkpointer.restore(step, flatten_state(abstract))), step, samples


def sized(config: RunConfig, global_batch_size: int) -> RunConfig:
    """The config of the steps with this batch size."""
    return dataclasses.replace(config, global_batch_size=global_batch_size)


def open_writers(config: RunConfig, directory: RunDirectory, step: int) -> MetricWriter:
    """metrics.jsonl, and TensorBoard when asked for; lines after `step` belong to steps that will be done again."""
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
