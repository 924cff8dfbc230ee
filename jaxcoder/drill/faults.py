"""The faults of a drill. Each is a function that waits for its condition, injects the fault, and returns the required
outcome.

The processes that the fault left alive must exit by themselves within `InjectedFault.limit` seconds, with an exit code
on which a scheduler restarts the run.
"""

import math
import random
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxcoder.config import MeshConfig
from jaxcoder.drill.processes import DrillError, RunFiles, Start, wait_until
from jaxcoder.drill.setup import SAVE_EVERY_STEPS, START_SECONDS, STEP_SECONDS
from jaxcoder.errors import EXIT_SIGTERM, EXIT_USER_ERROR, EXIT_WATCHDOG, ConfigError
from jaxcoder.formatting import did_you_mean, plural

SLACK_SECONDS = 25.0
"""For a process to write its stacks and exit, on a machine with more processes than cores."""
TIMEOUT_SECONDS = 180.0
"""For a few steps of a running trainer, or for a start."""

# Required exit codes. Schedulers restart failures: 0 means finished, 2 a user error.
ANY_FAILURE, ANY_ERROR = "any but 0 and 2", "any but 0"


@dataclass(kw_only=True)
class Scenario:
    """A training run into which a fault is injected."""

    start: Start
    run: RunFiles
    mesh: MeshConfig
    draw: random.Random
    target: int
    """The process that is hit; processes take turns."""

    @property
    def processes(self) -> range:
        return range(self.mesh.num_devices)

    @property
    def others(self) -> list[int]:
        return [index for index in self.processes if index != self.target]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """DrillError if `condition` does not become true in time, or a process exits before."""
        wait_until(lambda: condition() or not self.start.all_running(), TIMEOUT_SECONDS)
        if not self.start.all_running():
            problem = f"ended with {self.start.codes()}"
        elif not condition():
            problem = f"did not reach it in {TIMEOUT_SECONDS:.0f} s"
        else:
            return
        raise DrillError(f"before the fault, while waiting for {what}, the run {problem}: {self.start.log_ends()}")

    def wait_some_steps(self) -> None:
        """Until a checkpoint is complete, and at most two save intervals."""
        wanted = self.run.last_step() + self.draw.randint(1, 2 * SAVE_EVERY_STEPS)
        self.wait_for(lambda: self.run.last_step() >= wanted and bool(self.run.complete_steps()), f"step {wanted}")


def is_required(code: int | None, required: int | str) -> bool:
    """Whether an exit code is the required one; code: None for a process that has not exited."""
    if required == ANY_FAILURE:
        return code not in (None, 0, 2)
    return code not in (None, 0) if required == ANY_ERROR else code == required


@dataclass(frozen=True, kw_only=True)
class InjectedFault:
    """A fault that was injected, and the required outcome.

    codes: process -> its required exit code, or ANY_FAILURE, ANY_ERROR; a killed process has none.
    """

    detail: str
    codes: Mapping[int, int | str]
    at: float = field(default_factory=time.monotonic)
    limit: float = SLACK_SECONDS
    prompt: float = math.inf
    """The limit if no save was in progress: a save may take as long as a start."""
    stopped: Sequence[int] = ()
    """Processes that are alive but stuck: they are killed once the others have ended."""
    saves: bool = False
    """The last step must be saved."""
    log_pattern: str = ""
    """A pattern that the log of a process that exited by itself must contain."""
    damage: str = ""
    """The damage to the newest checkpoint before the next start (`RunFiles.damage_newest`)."""
    start_is_killed_after: float | None = None
    """Seconds after which the next start is killed too."""
    mesh: MeshConfig | None = None
    """Of the next start; None: the same."""


Inject = Callable[[Scenario], InjectedFault]


def kill_one(scenario: Scenario) -> InjectedFault:
    scenario.wait_some_steps()
    return _kill(scenario, [scenario.target], f"process {scenario.target}")


def kill_all(scenario: Scenario) -> InjectedFault:
    scenario.wait_some_steps()
    time.sleep(scenario.draw.uniform(0, 0.3))
    return _kill(scenario, scenario.processes, "all")


def kill_saving(scenario: Scenario) -> InjectedFault:
    scenario.wait_some_steps()
    scenario.wait_for(scenario.run.is_saving, "a save")
    time.sleep(scenario.draw.uniform(0, 0.05))
    if scenario.others and scenario.draw.random() < 0.5:
        return _kill(scenario, [scenario.target], f"process {scenario.target} in a save")
    return _kill(scenario, scenario.processes, "all in a save")


def kill_starting(scenario: Scenario) -> InjectedFault:
    seconds = scenario.draw.uniform(0.2, 12.0)
    fault = kill_all(scenario)
    return replace(fault, detail=f"all, again {seconds:.1f} s into the next start", start_is_killed_after=seconds)


def _kill(scenario: Scenario, indices: Sequence[int], detail: str) -> InjectedFault:
    scenario.start.signal(signal.SIGKILL, indices)
    others = [index for index in scenario.processes if index not in indices]
    limit = (STEP_SECONDS if others else 0) + SLACK_SECONDS
    return InjectedFault(detail=detail, codes=dict.fromkeys(others, ANY_FAILURE), limit=limit)


def stop_one(scenario: Scenario) -> InjectedFault:
    scenario.wait_some_steps()
    scenario.start.signal(signal.SIGSTOP, [scenario.target])
    return InjectedFault(
        detail=f"process {scenario.target}",
        codes=dict.fromkeys(scenario.others, EXIT_WATCHDOG),
        limit=START_SECONDS + SLACK_SECONDS,
        prompt=STEP_SECONDS + SLACK_SECONDS,
        stopped=[scenario.target],
        log_pattern=rf"step [\d,]+ .*\bprocess {scenario.target}\b.* has not answered",
    )


