"""The doctor: no findings for a healthy run; each injected fault is found by its own rule."""

import dataclasses
import math
import random

import numpy as np
import pytest
from made_runs import STARTED, attempt_events, evaluation, healthy, hosts, step_record

from jaxcoder.doctor.diagnose import RULES, describe, examine
from jaxcoder.doctor.findings import SEVERITIES, train_command
from jaxcoder.record.run_record import read_run

STACK = """step 400 has taken longer than 60 seconds (watchdog.step_seconds): process 2 (host-2) has not\
 answered for 61 seconds.
Current thread 0x00007f02 (most recent call first):
  File "/site/jaxcoder/runtime/watchdog.py", line 193 in _last_words

Thread 0x00007f03 (most recent call first):
  File "/usr/lib/python3.12/threading.py", line 355 in wait

Thread 0x00007f01 (most recent call first):
  File "/site/jax/_src/array.py", line 623 in _value
  File "/site/jax/_src/api.py", line 2275 in _device_get
  File "/site/jaxcoder/train/step_log.py", line 93 in flush
  File "/site/jaxcoder/train/loop.py", line 298 in take_step
"""


def findings_of(run, tmp_path, rule=None):
    found = examine(run.read(tmp_path / "run"))
    return [finding for finding in found if rule is None or finding.rule == rule]


def with_config(run, **parts):
    """parts: field=value, or field={...} of a part of the configuration."""
    values = {
        name: dataclasses.replace(getattr(run.config, name), **value) if isinstance(value, dict) else value
        for name, value in parts.items()
    }
    run.config = dataclasses.replace(run.config, **values)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_run_has_no_findings(tmp_path, seed):
    record = healthy(seed=seed).read(tmp_path / "run")
    assert examine(record) == []
    text = describe(record, [])
    assert "Nothing found." in text and all(what in " ".join(text.split()) for _, what in RULES)


def test_short_runs_have_no_findings(tmp_path):
    short = healthy(40)
    for event in short.of("saved"):
        event["seconds"] = 1.0
    assert findings_of(short, tmp_path) == []
    begun = healthy()
    begun.metrics, begun.checkpoints = [], {}
    begun.events, begun.now = begun.events[:1], STARTED + 60
    assert [finding.severity for finding in findings_of(begun, tmp_path / "begun")] == ["note"]


def test_an_unfinished_run_has_no_findings(tmp_path):
    run = healthy()
    run.metrics = [record for record in run.metrics if record["step"] <= 640]
    run.events = [event for event in run.events if event.get("step", 0) <= 640]
    run.now = run.events[-1]["time"] + 20
    run.checkpoints = {500: True, 600: False}  # the newest is being written
    assert findings_of(run, tmp_path) == []


# --- faults: each changes the records of a healthy run ---


def rising_gradients(run):
    for record in run.steps():
        record["grad_norm"] *= 1 + max(record["step"] - 600, 0) / 60


def spiking_gradients(run):
    for record in run.steps():
        if record["step"] in (310, 640, 641):
            record["grad_norm"] *= 40


def spiking_loss(run):
    for record in run.steps():
        if 500 <= record["step"] < 504:
            record["loss"] += 3


def not_finite(run):
    for count, record in enumerate(run.steps()[699:712], 1):
        record |= {"loss": "NaN", "grad_norm": "NaN", "skipped": 1, "skipped_steps": count}


def no_learning(run):
    for record in run.steps():
        record["loss"] = math.log(4096) + 0.01 * (record["step"] % 3)


def diverged(run):
    for record in run.steps():
        record["loss"] += max(record["step"] - 700, 0) / 100


def too_fast(run):
    for record in run.steps():
        record["loss"] += 30 * math.exp(-((record["step"] - 150) ** 2) / 5000)


def plateau(run):
    for record in run.steps():
        record["loss"] = max(record["loss"], 5.0 + 0.01 * (record["step"] % 3))


def language_rises(run):
    for record in run.evaluations():
        record["eval/lang/haskell/bits_per_byte"] = 1.0 + record["step"] / 4000


def corpus_stuck(run):
    for record in run.evaluations():
        record["eval/corpus/issues/bits_per_byte"] = 1.9


