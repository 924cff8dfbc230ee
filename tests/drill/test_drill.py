"""A real run under fire survives; and a drill over a trainer that is broken says so."""

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
from jaxcoder.drill.drill import DisturbedRun, FaultSchedule, drill, finish_undisturbed
from jaxcoder.drill.faults import ANY_FAILURE, InjectedFault, choose_kinds, fault_kinds
from jaxcoder.drill.processes import RunFiles, Trainer, continued_after, free_port, own_command
from jaxcoder.drill.report import DrillReport, Outcome, Verdict, compare, judge_bad_batches
from jaxcoder.drill.setup import layout_of, prepare
from jaxcoder.errors import ConfigError


def plan_of(names: list[str], *, num_steps: int, processes: int = 2, bad: dict | None = None) -> FaultSchedule:
    return FaultSchedule(kinds=names, processes=processes, num_steps=num_steps, bad_batches=bad or {})


def test_two_faults_and_two_bad_batches(tmp_path):
    """A process that is stuck, a damaged checkpoint; NaN and a spike."""
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


# --- a drill that cannot fail is none --------------------------------------------------------------------------------

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
    """A drill of one process whose undisturbed run is done."""
    directory = tmp_path_factory.mktemp("drill")
    prepare(directory, 24, {})
    trainer = Trainer(command=own_command(directory), port=free_port(), cache=directory / "cache")
    undisturbed = RunFiles(directory / "undisturbed")
    finish_undisturbed(trainer, undisturbed, layout_of(1))
    return directory, trainer, undisturbed


