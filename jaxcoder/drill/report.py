"""The report of a drill: the outcome of each fault, and the comparison of each run with the undisturbed one."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from jaxcoder import runtime
from jaxcoder.drill.processes import DrillError, RunFiles
from jaxcoder.formatting import format_duration, format_table

LOSS_TOLERANCE = 0.002
"""Largest difference of a step's loss on another mesh, in nats per token, from sums in another order."""


@dataclass(kw_only=True)
class Outcome:
    """The outcome of one fault."""

    number: int
    kind: str
    detail: str = ""
    step: int = 0
    """The last one before it."""
    codes: list[int | None] = field(default_factory=list)
    """Exit codes by process; None for a stopped one."""
    noticed: float | None = None
    """Seconds until all processes left alive had exited."""
    continued: int = 0
    """The step after which the next start continued."""
    lost: int | None = None
    """Steps that were repeated."""
    again: float | None = None
    """Seconds from the next start to its first step."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        numbers = [f"{self.kind} ({self.detail}) at step {self.step}"]
        if self.codes:
            numbers.append(f"codes {self._codes()}")
        if self.again is not None:
            numbers.append(
                f"noticed in {self.noticed:.1f} s, {self.lost} steps lost, training again in {self.again:.1f} s"
            )
        return "; ".join([*numbers, *(f"FAILED: {problem}" for problem in self.problems)])

    def _codes(self) -> str:
        return " ".join("stopped" if code is None else str(code) for code in self.codes)

    def row(self) -> list[object]:
        def shown(value: float | None) -> str:
            return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

        result = "FAILED" if self.problems else "survived"
        return [
            self.number, self.kind, self.detail, self.step, self._codes(), shown(self.noticed), shown(self.lost),
            shown(self.again), result,
        ]  # fmt: skip


COLUMNS = ("#", "fault", "what", "at step", "exit codes", "s to notice", "steps lost", "s to train again", "result")


@dataclass(kw_only=True)
class Verdict:
    """The comparison of one finished run with the undisturbed one."""

    problems: list[str] = field(default_factory=list)
    is_identical: bool = False
    """Every weight and every moment, bit for bit."""
    largest_loss_difference: float = math.nan
    """Over all steps, in nats per token."""
    largest_weight_difference: float = math.nan

    def __str__(self) -> str:
        if self.problems:
            return "FAILED: " + "; ".join(self.problems)
        if self.is_identical:
            return "every step once, the same batches and losses; weights and optimizer state bit-identical"
        return (
            f"every step once, the same batches; losses within {self.largest_loss_difference:.1e}, weights within "
            f"{self.largest_weight_difference:.1e}"
        )


@dataclass(kw_only=True)
class DrillReport:
    """The results of a drill."""

    seed: int
    processes: int
    num_steps: int
    seconds: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        problems = [outcome.problems for outcome in self.outcomes]
        problems += [self.problems, *(verdict.problems for verdict in self.verdicts.values())]
        return not self.outcomes or any(problems)

    def text(self) -> str:
        """The table of outcomes, the verdicts and all problems."""
        survived = sum(not outcome.problems for outcome in self.outcomes)
        problems = [f"fault {o.number} ({o.kind}): {problem}" for o in self.outcomes for problem in o.problems]
        return "\n".join(
            [
                format_table(COLUMNS, [outcome.row() for outcome in self.outcomes]),
                "",
                *(f"{name}: {verdict}" for name, verdict in self.verdicts.items()),
                *problems,
                *self.problems,
                f"{survived} of {len(self.outcomes)} faults survived, in {format_duration(self.seconds)} "
                f"({self.num_steps} steps, {self.processes} processes, seed {self.seed}).",
            ]
        )

    def write(self, path: Path) -> None:
        """Writes the report as JSON."""
        content = dataclasses.asdict(self) | {"has_failed": self.has_failed}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# --- comparison with the undisturbed run -----------------------------------------------------------------------------


def compare(run: RunFiles, undisturbed: RunFiles, *, is_elastic: bool) -> Verdict:
    """is_elastic: the mesh changed, so that losses and weights agree within rounding only."""
    verdict = Verdict()
    run_steps, expected_steps = run.steps(), undisturbed.steps()
    numbers, expected = [r["step"] for r in run_steps], [r["step"] for r in expected_steps]
    if numbers != expected:
        wrong = sorted(set(numbers) ^ set(expected)) or [n for n in numbers if numbers.count(n) > 1] or numbers
        verdict.problems.append(f"metrics.jsonl does not contain every step once and in order: see {wrong[:5]}")
        return verdict
    for name in ("samples", "batch_hash", "skipped"):
        different = [a["step"] for a, b in zip(run_steps, expected_steps, strict=True) if a[name] != b[name]]
        if different:
            verdict.problems.append(f"{name} differs from step {different[0]} on ({len(different)} steps)")
    verdict.largest_loss_difference = max(
        _difference(a["loss"], b["loss"]) for a, b in zip(run_steps, expected_steps, strict=True)
    )
    allowed = LOSS_TOLERANCE if is_elastic else 0.0
    if not verdict.largest_loss_difference <= allowed:
        verdict.problems.append(f"losses differ by up to {verdict.largest_loss_difference:.2e} (allowed: {allowed})")
    difference = compare_last_checkpoints(run.path, undisturbed.path)
    verdict.is_identical = difference["different"] == []
    verdict.largest_weight_difference = difference["largest"]
    if not is_elastic and not verdict.is_identical:
        names = ", ".join(difference["different"][:3])
        verdict.problems.append(f"{len(difference['different'])} arrays of the last checkpoint differ ({names}, ...)")
    return verdict


def _difference(one: float, other: float) -> float:
    """Of two losses; NaN equals NaN."""
    return 0.0 if math.isnan(one) and math.isnan(other) else abs(one - other)


def check_bad_batches(bad_batches: dict[int, str], run: RunFiles, *, first: int) -> list[Outcome]:
    """Each must have been skipped and logged, and no other step. first: number of the first outcome."""
    steps, logs = {record["step"]: record for record in run.steps()}, run.all_logs()
    outcomes = []
    for number, (step, kind) in enumerate(sorted(bad_batches.items()), first):
        record = steps.get(step, {})
        outcome = Outcome(number=number, kind=kind, step=step)
        if "loss" in record:
            outcome.detail = f"loss {record['loss']:.3g}, gradient norm {record['grad_norm']:.3g}, skipped"
        if not record.get("skipped"):
            outcome.problems.append(f"step {step} was not skipped")
        if not re.search(rf"step {step:,}: skipped", logs):
            outcome.problems.append(f"step {step} was not logged")
        outcomes.append(outcome)
    others = [step for step, record in steps.items() if record["skipped"] and step not in bad_batches]
    if others and outcomes:
        outcomes[0].problems.append(f"steps {others[:5]} were skipped too, with ordinary batches")
    return outcomes


def compare_last_checkpoints(run: Path, undisturbed: Path) -> dict:
    """`compare_arrays` in a process on the CPU, so that the drill does not allocate an accelerator."""
    command = [sys.executable, "-m", "jaxcoder.drill.report", str(run), str(undisturbed)]
    variables = runtime.environment_with({"JAX_PLATFORMS": "cpu"})
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise DrillError(f"the last checkpoints cannot be compared: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_arrays(run: str, undisturbed: str) -> dict:
    """The last checkpoints of two runs: names of the arrays that are not bit-identical, and the largest difference."""
    import numpy as np

    from jaxcoder.checkpoint.arrays import load_numpy
    from jaxcoder.checkpoint.discover import open_checkpoint

    opened = [open_checkpoint(path) for path in (run, undisturbed)]
    arrays, expected_arrays = (load_numpy(directory, manifest.arrays) for directory, manifest in opened)
    different = sorted(set(arrays) ^ set(expected_arrays))
    largest = 0.0 if opened[0][1].step == opened[1][1].step else math.inf
    for name in set(arrays) & set(expected_arrays):
        if arrays[name].tobytes() != expected_arrays[name].tobytes():
            different.append(name)
            largest = max(
                largest, float(np.abs(np.subtract(arrays[name], expected_arrays[name], dtype=np.float64)).max())
            )
    return {"different": sorted(different), "largest": largest}


if __name__ == "__main__":
    print(json.dumps(compare_arrays(*sys.argv[1:])))