def memorized(run):
    for record in run.evaluations():
        record["eval/loss"] += max(record["step"] - 500, 0) / 500
        record["eval/bits_per_byte"] = record["eval/loss"] / 2.2


def no_context(run):
    for record in run.evaluations():
        record |= {
            key: record["eval/loss"] for key in record if key.startswith("eval/position/") and key.endswith("/loss")
        }


def end_of_context(run):
    for record in run.evaluations():
        record["eval/position/512-1023/loss"] *= 1.2


def no_fim(run):
    for record in run.steps():
        record["fim_share"] /= 2


def all_spm(run):
    for record in run.steps():
        record["fim_spm_share"] = 1.0


def same_batches(run):
    for record in run.steps():
        record["batch_hash"] = record["step"] % 100


def waiting(run):
    for record in run.steps():
        record["data_wait"] = 0.5


def slow_host(run):
    run.metrics = [record for record in run.metrics if "hosts/count" not in record]
    run.metrics += [hosts(step, "host-2", 0.4) for step in range(50, 1001, 50)]


def blocking_saves(run):
    for record in run.metrics:
        if "checkpoint_seconds" in record:
            record["checkpoint_seconds"] = 90.0
    for event in run.of("saved"):
        event["blocked"] = 90.0


def long_saves(run):
    for event in run.of("saved"):
        event["seconds"] = 400.0


def rare_saves(run):
    run.events = attempt_events("a", STARTED, 0, 450)
    run.events += attempt_events("b", run.events[-1]["time"] + 5, 0, 1000, reason="finished")


def low_goodput(run):
    run.events = attempt_events(
        "a", STARTED, 0, 500, reason="SIGTERM", message="stopped after step 500, which is saved."
    )
    run.events += attempt_events("b", run.events[-1]["time"] + 2000, 500, 1000, reason="finished")


def cold_cache(run):
    run.events = attempt_events("a", STARTED, 0, 500, compile_seconds=120, reason="SIGTERM", message="stopped.")
    run.events += attempt_events("b", run.events[-1]["time"] + 1, 500, 1000, compile_seconds=118, reason="finished")


def loop(run):
    run.events = attempt_events("a", STARTED, 0, 620)
    for name in "bcd":
        again = attempt_events(name, run.events[-1]["time"] + 10, 600, 620)
        run.events += again + [
            again[-1] | {"event": "end", "reason": "error", "message": "The batch of step 621 is torn."}
        ]


def crashed(run):
    run.events = attempt_events("a", STARTED, 0, 1000, reason="error", message="The disk is full.")


def ended_early(run):
    with_config(run, num_steps=4000)


def floor_early(run):
    with_config(run, optimizer={"decay_steps": 500})
    for record in run.steps():
        record["learning_rate"] = 3e-5 if record["step"] >= 500 else record["learning_rate"]


def long_warmup(run):
    with_config(run, optimizer={"warmup_steps": 800})
    for record in run.steps():
        record["learning_rate"] = 3e-4 * record["step"] / 800


def other_schedule(run):
    for record in run.steps():
        record["learning_rate"] *= 2 if record["step"] > 300 else 1


def slower(run):
    for record in run.steps():
        for key in ("flops_per_second_per_device", "tokens_per_second", "mfu"):
            record[key] *= 1 - record["step"] / 4000


def growing(run):
    for record in run.steps():
        record["host_memory"] = 4 * 10**9 + record["step"] * 10**7


def growing_device(run):
    for record in run.steps():
        record["device_memory"] += record["step"] * 10**7


def stuck_process(run):
    run.events = attempt_events("a", STARTED, 0, 400, reason="watchdog", message=STACK.partition("\n")[0])
    run.metrics = [record for record in run.metrics if record["step"] <= 400]
    run.stacks = {"step-400-process-0.txt": STACK}


def damaged(run):
    run.checkpoints[1000] = False


def silent(run):
    run.events = [event for event in run.events if event.get("step", 0) <= 950][:-1]
    run.metrics = [record for record in run.metrics if record["step"] <= 947]
    run.now = run.events[-1]["time"] + 5000