@pytest.mark.parametrize(
    ("name", "break_it", "said"),
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
def test_a_broken_trainer_is_found_out(alone, name, break_it, said):
    """One that forgets where in the data it was, and one that begins with new weights."""
    directory, trainer, undisturbed = alone
    program = directory / f"{name}.py"
    program.write_text(BROKEN.format(break_it=break_it))
    command = own_command(directory, program=(sys.executable, str(program)))
    broken = Trainer(command=command, port=trainer.port, cache=trainer.cache)
    run, plan = RunFiles(directory / name), plan_of(["term-all"], num_steps=24, processes=1)
    report = DrillReport(seed=1, processes=1, num_steps=24)
    DisturbedRun(broken, run, plan, random.Random(1), report).play(plan.kinds)
    report.verdicts[name] = compare(run, undisturbed, is_elastic=False)
    assert report.has_failed and said in report.text()
    assert not report.verdicts[name].is_identical


def fake_run(path: Path, steps: list[dict]) -> RunFiles:
    path.mkdir()
    lines = [{"samples": 8 * r["step"], "batch_hash": r["step"], "loss": 1.0, "skipped": 0} | r for r in steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFiles(path)


@pytest.mark.parametrize(
    ("steps", "different", "said"),
    [
        ([{"step": 1}, {"step": 2}, {"step": 3}], [], None),
        ([{"step": 1}, {"step": 3}], [], "does not hold every step once"),
        ([{"step": 1}, {"step": 2}, {"step": 2}, {"step": 3}], [], r"does not hold every step once.*\[2"),
        ([{"step": 1}, {"step": 2, "batch_hash": 7}, {"step": 3}], [], "batch_hash differs from step 2"),
        ([{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0001}], [], "losses differ by up to 1.00e-04"),
        ([{"step": 1}, {"step": 2, "skipped": 1}, {"step": 3}], [], "skipped differs from step 2"),
        ([{"step": 1}, {"step": 2}, {"step": 3}], ["params/wte"], "1 arrays of the last checkpoint differ"),
    ],
)
def test_what_a_run_is_judged_by(tmp_path, monkeypatch, steps, different, said):
    monkeypatch.setattr(drill_report, "_compare_arrays", lambda *_: {"different": different, "largest": 0.0})
    undisturbed = fake_run(tmp_path / "a", [{"step": 1}, {"step": 2}, {"step": 3}])
    verdict = compare(fake_run(tmp_path / "b", steps), undisturbed, is_elastic=False)
    if said is None:
        assert not verdict.problems and verdict.is_identical
    else:
        assert re.search(said, str(verdict)) and str(verdict).startswith("FAILED")


def test_a_curve_on_another_mesh_may_differ_a_little(tmp_path, monkeypatch):
    monkeypatch.setattr(drill_report, "_compare_arrays", lambda *_: {"different": ["x"], "largest": 1e-5})
    undisturbed = fake_run(tmp_path / "a", [{"step": 1}])
    near = fake_run(tmp_path / "b", [{"step": 1, "loss": 1.001}])
    far = fake_run(tmp_path / "c", [{"step": 1, "loss": 1.1}])
    assert not compare(near, undisturbed, is_elastic=True).problems
    assert compare(far, undisturbed, is_elastic=True).problems


def test_bad_batches_that_were_not_skipped(tmp_path):
    run = fake_run(tmp_path / "a", [{"step": 1, "grad_norm": 9.0}, {"step": 2, "skipped": 1, "grad_norm": 9.0}])
    one, other = judge_bad_batches({1: "nan", 2: "spike"}, run, first=5)
    assert "step 1 was not skipped" in one.problems and other.problems == ["step 2 was not logged"]


def test_an_outcome_is_judged_by_codes_time_and_words(alone):
    """With a start that has ended in ways that are not right."""
    directory, trainer, _ = alone
    lane = DisturbedRun(trainer, RunFiles(directory / "judged"), plan_of([], num_steps=1), None, DrillReport(
        seed=1, processes=2, num_steps=1
    ))  # fmt: skip
    lane.start = SimpleNamespace(
        wait=lambda *_: False, running=lambda: [1], codes=lambda: [0, 2], signal=lambda *_: None,
        missing_words=lambda *_: ["no process has said it"],
    )  # fmt: skip
    outcome = Outcome(number=1, kind="stop-one")
    fault = InjectedFault(detail="", codes={0: ANY_FAILURE, 1: 75}, is_named="it")
    lane._check_exits(outcome, fault)
    assert len(outcome.problems) == 4, outcome.problems
    report = DrillReport(seed=1, processes=2, num_steps=1, outcomes=[outcome], verdicts={"disturbed": Verdict()})
    assert report.has_failed and "0 of 1 faults survived" in report.text()


# --- the command -----------------------------------------------------------------------------------------------------


def test_all_kinds_come_before_one_comes_again():
    chosen = choose_kinds(2 * len(fault_kinds(2)), [], 2, random.Random(0))
    assert sorted(chosen) == sorted(2 * list(fault_kinds(2)))
    plan = FaultSchedule.draw(50, 7)
    assert len(plan.kinds) == 50 and set(plan.bad_batches.values()) == {"nan", "spike"}
    assert plan == FaultSchedule.draw(50, 7) != FaultSchedule.draw(50, 8)


def test_what_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="--only names 'kill'"):
        FaultSchedule.draw(3, 0, only=["kill"])
    with pytest.raises(ConfigError, match="--faults is 0"):
        FaultSchedule.draw(0, 0)
    (tmp_path / "mine").touch()
    assert main(["drill", "--faults", "1", "--output-dir", str(tmp_path)]) == 2
    assert "is not empty: give a new --output-dir" in capsys.readouterr().err
    assert main(["drill", "--kinds"]) == 0
    assert "SIGSTOP of one" in capsys.readouterr().out


def test_the_step_that_it_goes_on_after():
    assert continued_after("a\nContinuing after step 1,204.\nb") == 1204 and continued_after("Training") == 0


def test_ctrl_c_leaves_no_process(tmp_path):
    directory = tmp_path / "drill"
    command = [sys.executable, "-m", "jaxcoder.cli.main", "drill", "--faults", "1", "--output-dir", str(directory)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(at_work(directory)) < 3 and time.monotonic() < deadline:  # the drill and two of its own
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert at_work(directory) == [] and not directory.exists()


def at_work(directory: Path) -> list[int]:
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


def test_a_manifest_that_the_drill_itself_has_damaged_is_not_whole(tmp_path):
    """Its time of writing is the drill's then, not the trainer's."""
    manifest = tmp_path / "run" / "checkpoints" / "12" / MANIFEST
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}" * 50)
    run = RunFiles(tmp_path / "run")
    assert run.complete_steps() == [12]
    time.sleep(0.02)
    assert MANIFEST in run.damage_newest("flip", random.Random(0))
    assert run.complete_steps() == []
