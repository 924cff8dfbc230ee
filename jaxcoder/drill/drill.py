"""Fault injection into a training run of several processes: `jaxcoder drill`.

    DRILL/undisturbed/    the run without faults
    DRILL/disturbed/      the run with faults, on the same mesh: it must end with bit-identical weights
    DRILL/resized/        the run with faults that change the processes and the mesh: it must read the same batches, and
                          have the same losses within rounding
    DRILL/*-logs/         the log of every process of every start
    DRILL/drill.json      the report

After each fault the remaining processes must exit by themselves, and the same command must continue from the newest
complete checkpoint, which the drill determines independently.
"""

import logging
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxcoder.config import MeshConfig
from jaxcoder.drill.faults import TIMEOUT_SECONDS, InjectedFault, Scenario, choose_kinds, fault_kinds, is_required
from jaxcoder.drill.processes import (
    DrillError,
    RunFiles,
    Start,
    Trainer,
    continued_after,
    free_port,
    kill_all,
    wait_until,
)
from jaxcoder.drill.report import DrillReport, Outcome, Verdict, check_bad_batches, compare
from jaxcoder.drill.setup import SAVE_EVERY_STEPS, prepare
from jaxcoder.errors import ConfigError
from jaxcoder.formatting import format_duration

logger = logging.getLogger(__name__)

STEPS_PER_FAULT = 3 * SAVE_EVERY_STEPS
"""More steps than any fault waits for, so that the run does not finish before the last one."""
STARTS = 3


@dataclass(frozen=True, kw_only=True)
class FaultSchedule:
    """The faults of a drill, in order."""

    kinds: list[str]
    processes: int
    num_steps: int
    bad_batches: dict[int, str]
    """Step -> kind."""

    @classmethod
    def draw(cls, count: int, seed: int, *, only: Sequence[str] = (), processes: int = 2) -> "FaultSchedule":
        """`count` random faults. ConfigError for invalid numbers and unknown names."""
        if count < 1 or processes < 1:
            raise ConfigError(f"--faults is {count} and --processes {processes}: give 1 or more of each.")
        chosen = choose_kinds(count, only, processes, random.Random(seed))
        bad = [kind for kind in chosen if fault_kinds(processes)[kind].inject is None]
        num_steps = STEPS_PER_FAULT * (count - len(bad) + 2)
        # After the warm-up, and not in consecutive steps, which would be another fault.
        steps = random.Random(seed).sample(range(STEPS_PER_FAULT, num_steps - 1, 3), len(bad))
        return cls(
            kinds=chosen, processes=processes, num_steps=num_steps, bad_batches=dict(zip(steps, bad, strict=True))
        )


def drill(directory: Path, schedule: FaultSchedule, *, seed: int) -> DrillReport:
    """Runs the drill in `directory`, which must be empty or new, and returns its report. Leaves no process."""
    try:
        return _drill(directory, schedule, seed)
    finally:
        kill_all()


def _drill(directory: Path, schedule: FaultSchedule, seed: int) -> DrillReport:
    if directory.is_dir() and any(directory.iterdir()):
        raise ConfigError(f"`{directory}` is not empty: give a new --output-dir.")
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    started = time.monotonic()
    num_steps = schedule.num_steps
    logger.info(f"Drill: {len(schedule.kinds)} faults in a run of {num_steps} steps, seed {seed}, in {directory}")
    prepare(directory, num_steps, schedule.bad_batches)
    trainer = Trainer(directory=directory, port=free_port())
    undisturbed = RunFiles(directory / "undisturbed")
    seconds = finish_undisturbed(trainer, undisturbed, schedule.processes)
    logger.info(f"Undisturbed: {num_steps} steps in {format_duration(seconds)}")
    known = fault_kinds(schedule.processes)
    report = DrillReport(seed=seed, processes=schedule.processes, num_steps=num_steps)
    for name, is_elastic in (("disturbed", False), ("resized", True)):
        kinds = [kind for kind in schedule.kinds if known[kind].inject and known[kind].is_elastic == is_elastic]
        if not kinds and (is_elastic or not schedule.bad_batches):
            continue
        run = RunFiles(directory / name)
        DisturbedRun(trainer, run, schedule, random.Random(f"{seed} {name}"), report).inject_all(kinds)
        try:
            report.verdicts[name] = compare(run, undisturbed, is_elastic=is_elastic)
        except DrillError as error:
            report.verdicts[name] = Verdict(problems=[str(error)])
        logger.info(f"{name}: {report.verdicts[name]}")
    # Bad batches are the same in all runs; the first run is checked.
    first_run = RunFiles(directory / next(iter(report.verdicts)))
    report.outcomes += check_bad_batches(schedule.bad_batches, first_run, first=len(report.outcomes) + 1)
    report.seconds = time.monotonic() - started
    report.write(directory / "drill.json")
    return report


