"""What a drill does to a run: each kind is a function that waits for its moment, strikes, and says what has to follow.

The processes that were not struck down have to end by themselves, with an exit code that makes a scheduler start the
run again, within `Strike.limit` seconds.
"""

import math
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from jaxcoder.drill.processes import DrillError, Layout, RunFiles, Start, wait_until
from jaxcoder.drill.setup import SAVE_EVERY_STEPS, START_SECONDS, STEP_SECONDS
from jaxcoder.errors import EXIT_SIGTERM, EXIT_USER_ERROR, EXIT_WATCHDOG, ConfigError

SLACK_SECONDS = 25.0
"""For Python to notice, write its stacks and end, on a machine with more processes than cores."""
TIMEOUT_SECONDS = 180.0
"""For a few steps of a run that is under way, or for a start."""

ANY_FAILURE, ANY_ERROR = "any but 0 and 2", "any but 0"
"""Schedulers start again what ended with a failure: 0 means done, 2 that the user has something to mend."""


@dataclass(kw_only=True)
class Scene:
    """A run that is under way."""

    start: Start
    run: RunFiles
    layout: Layout
    draw: random.Random
    target: int
    """Processes take turns at being the one that is struck."""

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """DrillError if it does not come about, or the run ends before it."""
        wait_until(lambda: condition() or bool(self._ended()), TIMEOUT_SECONDS)
        if self._ended() or not condition():
            why = f"ended with {self.start.codes()}" if self._ended() else f"was not there in {TIMEOUT_SECONDS:.0f} s"
            raise DrillError(f"before the fault, while waiting for {what}, it {why}: {self.start.last_words()}")

    def _ended(self) -> bool:
        return len(self.start.running()) < self.layout.processes

    def wait_some_steps(self) -> None:
        """So many that a checkpoint was begun, and at most a save more."""
        wanted = self.run.last_step() + self.draw.randint(1, 2 * SAVE_EVERY_STEPS)
        self.wait_for(lambda: self.run.last_step() >= wanted and bool(self.run.whole()), f"step {wanted}")

    def wait_for_save(self) -> None:
        self.wait_for(self.run.is_saving, "a save")


def is_right(code: int | None, right: int | str) -> bool:
    """Whether an exit code is one of those that are right; None is of a process that has not ended."""
    wrong = {ANY_FAILURE: (None, 0, 2), ANY_ERROR: (None, 0)}
    return code not in wrong[right] if isinstance(right, str) else code == right


@dataclass(frozen=True, kw_only=True)
class Strike:
    """A fault that has been dealt, and what has to follow.

    codes: process -> the exit code that is right for it, or ANY_FAILURE, ANY_ERROR; one that was killed needs none.
    """

    detail: str
    codes: dict[int, int | str]
    at: float = field(default_factory=time.monotonic)
    limit: float = SLACK_SECONDS
    prompt: float = math.inf
    """The limit where no save was under way: a save may take as long as a start."""
    stopped: Sequence[int] = ()
    """Processes that are alive but stuck: they are killed once the others have ended."""
    saves: bool = False
    """The step at which it ended must be saved."""
    is_named: str = ""
    """Words that one of those that ended by themselves must have said."""
    damage: str = ""
    """What is done to the newest checkpoint before the next start (`RunFiles.damage_newest`)."""
    start_is_killed_after: float | None = None
    """The next start is killed so many seconds after it began, and one more is made."""
    layout: Layout | None = None
    """The layout of the next start; None: the same."""


def kill_one(scene: Scene) -> Strike:
    scene.wait_some_steps()
    return _killed(scene, [scene.target], f"process {scene.target}")


def kill_all(scene: Scene) -> Strike:
    scene.wait_some_steps()
    time.sleep(scene.draw.uniform(0, 0.3))
    return _killed(scene, range(scene.layout.processes), "all")


def kill_saving(scene: Scene) -> Strike:
    scene.wait_some_steps()
    scene.wait_for_save()
    time.sleep(scene.draw.uniform(0, 0.05))
    if scene.layout.processes > 1 and scene.draw.random() < 0.5:
        return _killed(scene, [scene.target], f"process {scene.target} in a save")
    return _killed(scene, range(scene.layout.processes), "all in a save")


def kill_starting(scene: Scene) -> Strike:
    seconds = scene.draw.uniform(0.2, 12.0)
    strike = kill_all(scene)
    return replace(strike, detail=f"all, again {seconds:.1f} s into the next start", start_is_killed_after=seconds)


def stop_one(scene: Scene) -> Strike:
    scene.wait_some_steps()
    scene.start.signal(signal.SIGSTOP, [scene.target])
    return Strike(
        detail=f"process {scene.target}",
        codes={index: EXIT_WATCHDOG for index in range(scene.layout.processes) if index != scene.target},
        limit=START_SECONDS + SLACK_SECONDS,
        prompt=STEP_SECONDS + SLACK_SECONDS,
        stopped=[scene.target],
        is_named=rf"step [\d,]+ .*\bprocess {scene.target}\b.* has not answered",
    )


def terminate_all(scene: Scene) -> Strike:
    scene.wait_some_steps()
    scene.start.signal(signal.SIGTERM)
    return _saved(scene, "all")


def terminate_one(scene: Scene) -> Strike:
    scene.wait_some_steps()
    scene.start.signal(signal.SIGTERM, [scene.target])
    return _saved(scene, f"process {scene.target}")


