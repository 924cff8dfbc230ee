"""The training loop.

One step: take the next batch, already on the devices -> dispatch the jitted step -> write the metrics of the step
before -> save and evaluate when due -> stop after a signal. `step` counts completed optimizer steps, `samples` the
windows that they consumed, which is the complete position in the data.

Saving comes before evaluating, so that an evaluation that fails loses nothing. A run that was stopped between the two
evaluates that step again when it continues.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import jax

from jaxcoder.config import RunConfig
from jaxcoder.errors import CheckpointError, Interrupted, JaxcoderError, LostProcessError, TransientError
from jaxcoder.io.os_errors import is_access_error, is_disk_full
from jaxcoder.models.protocol import Model
from jaxcoder.runtime import resume_command
from jaxcoder.runtime.signals import Poll, StopRequested
from jaxcoder.runtime.watchdog import DATA, STEP
from jaxcoder.train.batch_statistics import fim_shares, text_bytes
from jaxcoder.train.profile import ProfileSteps
from jaxcoder.train.restore import OpenWeights, open_checkpoint_weights
from jaxcoder.train.run_directory import RunDirectory
from jaxcoder.train.session import AlterBatch, TrainSession
from jaxcoder.train.state import flatten_state
from jaxcoder.train.step import make_train_step

Evaluation = Callable[[Model, Poll], Mapping[str, float]]
"""A further evaluation at the cadence of the held-out loss, such as infilling: (weights, poll) -> metrics ("eval/...").
Called in every process, with the mesh in scope; it calls `poll` between its batches."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a finished run."""

    directory: RunDirectory
    first_step: int
    """The step it continued after; equal to `step` if the run was complete before."""
    step: int
    eval_metrics: dict[str, float]
    """Metrics of the last step (`HeldOut` and every `Evaluation`); empty without a held-out store."""
    late_stop: int
    """Exit code of a SIGTERM or Ctrl-C received after the last step, for callers with more stages; else 0."""

    def raise_late_stop(self) -> None:
        """Raises Interrupted if a stop was requested after the last step; for recipes with stages after training."""
        if self.late_stop:
            raise Interrupted(
                "stopped: the training is finished and saved, its report is not.",
                exit_code=self.late_stop,
                resume_command=resume_command(),
            )


def train(
    config: RunConfig,
    *,
    accept_config_change: bool = False,
    directory_is_shared: bool = False,
    open_weights: OpenWeights = open_checkpoint_weights,
    evaluations: Sequence[Evaluation] = (),
    profile_steps: ProfileSteps | None = None,
    alter_batch: AlterBatch | None = None,
) -> TrainResult:
    """Trains to `config.num_steps`, continuing from the newest complete checkpoint in the run's directory.

    directory_is_shared: the run's directory may hold other files too (a recipe's).
    open_weights: opens `config.init_from`.
    alter_batch: changes batches before they are used, for drills.
    Raises ConfigError and DataError before anything is computed; Interrupted, after saving, on SIGTERM or Ctrl-C;
    TransientError, after saving, if a file system or object store fails during the run; TrainingError when too many
    steps in a row are not finite; LostProcessError when another process has ended.
    """
    session = TrainSession(
        config,
        accept_config_change=accept_config_change,
        directory_is_shared=directory_is_shared,
        open_weights=open_weights,
        profile_steps=profile_steps,
        alter_batch=alter_batch,
    )
    with session, save_on_failure(session):
        train_steps: dict[int, Callable] = {}
        first_step = session.step
        eval_metrics: dict[str, float] = {}
        if session.step and is_evaluation_due(session) and not (eval_metrics := session.saved_evaluation()):
            eval_metrics = evaluate(session, evaluations)
        while session.step < config.num_steps:
            if session.stop.is_due(session.step):
                stop(session)
            take_step(session, train_steps)
            if session.step == config.num_steps or session.checkpointer.is_due(session.step):
                save(session)
            if is_evaluation_due(session):
                eval_metrics = evaluate(session, evaluations)
        if session.stop.interrupted_work:
            stop(session)
        wait_for_save(session)
        return TrainResult(
            directory=session.directory,
            first_step=first_step,
            step=session.step,
            eval_metrics=eval_metrics,
            late_stop=session.stop_signal.exit_code,
        )


def stop(session: TrainSession) -> NoReturn:
    """Saves and raises Interrupted."""
    save(session)
    wait_for_save(session)
    raise Interrupted(
        f"stopped after step {session.step:,}, which is saved in `{session.directory.checkpoints}`.",
        exit_code=session.stop.exit_code,
        resume_command=resume_command(),
    )


@contextlib.contextmanager
def save_on_failure(session: TrainSession) -> Iterator[None]:
    """Saves the last completed step if a file system or object store fails inside the block, and raises TransientError
    for failures that may pass.

    With several processes nothing is saved: the others are already computing the next step, whose input is donated.
    """
    try:
        yield
    except Exception as error:
        if not (is_access_error(error) or isinstance(error, CheckpointError)):
            raise
        saved = ""
        if session.group.count == 1 and not isinstance(error, CheckpointError):
            if not session.directory.recreate(session.config, session.data):
                raise JaxcoderError(
                    f"the output directory `{session.directory.path}` was replaced by another one during the run: "
                    f"nothing is saved into it after step {session.step:,}."
                ) from error
            try:
                start_checkpoint(session)
                session.checkpointer.wait()
                saved = f" Step {session.step:,} is saved."
            except CheckpointError as failed:
                saved = f" Step {session.step:,} could not be saved: {failed}"
        if is_disk_full(error):
            raise
        raise TransientError(f"{str(error).rstrip('.')}.{saved} The same command continues the run.") from error


