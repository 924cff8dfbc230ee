"""A real run of real processes, disturbed: `jaxcoder drill`.

    DRILL/undisturbed/    the run that nobody touches
    DRILL/disturbed/      the same, hit by one fault after another, on the same mesh: it must end in the same bits
    DRILL/resized/        the same, going on with other numbers of processes and other meshes: the same batches, and the
                          same curve within rounding
    DRILL/*-logs/         the log of every process of every start
    DRILL/drill.json      the outcome, as it is printed

After each fault the processes that are left must end by themselves, and the same command must go on from the newest
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

from jaxcoder.drill.faults import TIMEOUT_SECONDS, InjectedFault, Scenario, choose_kinds, fault_kinds, is_right
from jaxcoder.drill.processes import (
    DrillError,
    ProcessLayout,
    RunFiles,
    Start,
    Trainer,
    continued_after,
    free_port,
    own_command,
    wait_until,
)
from jaxcoder.drill.report import DrillReport, Outcome, Verdict, compare, judge_bad_batches
from jaxcoder.drill.setup import SAVE_EVERY_STEPS, BadBatch, layout_of, prepare
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
    bad_batches: dict[int, BadBatch]

    @classmethod
    def draw(cls, count: int, seed: int, *, only: Sequence[str] = (), processes: int = 2) -> "FaultSchedule":
        """`count` random faults. ConfigError for impossible numbers and unknown names."""
        if count < 1 or processes < 1:
            raise ConfigError(f"--faults is {count} and --processes {processes}: give 1 or more of each.")
        chosen = choose_kinds(count, only, processes, random.Random(seed))
        strikes = sum(fault_kinds(processes)[name].inject is not None for name in chosen)
        num_steps = STEPS_PER_FAULT * (strikes + 2)
        bad = [name for name in chosen if fault_kinds(processes)[name].inject is None]
        # After the warm-up, and not in consecutive steps, which would be another fault.
        places = random.Random(seed).sample(range(STEPS_PER_FAULT, num_steps - 1, 3), len(bad))
        return cls(
            kinds=chosen, processes=processes, num_steps=num_steps, bad_batches=dict(zip(places, bad, strict=True))
        )


def drill(directory: Path, plan: FaultSchedule, *, seed: int) -> DrillReport:
    """Runs the drill in `directory`, which must be empty or new, and returns its report."""
    if directory.is_dir() and any(directory.iterdir()):
        raise ConfigError(f"`{directory}` is not empty: give a new --output-dir.")
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    began = time.monotonic()
    logger.info(f"Drill: {len(plan.kinds)} faults in a run of {plan.num_steps} steps, seed {seed}, in {directory}")
    prepare(directory, plan.num_steps, plan.bad_batches)
    trainer = Trainer(command=own_command(directory), port=free_port(), cache=directory / "cache")
    undisturbed = RunFiles(directory / "undisturbed")
    seconds = finish_undisturbed(trainer, undisturbed, layout_of(plan.processes))
    logger.info(f"Undisturbed: {plan.num_steps} steps in {format_duration(seconds)}")
    known = fault_kinds(plan.processes)
    report = DrillReport(seed=seed, processes=plan.processes, num_steps=plan.num_steps)
    for name, is_elastic in (("disturbed", False), ("resized", True)):
        chosen = [kind for kind in plan.kinds if known[kind].inject and known[kind].is_elastic == is_elastic]
        if not chosen and (is_elastic or not plan.bad_batches):
            continue
        run = RunFiles(directory / name)
        DisturbedRun(trainer, run, plan, random.Random(f"{seed} {name}"), report).play(chosen)
        report.verdicts[name] = _verdict(run, undisturbed, is_elastic)
        logger.info(f"{name}: {report.verdicts[name]}")
    # Bad batches are the same in all runs; the first run is judged.
    hit = RunFiles(directory / next(iter(report.verdicts)))
    report.outcomes += judge_bad_batches(plan.bad_batches, hit, first=len(report.outcomes) + 1)
    report.seconds = time.monotonic() - began
    report.write(directory / "drill.json")
    return report


def clean_up(directory: Path) -> None:
    """Removes all but the report."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "drill.json":
            entry.unlink()


def finish_undisturbed(trainer: Trainer, run: RunFiles, layout: ProcessLayout) -> float:
    """Runs to the end and returns the seconds."""
    with trainer.start(run, layout) as start:
        _wait_to_the_end(start, run)
        return time.monotonic() - start.began


def _wait_to_the_end(start: Start, run: RunFiles) -> None:
    """DrillError unless all processes finish; they may take any time as long as there are new steps."""
    step = -1
    while run.last_step() > step:
        step = run.last_step()
        if start.wait(TIMEOUT_SECONDS):
            break
    if set(start.codes()) != {0}:
        raise DrillError(f"the run did not finish, its exit codes are {start.codes()}: {start.last_words()}")


def _verdict(run: RunFiles, undisturbed: RunFiles, is_elastic: bool) -> Verdict:
    try:
        return compare(run, undisturbed, is_elastic=is_elastic)
    except DrillError as error:
        return Verdict(problems=[str(error)])