def fill_disk(scene: Scene) -> Strike:
    """A limit on the size of files stands in for a full disk: the arrays of the next save do not fit."""
    scene.wait_some_steps()
    limit = scene.run.largest_file() // 2
    if scene.run.metrics.stat().st_size * 2 > limit:
        raise DrillError("metrics.jsonl is as large as a checkpoint: give fewer --faults.")
    process = scene.start.processes[scene.target]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    others = [index for index in range(scene.layout.processes) if index != scene.target]
    return Strike(
        detail=f"process {scene.target}",
        codes={scene.target: EXIT_USER_ERROR} | dict.fromkeys(others, ANY_ERROR),
        limit=STEP_SECONDS + SLACK_SECONDS,
        is_named="disk is full",
    )


def damaging(how: str) -> Callable[[Scene], Strike]:
    """All are killed, then the newest checkpoint is damaged."""

    def strike(scene: Scene) -> Strike:
        newest = max(scene.run.whole(), default=0)
        # So that damage after damage does not throw the run back to its beginning.
        scene.wait_for(lambda: max(scene.run.whole(), default=0) > newest, "a new checkpoint")
        return replace(kill_all(scene), damage=how)

    return strike


def resizing(layout_of: Callable[[Layout, random.Random], Layout]) -> Callable[[Scene], Strike]:
    """All are stopped, one way or another, and the run goes on in another layout."""

    def strike(scene: Scene) -> Strike:
        layout = layout_of(scene.layout, scene.draw)
        strike = (kill_all if scene.draw.random() < 0.5 else terminate_all)(scene)
        return replace(strike, detail=f"{'SIGTERM' if strike.saves else 'kill'}, then {layout}", layout=layout)

    return strike


def _killed(scene: Scene, indices: Sequence[int], detail: str) -> Strike:
    scene.start.signal(signal.SIGKILL, indices)
    others = [index for index in range(scene.layout.processes) if index not in indices]
    limit = (STEP_SECONDS if others else 0) + SLACK_SECONDS
    return Strike(detail=detail, codes=dict.fromkeys(others, ANY_FAILURE), limit=limit)


def _saved(scene: Scene, detail: str) -> Strike:
    codes = dict.fromkeys(range(scene.layout.processes), EXIT_SIGTERM)
    return Strike(detail=detail, codes=codes, limit=STEP_SECONDS + SLACK_SECONDS, saves=True)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """strike: None for a batch that goes bad, which the run has to survive without a new start.

    least_processes: that the run needs. is_elastic: afterwards the mesh is another one, so that sums round otherwise.
    """

    what: str
    strike: Callable[[Scene], Strike] | None
    least_processes: int = 1
    is_elastic: bool = False


def kinds(processes: int) -> dict[str, Kind]:
    """Every kind that a run of so many processes can be drilled with, by name."""
    half = Layout(processes=max(1, processes // 2), fsdp=max(1, processes // 2))
    twice = Layout(processes=2 * processes, fsdp=2 * processes)
    meshes = [Layout(processes=processes, tensor=processes), Layout(processes=processes, data=processes)]

    def other_mesh(layout: Layout, draw: random.Random) -> Layout:
        return draw.choice([mesh for mesh in meshes if mesh != layout])

    found = {
        "kill-one": Kind(what="kill -9 of one process", strike=kill_one, least_processes=2),
        "kill-all": Kind(what="kill -9 of all", strike=kill_all),
        "kill-saving": Kind(what="kill -9 of one or all during a save", strike=kill_saving),
        "kill-starting": Kind(what="kill -9 of all, and again during the next start", strike=kill_starting),
        "stop-one": Kind(what="SIGSTOP of one: alive but stuck", strike=stop_one, least_processes=2),
        "term-all": Kind(what="SIGTERM to all, as a scheduler sends it", strike=terminate_all),
        "term-one": Kind(what="SIGTERM to one", strike=terminate_one, least_processes=2),
        "disk-full": Kind(what="the disk is full during a save", strike=fill_disk),
        "lose": Kind(what="the newest checkpoint is lost", strike=damaging("lose")),
        "truncate": Kind(what="a file in it is cut off", strike=damaging("truncate")),
        "flip": Kind(what="one bit in it is flipped", strike=damaging("flip")),
        "no-manifest": Kind(what="its manifest is missing", strike=damaging("manifest")),
        "no-commit": Kind(what="its arrays' commit marker is missing", strike=damaging("commit")),
        "nan": Kind(what="a batch gives NaN", strike=None),
        "spike": Kind(what="a batch gives a spike of loss and gradients", strike=None),
        "half": Kind(
            what="goes on with half the processes",
            strike=resizing(lambda *_: half),
            least_processes=2,
            is_elastic=True,
        ),
        "twice": Kind(what="goes on with twice the processes", strike=resizing(lambda *_: twice), is_elastic=True),
        "mesh": Kind(what="goes on with another mesh", strike=resizing(other_mesh), least_processes=2, is_elastic=True),
    }
    return {name: kind for name, kind in found.items() if processes >= kind.least_processes}


def choose(count: int, only: Sequence[str], processes: int, draw: random.Random) -> list[str]:
    """`count` names of kinds: each once before any comes a second time, in random order."""
    known = kinds(processes)
    for name in only:
        if name not in known:
            raise ConfigError(f"--only names {name!r}, and {processes} process(es) know {', '.join(known)}.")
    names, chosen = list(only) or list(known), []
    while len(chosen) < count:
        chosen += draw.sample(names, len(names))
    return chosen[:count]
