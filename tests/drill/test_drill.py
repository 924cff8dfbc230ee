"""A run survives injected faults; a drill of a broken trainer fails."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxcoder.checkpoint.manifest import MANIFEST
from jaxcoder.cli.main import main
from jaxcoder.drill import report as drill_report
from jaxcoder.drill.drill import DisturbedRun, FaultSchedule, check_exits, drill, finish_undisturbed
from jaxcoder.drill.faults import ANY_FAILURE, InjectedFault, choose_kinds, fault_kinds
from jaxcoder.drill.processes import RunFiles, Trainer, continued_after, free_port
from jaxcoder.drill.report import DrillReport, Outcome, Verdict, check_bad_batches, compare
from jaxcoder.drill.setup import prepare
from jaxcoder.errors import ConfigError


def plan_of(names: list[str], *, num_steps: int, processes: int = 2, bad: dict | None = None) -> FaultSchedule:
    return FaultSchedule(kinds=names, processes=processes, num_steps=num_steps, bad_batches=bad or {})


def test_a_fault_and_a_bad_batch(tmp_path):
    """A damaged checkpoint and a batch of NaN."""
    report = drill(tmp_path, plan_of(["flip"], num_steps=20, bad={13: "nan"}), seed=1)
    assert not report.has_failed, report.text()
    assert [outcome.kind for outcome in report.outcomes] == ["flip", "nan"]
    assert report.verdicts["disturbed"].is_identical
    assert json.loads((tmp_path / "drill.json").read_text())["has_failed"] is False


@pytest.mark.slow
def test_two_faults_and_two_bad_batches(tmp_path):
    """A stuck process, a damaged checkpoint; NaN and a spike."""
    plan = plan_of(["stop-one", "flip"], num_steps=44, bad={13: "nan", 40: "spike"})
    report = drill(tmp_path, plan, seed=1)
    assert not report.has_failed, report.text()
    assert [outcome.kind for outcome in report.outcomes] == ["stop-one", "flip", "nan", "spike"]
    assert report.verdicts["disturbed"].is_identical
    assert 75 in report.outcomes[0].codes
    assert json.loads((tmp_path / "drill.json").read_text())["has_failed"] is False


@pytest.mark.slow
def test_every_kind(tmp_path):
    seed = int(time.time())
    report = drill(tmp_path, FaultSchedule.draw(len(fault_kinds(2)), seed), seed=seed)
    assert not report.has_failed, report.text()


# --- broken trainers -------------------------------------------------------------------------------------------------

BROKEN = """
import sys
import jax
from jaxcoder.train import session
from jaxcoder.train.state import initial_state

restore_or_initialize = session.restore_or_initialize

def broken(config, mesh, *rest):
    state, step, samples = restore_or_initialize(config, mesh, *rest)
    if step:
        {break_it}
    return state, step, samples