def is_evaluation_due(session: TrainSession) -> bool:
    """Whether the present step is evaluated: at the cadence of the config, and at the end."""
    return session.step == session.config.num_steps or session.step % session.config.eval.every_steps == 0


def take_step(session: TrainSession, train_steps: dict[int, Callable]) -> None:
    """One update. While the devices compute it, the metrics of the step before are written.

    train_steps: the jitted step of each batch size, filled as sizes come up.
    """
    step, started, log = session.step + 1, time.monotonic(), session.log
    blocked = log.blocked
    session.profiler.before(step)
    session.watchdog.enter(DATA, step)
    with session.timer.measure("data_wait"):
        batch, device_batch = next(session.batches)
    data_wait = time.monotonic() - started
    batch_size = len(device_batch.inputs)
    is_first = batch_size not in train_steps
    # The first call compiles, for minutes on a large model: the watchdog allows it the time of a start.
    session.watchdog.enter("start" if is_first else STEP, step)
    if is_first:
        sized = dataclasses.replace(session.config, global_batch_size=batch_size)
        train_steps[batch_size] = make_train_step(sized)
    with session.timer.measure("compile" if is_first else "step"):
        # The other processes' rows come from the same mixture: their bytes are estimated by this process's.
        num_bytes = text_bytes(batch, session.token_bytes)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            session.state, metrics = train_steps[batch_size](session.state, device_batch)
        session.step, session.samples = step, session.samples + batch_size
        log.record(
            step,
            metrics,
            samples=session.samples,
            batch_size=batch_size,
            text_bytes=None if num_bytes is None else num_bytes * (batch_size // len(batch.inputs)),
            data_wait=data_wait,
            counts=fim_shares(batch, session.tokenizer),
        )
        if is_first:
            log.flush()  # the time of compilation must not be recorded as a step's
        session.profiler.after(step, log.flush)
    if not is_first:
        session.watchdog.record_host_work(time.monotonic() - started - (log.blocked - blocked))
    session.checkpointer.poll()
    session.record_progress()


def evaluate(session: TrainSession, evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """The held-out loss and all further evaluations of the present weights, without dropout, written, logged and given
    to the alarm hooks.

    {} without evaluations, and after a stop was requested or an evaluation has failed. The failure is logged, or, if
    the config says so, raised after saving.
    """
    if session.held_out is None and not evaluations:
        return {}
    session.log.flush()
    session.watchdog.enter("evaluate", session.step)
    started, poll = time.monotonic(), session.stop.during(f"evaluate/{session.step}")
    metrics: dict[str, float] = {}
    try:
        with session.timer.measure("evaluate"):
            if session.held_out is not None:
                metrics |= session.held_out(session.state.model, poll)
            for evaluation in evaluations:
                metrics |= evaluation(session.state.model, poll)
    except StopRequested:
        logger.info(f"step {session.step:,}: the evaluation was interrupted; it is repeated when the run continues.")
        return {}
    except LostProcessError:
        raise
    except Exception as error:
        if not session.all_failed(f"evaluate/{session.step}"):
            raise
        if session.config.eval.stop_on_error:
            save(session)
            wait_for_save(session)
            raise
        message = f"{type(error).__name__}: {error}"
        session.events.write("evaluation_failed", step=session.step, message=message)
        logger.warning(f"step {session.step:,}: the evaluation failed, and the run continues: {message}")
        return {}
    finally:
        session.log.pause()  # the time until the next step is not a step time
    session.writer.write(session.step, metrics | {"eval_seconds": time.monotonic() - started})
    logger.info(f"step {session.step:,}: {summarize(metrics)}")
    session.alarm_hooks(session.step, metrics)
    session.timer.write(session.step, now=True)
    return metrics


def save(session: TrainSession) -> None:
    """Starts a checkpoint of this step, which is completed in the background."""
    session.log.flush()
    session.watchdog.enter("save", session.step)
    started = time.monotonic()
    with session.timer.measure("save"):
        is_saving = start_checkpoint(session)
    if is_saving:
        session.writer.write(session.step, {"checkpoint_seconds": time.monotonic() - started})
    session.log.pause()
    session.timer.write(session.step, now=True)


def start_checkpoint(session: TrainSession) -> bool:
    """Starts to save this step; whether it was not saved already."""
    return session.checkpointer.save(
        session.step, flatten_state(session.state), {"samples": session.samples}, force=True
    )


def wait_for_save(session: TrainSession) -> None:
    """Returns when the last save is committed."""
    session.watchdog.enter("save", session.step)
    with session.timer.measure("save"):
        session.checkpointer.wait()
    session.record_progress()


def summarize(metrics: Mapping[str, float]) -> str:
    """The main metrics of an evaluation, in a line."""
    parts = []
    if "eval/loss" in metrics:
        parts.append(f"held-out loss {metrics['eval/loss']:.4f}, {metrics['eval/bits_per_byte']:.4f} bits per byte")
    if "eval/infill/exact_match" in metrics:
        exact, similar = metrics["eval/infill/exact_match"], metrics["eval/infill/edit_similarity"]
        parts.append(f"infilled lines exact {exact:.1%}, edit similarity {similar:.3f}")
    return "; ".join(parts) or "evaluated"