def clean_up(directory: Path) -> None:
    """Removes all but the report."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "drill.json":
            entry.unlink()


def finish_undisturbed(trainer: Trainer, run: RunFiles, processes: int) -> float:
    """Runs to the end and returns the seconds."""
    with trainer.start(run, MeshConfig(fsdp=processes)) as start:
        _wait_for_run_end(start, run)
        return time.monotonic() - start.started


def _wait_for_run_end(start: Start, run: RunFiles) -> None:
    """DrillError unless all processes finish. The timeout restarts with every new step."""
    step = -1
    while run.last_step() > step:
        step = run.last_step()
        if start.wait(TIMEOUT_SECONDS):
            break
    if set(start.codes()) != {0}:
        raise DrillError(f"the run did not finish, its exit codes are {start.codes()}: {start.log_ends()}")


class DisturbedRun:
    """One run with faults: a start, a fault, the next start, and so on, to the end of the run."""

    def __init__(
        self, trainer: Trainer, run: RunFiles, schedule: FaultSchedule, draw: random.Random, report: DrillReport
    ):
        self.trainer, self.run, self.schedule, self.draw, self.report = trainer, run, schedule, draw, report
        self.mesh = MeshConfig(fsdp=schedule.processes)
        self.start: Start

    def inject_all(self, kinds: Sequence[str]) -> None:
        """Problems are added to the report; a run that does not continue is abandoned."""
        outcome = None
        self.start = self.trainer.start(self.run, self.mesh)
        try:
            self._wait_for_training(0)
            for turn, kind in enumerate(kinds):
                outcome = Outcome(number=len(self.report.outcomes) + 1, kind=kind)
                self.report.outcomes.append(outcome)
                self._restart(outcome, expected=self._inject(outcome, turn))
                outcome.lost = outcome.step - outcome.continued
                logger.info(f"{outcome.number:>3} of {len(self.schedule.kinds)}  {outcome}")
            _wait_for_run_end(self.start, self.run)
        except DrillError as error:
            (outcome.problems if outcome else self.report.problems).append(str(error))
            logger.info(f"abandoned: {error}")
        finally:
            self.start.kill()

    def _inject(self, outcome: Outcome, turn: int) -> int:
        """Injects one fault into a training run and returns the step from which the next start must continue."""
        inject = fault_kinds(self.schedule.processes)[outcome.kind].inject
        if inject is None:
            raise ValueError(f"{outcome.kind} is a bad batch, which the trainer itself injects")
        target = turn % self.mesh.num_devices
        fault = inject(Scenario(start=self.start, run=self.run, mesh=self.mesh, draw=self.draw, target=target))
        outcome.detail = fault.detail
        check_exits(outcome, fault, self.start)
        outcome.step = self.run.last_step()
        if fault.damage:
            outcome.detail += f"; {self.run.damage_newest(fault.damage, self.draw)}"
        self.mesh = fault.mesh or self.mesh
        if fault.start_is_killed_after is not None:
            with self.trainer.start(self.run, self.mesh):
                time.sleep(fault.start_is_killed_after)
        expected = max(self.run.complete_steps(), default=0)
        if fault.saves and expected != outcome.step:
            outcome.problems.append(
                f"it ended after step {outcome.step}, but the newest checkpoint is of step {expected}"
            )
        outcome.step = max(outcome.step, self.run.last_step())  # a start that was killed may have trained on
        return expected

    def _restart(self, outcome: Outcome, expected: int) -> None:
        """The first start must succeed. Others are tried, as a scheduler does, to continue the drill."""
        for _ in range(STARTS):
            self.start = self.trainer.start(self.run, self.mesh)
            try:
                outcome.again = self._wait_for_training(expected)
                break
            except DrillError as error:
                outcome.problems.append(str(error))
                self.start.kill()
        else:
            raise DrillError(f"{STARTS} starts in a row failed")
        outcome.continued = continued_after(self.start.log_text(0))
        if outcome.continued != expected:
            outcome.problems.append(
                f"it continued after step {outcome.continued}, but {expected} was the newest complete checkpoint"
            )

    def _wait_for_training(self, expected: int) -> float:
        """Seconds from the start to the first step after `expected`. DrillError if there is none."""
        start = self.start
        file, last = self.run.metrics_file()

        def trains() -> bool:
            now, step = self.run.metrics_file()
            return step > expected and (now != file or last <= expected)

        wait_until(lambda: trains() or not start.all_running(), TIMEOUT_SECONDS, period=0.02)
        seconds = time.monotonic() - start.started
        if trains():
            return seconds
        if not start.all_running():
            raise DrillError(f"a start ended with {start.codes()}: {start.log_ends()}")
        raise DrillError(f"a start made no step in {TIMEOUT_SECONDS:.0f} s: {start.log_ends()}")


def check_exits(outcome: Outcome, fault: InjectedFault, start: Start) -> None:
    """The processes that the fault left alive must exit by themselves, in time, with the required codes and logs.

    Problems are added to the outcome; then all processes are killed.
    """
    codes = start.codes()
    alive = [index for index in range(len(codes)) if index not in fault.stopped]
    has_ended = start.wait(max(0.0, fault.at + fault.limit - time.monotonic()), alive)
    outcome.noticed = time.monotonic() - fault.at
    if not has_ended:
        stuck = [index for index in start.running() if index in alive]
        outcome.problems.append(f"processes {stuck} were still running after {fault.limit:.0f} s")
    elif outcome.noticed > fault.prompt and start.missing_in_logs("the save of step", alive):
        outcome.problems.append(f"it ended after {outcome.noticed:.0f} s; the limit is {fault.prompt:.0f} s")
    outcome.codes = [code if index in alive else None for index, code in enumerate(start.codes())]
    start.signal(signal.SIGKILL)
    start.wait(TIMEOUT_SECONDS)
    for index, required in fault.codes.items():
        if not is_required(outcome.codes[index], required):
            outcome.problems.append(f"process {index} ended with {outcome.codes[index]}, not {required}")
    if fault.log_pattern:
        outcome.problems += start.missing_in_logs(fault.log_pattern, list(fault.codes))