def other_code(run):
    run.events = attempt_events("a", STARTED, 0, 500, reason="SIGTERM", message="stopped.")
    run.events += attempt_events("b", run.events[-1]["time"] + 1, 500, 1000, reason="finished")
    run.of("begin")[1]["code"] = "beef"


FAULTS = {
    rising_gradients: ("gradients_rise", "warning", "since about step"),
    spiking_gradients: ("gradient_spikes", "warning", "310"),
    spiking_loss: ("loss_spikes", "note", "step 500"),
    not_finite: ("skipped_steps", "error", "700 to 712"),
    no_learning: ("loss_does_not_fall", "error", "a uniform distribution over 4,096"),
    diverged: ("loss_does_not_fall", "error", "risen again"),
    too_fast: ("loss_does_not_fall", "warning", "far above its initial value"),
    plateau: ("loss_does_not_fall", "warning", "not fallen since about step"),
    language_rises: ("languages_behind", "warning", "haskell"),
    corpus_stuck: ("languages_behind", "warning", "issues"),
    memorized: ("held_out_rises", "warning", "memorized"),
    no_context: ("context_unused", "warning", "512-1023"),
    end_of_context: ("context_unused", "warning", "far end is not learned"),
    no_fim: ("fim_shares", "error", "data.fim_rate asks for 50.0%"),
    all_spm: ("fim_shares", "error", "data.fim_spm_rate"),
    same_batches: ("repeated_batches", "error", "step 101 read the batch of step 1"),
    waiting: ("data_wait", "warning", "25%"),
    slow_host: ("slow_hosts", "warning", "Host host-2 (process 2)"),
    blocking_saves: ("checkpoints_block", "warning", "1:30"),
    long_saves: ("checkpoints_block", "warning", "6:40"),
    rare_saves: ("checkpoints_rare", "warning", "450 steps were lost"),
    low_goodput: ("low_goodput", "warning", "down between starts: 33:12"),
    cold_cache: ("compiles_again", "warning", "2:00 at the first start, 1:58 later"),
    loop: ("restarts_loop", "error", "The batch of step 621 is torn."),
    crashed: ("failures", "error", "The disk is full."),
    ended_early: ("schedule_ended", "warning", "asks for 4,000"),
    floor_early: ("schedule_ended", "warning", "at its floor from step 500"),
    long_warmup: ("schedule_ended", "warning", "The warm-up takes 800 of 1,000"),
    other_schedule: ("schedule_ended", "warning", "700 logged steps"),
    slower: ("throughput_decays", "warning", "gradually"),
    growing: ("memory_grows", "warning", "process 0"),
    growing_device: ("memory_grows", "warning", "a device"),
    stuck_process: ("watchdog", "error", "1 start: process 2 (host-2) has not answered for 61 seconds."),
    damaged: ("damaged_checkpoints", "warning", "step 1,000: it has no manifest.json"),
    silent: ("not_moving", "error", "1:23:20"),
    other_code: ("code_changed", "note", "code c0de to beef"),
}
ALSO_FOUND = {
    diverged: {"held_out_rises"},
    too_fast: {"loss_spikes"},
    rare_saves: {"failures", "low_goodput"},
    cold_cache: {"low_goodput"},
    loop: {"failures", "checkpoints_rare"},
    silent: {"damaged_checkpoints"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(tmp_path, fault):
    rule, severity, text = FAULTS[fault]
    run = healthy()
    fault(run)
    record = run.read(tmp_path / "run")
    found = examine(record)
    own = [finding for finding in found if finding.rule == rule and finding.severity == severity]
    assert own, [finding.what for finding in found]
    assert text in " ".join(" ".join((finding.what, *finding.evidence)) for finding in own)
    others = {finding.rule for finding in found} - {rule} - ALSO_FOUND.get(fault, set())
    assert not others, [finding.what for finding in found]
    for finding in found:
        assert finding.severity in SEVERITIES and finding.evidence and finding.try_next
        assert finding.what.endswith(".") and finding.what in " ".join(describe(record, found, width=10_000).split())
    assert any("`" in advice for advice in own[0].try_next) or rule in (
        "code_changed",
        "languages_behind",
        "held_out_rises",
    )


def test_every_rule_has_a_fault():
    fired = {rule for rule, _, _ in FAULTS.values()} | {"cannot_be_read"}
    assert fired == {rule.__name__ for rule, _ in RULES}


def test_the_silent_process_and_stacks_of_the_others(tmp_path):
    run = healthy()
    stuck_process(run)
    (finding,) = findings_of(run, tmp_path, "watchdog")
    assert "stacks/step-400-process-0.txt: array.py:623 in _value, from step_log.py:93 in flush" in finding.evidence


def test_batches_are_traced(tmp_path):
    run = healthy()
    spiking_loss(run)
    record = run.read(tmp_path / "run")
    asked = []
    (finding,) = examine(record, lambda step: asked.append(step) or [f"step {step}: octocat/hello main.py"] * 30)
    assert asked == [500] and "step 500: octocat/hello main.py" in finding.evidence
    assert sum("octocat" in line for line in finding.evidence) == 10 and "and 20 more lines" in finding.evidence[-1]


def test_the_suggested_interval_is_youngs(tmp_path):
    run = healthy()
    rare_saves(run)
    (finding,) = findings_of(run, tmp_path, "checkpoints_rare")
    wall = run.read(tmp_path / "run").goodput.wall
    steps = int(finding.try_next[0].rstrip("`").split()[-1])
    assert steps == pytest.approx(
        math.sqrt(2 * 1.0 * wall) / 2.0, rel=0.1
    )  # one failure; a save costs a second at least


def test_fim_shares_within_chance_are_fine(tmp_path):
    draw = random.Random(5)
    for trial in range(10):
        run = healthy(100, seed=trial)
        for record in run.steps():
            pieces = draw.randrange(1, 9)
            fim = sum(draw.random() < 0.47 for _ in range(pieces))  # a little lower: pieces that are cut
            record |= {"pieces": pieces, "fim_share": fim / pieces}
            record["fim_spm_share"] = sum(draw.random() < 0.5 for _ in range(fim)) / fim if fim else "NaN"
        assert findings_of(run, tmp_path / str(trial), "fim_shares") == []


def test_random_tokens_are_not_learned(tmp_path):
    run = healthy()
    no_learning(run)
    with_config(run, data={"store": "synthetic"})
    assert findings_of(run, tmp_path) == []


def test_old_runs_and_configurations_of_other_versions(tmp_path):
    run = healthy()
    path = run.write(tmp_path / "run")
    (path / "events.jsonl").unlink()
    (path / "config.json").write_text('{"name": "of the future", "warp": 9}')
    found = examine(read_run(str(path), now=run.now))
    assert {finding.rule for finding in found} == {"cannot_be_read"}
    assert "warp is unknown" in " ".join(line for finding in found for line in finding.evidence)


def test_invalid_values(tmp_path):
    draw = np.random.default_rng(0)
    run = healthy(200)
    for record in run.metrics:
        for key in list(record):
            if key != "step" and draw.random() < 0.2:
                record[key] = draw.choice(["NaN", "Infinity", "-Infinity", "text"])
    run.metrics += [{"step": 3}, {"step": 10**15, "loss": 1e308}, {"step": 0, "grad_norm": -1e308}]
    describe(record := run.read(tmp_path / "run"), examine(record), width=80)


def test_an_evaluation_alone(tmp_path):
    run = healthy()
    run.metrics = [evaluation(run.config, 100), step_record(run.config, 1, random.Random(0))]
    assert {finding.rule for finding in findings_of(run, tmp_path)} <= {"cannot_be_read", "schedule_ended"}


def test_the_command_of_the_run_with_options_replaced(tmp_path):
    run = healthy(20)
    run.of("begin")[0]["command"] = (
        "jaxcoder train made --num-steps=20 --optimizer.peak_learning_rate 3e-4 --tensorboard --steps 3"
    )
    record = run.read(tmp_path / "run")
    command = train_command(record, "--optimizer.peak-learning-rate 1e-4", "--num-steps 9", "--accept-config-change")
    assert command == (
        "`jaxcoder train made --tensorboard --steps 3 --optimizer.peak-learning-rate 1e-4 --num-steps 9 "
        "--accept-config-change`"
    )
    del run.of("begin")[0]["command"]
    assert train_command(run.read(tmp_path / "other")).startswith("`jaxcoder train made ... --output-dir ")