session.restore_or_initialize = broken
if __name__ == "__main__":
    from jaxcoder.cli.main import main
    sys.exit(main())
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A drill of one process with a finished undisturbed run."""
    directory = tmp_path_factory.mktemp("drill")
    prepare(directory, 24, {})
    trainer = Trainer(directory=directory, port=free_port())
    undisturbed = RunFiles(directory / "undisturbed")
    finish_undisturbed(trainer, undisturbed, 1)
    return directory, trainer, undisturbed


@pytest.mark.parametrize(
    ("name", "break_it", "problem"),
    [
        ("samples", "samples = 0", "samples differs from step"),
        pytest.param(
            "weights",
            "state = jax.jit(lambda: initial_state(config))()",
            "losses differ by up to",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_broken_trainer_fails(alone, name, break_it, problem):
    """One restores no data position, one restores no weights."""
    directory, trainer, undisturbed = alone
    program = directory / f"{name}.py"
    program.write_text(BROKEN.format(break_it=break_it))
    broken = Trainer(directory=directory, port=trainer.port, program=(sys.executable, str(program)))
    run, plan = RunFiles(directory / name), plan_of(["term-all"], num_steps=24, processes=1)
    report = DrillReport(seed=1, processes=1, num_steps=24)
    DisturbedRun(broken, run, plan, random.Random(1), report).inject_all(plan.kinds)
    report.verdicts[name] = compare(run, undisturbed, is_elastic=False)
    assert report.has_failed and problem in report.text()
    assert not report.verdicts[name].is_identical


def fake_run(path: Path, steps: list[dict]) -> RunFiles:
    path.mkdir()
    lines = [{"samples": 8 * r["step"], "batch_hash": r["step"], "loss": 1.0, "skipped": 0} | r for r in steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFiles(path)


@pytest.mark.parametrize(
    ("steps", "different", "problem"),
    [
        ([{"step": 1}, {"step": 2}, {"step": 3}], [], None),
        ([{"step": 1}, {"step": 3}], [], "does not contain every step once"),
        ([{"step": 1}, {"step": 2}, {"step": 2}, {"step": 3}], [], r"does not contain every step once.*\[2"),
        ([{"step": 1}, {"step": 2, "batch_hash": 7}, {"step": 3}], [], "batch_hash differs from step 2"),
        ([{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0001}], [], "losses differ by up to 1.00e-04"),
        ([{"step": 1}, {"step": 2, "skipped": 1}, {"step": 3}], [], "skipped differs from step 2"),
        ([{"step": 1}, {"step": 2}, {"step": 3}], ["params/wte"], "1 arrays of the last checkpoint differ"),
    ],
)
def test_compare(tmp_path, monkeypatch, steps, different, problem):
    monkeypatch.setattr(drill_report, "compare_last_checkpoints", lambda *_: {"different": different, "largest": 0.0})
    undisturbed = fake_run(tmp_path / "a", [{"step": 1}, {"step": 2}, {"step": 3}])
    verdict = compare(fake_run(tmp_path / "b", steps), undisturbed, is_elastic=False)
    if problem is None:
        assert not verdict.problems and verdict.is_identical
    else:
        assert re.search(problem, str(verdict)) and str(verdict).startswith("FAILED")


def test_a_curve_on_another_mesh_may_differ_a_little(tmp_path, monkeypatch):
    monkeypatch.setattr(drill_report, "compare_last_checkpoints", lambda *_: {"different": ["x"], "largest": 1e-5})
    undisturbed = fake_run(tmp_path / "a", [{"step": 1}])
    near = fake_run(tmp_path / "b", [{"step": 1, "loss": 1.001}])
    far = fake_run(tmp_path / "c", [{"step": 1, "loss": 1.1}])
    assert not compare(near, undisturbed, is_elastic=True).problems
    assert compare(far, undisturbed, is_elastic=True).problems


def test_bad_batches_that_were_not_skipped(tmp_path):
    run = fake_run(tmp_path / "a", [{"step": 1, "grad_norm": 9.0}, {"step": 2, "skipped": 1, "grad_norm": 9.0}])
    one, other = check_bad_batches({1: "nan", 2: "spike"}, run, first=5)
    assert "step 1 was not skipped" in one.problems and other.problems == ["step 2 was not logged"]


def test_exit_codes_timeouts_and_logs_are_checked():
    start = SimpleNamespace(
        wait=lambda *_: False, running=lambda: [1], codes=lambda: [0, 2], signal=lambda *_: None,
        missing_in_logs=lambda *_: ["no log contains it"],
    )  # fmt: skip
    outcome = Outcome(number=1, kind="stop-one")
    check_exits(outcome, InjectedFault(detail="", codes={0: ANY_FAILURE, 1: 75}, log_pattern="it"), start)
    assert len(outcome.problems) == 4, outcome.problems
    report = DrillReport(seed=1, processes=2, num_steps=1, outcomes=[outcome], verdicts={"disturbed": Verdict()})
    assert report.has_failed and "0 of 1 faults survived" in report.text()


# --- the command -----------------------------------------------------------------------------------------------------


def test_no_kind_is_repeated_before_all_were_drawn():
    chosen = choose_kinds(2 * len(fault_kinds(2)), [], 2, random.Random(0))
    assert sorted(chosen) == sorted(2 * list(fault_kinds(2)))
    plan = FaultSchedule.draw(50, 7)
    assert len(plan.kinds) == 50 and set(plan.bad_batches.values()) == {"nan", "spike"}
    assert plan == FaultSchedule.draw(50, 7) != FaultSchedule.draw(50, 8)


def test_invalid_options(tmp_path, capsys):
    with pytest.raises(ConfigError, match="--only names 'kill'"):
        FaultSchedule.draw(3, 0, only=["kill"])
    with pytest.raises(ConfigError, match="--faults is 0"):
        FaultSchedule.draw(0, 0)
    (tmp_path / "mine").touch()
    assert main(["drill", "--faults", "1", "--output-dir", str(tmp_path)]) == 2
    assert "is not empty: give a new --output-dir" in capsys.readouterr().err
    assert main(["drill", "--kinds"]) == 0
    assert "SIGSTOP of one" in capsys.readouterr().out


def test_continued_after():
    assert continued_after("a\nContinuing after step 1,204.\nb") == 1204 and continued_after("Training") == 0


def test_ctrl_c_leaves_no_process(tmp_path):
    directory = tmp_path / "drill"
    command = [sys.executable, "-m", "jaxcoder.cli.main", "drill", "--faults", "1", "--output-dir", str(directory)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(processes_of(directory)) < 3 and time.monotonic() < deadline:  # the drill and its two trainers
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in log, log
    assert processes_of(directory) == [] and not directory.exists()


def processes_of(directory: Path) -> list[int]:
    """Processes whose command line names the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(directory).encode() in words:
                found.append(int(entry.name))
    return found


def test_a_manifest_that_the_drill_damaged_is_not_complete(tmp_path):
    """Its modification time is the drill's, not the trainer's."""
    manifest = tmp_path / "run" / "checkpoints" / "12" / MANIFEST
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}" * 50)
    run = RunFiles(tmp_path / "run")
    assert run.complete_steps() == [12]
    time.sleep(0.02)
    assert MANIFEST in run.damage_newest("flip", random.Random(0))
    assert run.complete_steps() == []