class DisturbedRun:
    """One run with faults: a start, a fault, the next start, and so on, to the end of the run."""

    def __init__(self, trainer: Trainer, run: RunFiles, plan: FaultSchedule, draw: random.Random, report: DrillReport):
        self.trainer, self.run, self.plan, self.draw = trainer, run, plan, draw
        self.report = report
        self.layout = layout_of(plan.processes)
        self.start: Start | None = None

    def play(self, chosen: Sequence[str]) -> None:
        """Problems go to the report; a run that does not continue is abandoned."""
        outcome = None
        try:
            self.start = self.trainer.start(self.run, self.layout)
            self._wait_for_training(self.start, 0)
            for turn, name in enumerate(chosen):
                outcome = Outcome(number=len(self.report.outcomes) + 1, kind=name)
                self.report.outcomes.append(outcome)
                self._inject(outcome, turn)
                logger.info(f"{outcome.number:>3} of {len(self.plan.kinds)}  {outcome}")
            _wait_to_the_end(self.start, self.run)
        except DrillError as error:
            (outcome.problems if outcome else self.report.problems).append(str(error))
            logger.info(f"abandoned: {error}")
        finally:
            if self.start is not None:
                self.start.__exit__()

    def _inject(self, outcome: Outcome, turn: int) -> None:
        """One fault: from a training run to a run that trains again."""
        kind = fault_kinds(self.plan.processes)[outcome.kind]
        target = turn % self.layout.processes
        scenario = Scenario(start=self.start, run=self.run, layout=self.layout, draw=self.draw, target=target)
        fault = kind.inject(scenario)
        outcome.detail = fault.detail
        self._check_exits(outcome, fault)
        outcome.step = self.run.last_step()
        if fault.damage:
            outcome.detail += f"; {self.run.damage_newest(fault.damage, self.draw)}"
        self.layout = fault.layout or self.layout
        if fault.start_is_killed_after is not None:
            with self.trainer.start(self.run, self.layout):
                time.sleep(fault.start_is_killed_after)
        expected = max(self.run.complete_steps(), default=0)
        if fault.saves and expected != outcome.step:
            outcome.problems.append(
                f"it ended after step {outcome.step}, but the newest checkpoint is of step {expected}"
            )
        outcome.step = max(outcome.step, self.run.last_step())  # a start that was killed may have trained on
        self._restart(outcome, expected)
        outcome.lost = outcome.step - outcome.continued

    def _restart(self, outcome: Outcome, expected: int) -> None:
        """One start is required to succeed; further ones are tried, as a scheduler does, to continue the drill."""
        for _ in range(STARTS):
            self.start = self.trainer.start(self.run, self.layout)
            try:
                outcome.again = self._wait_for_training(self.start, expected)
                break
            except DrillError as error:
                outcome.problems.append(str(error))
                self.start.__exit__()
        else:
            raise DrillError(f"{STARTS} starts in a row failed")
        outcome.continued = continued_after(self.start.log_text(0))
        if outcome.continued != expected:
            outcome.problems.append(
                f"it continued after step {outcome.continued}, but {expected} was the newest complete checkpoint"
            )

    def _check_exits(self, outcome: Outcome, fault: InjectedFault) -> None:
        """All processes that the fault left alive must exit by themselves, in time, with the required codes and
        logs."""
        start = self.start
        others = [index for index in range(self.layout.processes) if index not in fault.stopped]
        ended = start.wait(max(0.0, fault.at + fault.limit - time.monotonic()), others)
        outcome.noticed = time.monotonic() - fault.at
        if not ended:
            stuck = [index for index in start.running() if index in others]
            outcome.problems.append(f"processes {stuck} were still running after {fault.limit:.0f} s")
        elif outcome.noticed > fault.prompt and start.missing_words("the save of step", others):
            outcome.problems.append(f"it took {outcome.noticed:.0f} s to end, and {fault.prompt:.0f} are enough")
        outcome.codes = [code if index in others else None for index, code in enumerate(start.codes())]
        start.signal(signal.SIGKILL)
        start.wait(TIMEOUT_SECONDS)
        for index, right in fault.codes.items():
            if not is_right(outcome.codes[index], right):
                outcome.problems.append(f"process {index} ended with {outcome.codes[index]}, not {right}")
        if fault.is_named:
            outcome.problems += start.missing_words(fault.is_named, list(fault.codes))

    def _wait_for_training(self, start: Start, expected: int) -> float:
        """Seconds from the start to the first step after the restored one. DrillError if there is none."""
        file, last = self.run.metrics_file()

        def trains() -> bool:
            now, step = self.run.metrics_file()
            return step > expected and (now != file or last <= expected)

        wait_until(lambda: trains() or len(start.running()) < self.layout.processes, TIMEOUT_SECONDS, period=0.02)
        seconds = time.monotonic() - start.began
        if trains():
            return seconds
        if len(start.running()) < self.layout.processes:
            raise DrillError(f"a start ended with {start.codes()}: {start.last_words()}")
        raise DrillError(f"a start made no step in {TIMEOUT_SECONDS:.0f} s: {start.last_words()}")