def terminate_all(scenario: Scenario) -> InjectedFault:
    return _terminate(scenario, None, "all")


def terminate_one(scenario: Scenario) -> InjectedFault:
    return _terminate(scenario, [scenario.target], f"process {scenario.target}")


def _terminate(scenario: Scenario, indices: Sequence[int] | None, detail: str) -> InjectedFault:
    scenario.wait_some_steps()
    scenario.start.signal(signal.SIGTERM, indices)
    codes = dict.fromkeys(scenario.processes, EXIT_SIGTERM)
    return InjectedFault(detail=detail, codes=codes, limit=STEP_SECONDS + SLACK_SECONDS, saves=True)


def fill_disk(scenario: Scenario) -> InjectedFault:
    """Limits the size of files, so that the arrays of the next save do not fit."""
    scenario.wait_some_steps()
    limit = scenario.run.largest_file() // 2
    if scenario.run.metrics.stat().st_size * 2 > limit:
        raise DrillError("metrics.jsonl is as large as a checkpoint: give fewer --faults.")
    resource.prlimit(scenario.start.processes[scenario.target].pid, resource.RLIMIT_FSIZE, (limit, limit))
    return InjectedFault(
        detail=f"process {scenario.target}",
        codes={scenario.target: EXIT_USER_ERROR} | dict.fromkeys(scenario.others, ANY_ERROR),
        limit=STEP_SECONDS + SLACK_SECONDS,
        log_pattern="disk is full",
    )


def damage(how: str) -> Inject:
    """Kills all processes and damages the newest checkpoint."""

    def inject(scenario: Scenario) -> InjectedFault:
        newest = max(scenario.run.complete_steps(), default=0)
        # A new checkpoint first: otherwise repeated damage would set the run back to step 0.
        scenario.wait_for(lambda: max(scenario.run.complete_steps(), default=0) > newest, "a new checkpoint")
        return replace(kill_all(scenario), damage=how)

    return inject


def resize(*meshes: MeshConfig) -> Inject:
    """Kills or terminates all processes; the run continues on one of these meshes, but not on the same."""

    def inject(scenario: Scenario) -> InjectedFault:
        mesh = scenario.draw.choice([mesh for mesh in meshes if mesh != scenario.mesh] or meshes)
        fault = (kill_all if scenario.draw.random() < 0.5 else terminate_all)(scenario)
        how = "SIGTERM" if fault.saves else "kill"
        processes = plural(mesh.num_devices, "process", "processes")
        return replace(fault, detail=f"{how}, then {processes}, {mesh}", mesh=mesh)

    return inject


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault."""

    what: str
    inject: Inject | None = None
    """None for a bad batch, which the run must survive without a restart."""
    min_processes: int = 1
    is_elastic: bool = False
    """Whether the mesh changes, so that sums are rounded differently."""


def fault_kinds(processes: int) -> dict[str, FaultKind]:
    """The kinds of faults for a run of `processes` processes, by name."""
    half, twice = resize(MeshConfig(fsdp=max(1, processes // 2))), resize(MeshConfig(fsdp=2 * processes))
    other_mesh = resize(MeshConfig(fsdp=1, tensor=processes), MeshConfig(fsdp=1, data=processes))
    kinds = {
        "kill-one": FaultKind("kill -9 of one process", kill_one, min_processes=2),
        "kill-all": FaultKind("kill -9 of all", kill_all),
        "kill-saving": FaultKind("kill -9 of one or all during a save", kill_saving),
        "kill-starting": FaultKind("kill -9 of all, and again during the next start", kill_starting),
        "stop-one": FaultKind("SIGSTOP of one: alive but stuck", stop_one, min_processes=2),
        "term-all": FaultKind("SIGTERM to all, as a scheduler sends it", terminate_all),
        "term-one": FaultKind("SIGTERM to one", terminate_one, min_processes=2),
        "disk-full": FaultKind("the disk is full during a save", fill_disk),
        "lose": FaultKind("the newest checkpoint is lost", damage("lose")),
        "truncate": FaultKind("one of its files is truncated", damage("truncate")),
        "flip": FaultKind("one of its bits is flipped", damage("flip")),
        "no-manifest": FaultKind("its manifest is missing", damage("manifest")),
        "no-commit": FaultKind("its arrays' commit marker is missing", damage("commit")),
        "nan": FaultKind("a batch with NaN"),
        "spike": FaultKind("a batch with a spike of loss and gradients"),
        "half": FaultKind("continues with half the processes", half, min_processes=2, is_elastic=True),
        "twice": FaultKind("continues with twice the processes", twice, is_elastic=True),
        "mesh": FaultKind("continues on another mesh", other_mesh, min_processes=2, is_elastic=True),
    }
    return {name: kind for name, kind in kinds.items() if processes >= kind.min_processes}


def choose_kinds(count: int, only: Sequence[str], processes: int, draw: random.Random) -> list[str]:
    """`count` names of kinds in random order; each occurs once before any is repeated."""
    known = fault_kinds(processes)
    for name in only:
        if name not in known:
            group = plural(processes, "process", "processes")
            raise ConfigError(
                f"--only names {name!r}{did_you_mean(name, known)}: with {group} there are {', '.join(known)}."
            )
    names = list(only) or list(known)
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += draw.sample(names, len(names))
    return chosen[:count]
