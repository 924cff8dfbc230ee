"""Rules about how a run lived and ended: failures, restarts, the watchdog, the schedule, checkpoints that are torn."""

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from jaxcoder.config.schedule import learning_rate
from jaxcoder.config.schema import RunConfig
from jaxcoder.doctor.findings import Finding, changed, rate, train_command
from jaxcoder.formatting import format_bytes, format_duration, plural
from jaxcoder.record.events import text
from jaxcoder.record.goodput import Attempt
from jaxcoder.record.run_record import RunRecord, Stack
from jaxcoder.record.summary import how_ended, ranges, silent_for, status


def not_moving(record: RunRecord) -> Iterator[Finding]:
    """The last event is old, and none says that the run has ended."""
    silent = silent_for(record)
    if silent is None:
        return
    attempt = record.goodput.attempts[-1]
    hosts = attempt.begin.get("hosts")
    where = f" on {hosts[0]}" if isinstance(hosts, list) and hosts else ""
    yield Finding(
        rule="not_moving",
        severity="error",
        what=f"The run is not moving: it has said nothing for {format_duration(silent)} and never that it ended.",
        evidence=(f"last seen after step {record.last_step:,}; while it lives it writes every ten seconds",),
        try_next=(
            f"see whether process 0 lives{where}: `pgrep -af jaxcoder`, and the scheduler's log for kills and lost "
            "machines",
            "if it is dead, the same command goes on from the newest checkpoint: " + train_command(record),
        ),
    )


def failures(record: RunRecord) -> Iterator[Finding]:
    """Starts that died without a word or ended with an error; the last one counts most."""
    attempts = record.goodput.attempts
    failed = [(number, attempt) for number, attempt in enumerate(attempts, 1) if attempt.reason in ("died", "error")]
    if not failed:
        return
    is_down = attempts[-1].reason == "error"
    died = sum(attempt.reason == "died" for _, attempt in failed)
    told = [
        f"start {number}, after step {attempt.last_step or 0:,}: {how_ended(attempt)}" for number, attempt in failed
    ]
    memory = record.columns["host_memory"].finite()
    if died and len(memory):
        told.append(f"the memory of process 0 was at most {format_bytes(memory.values.max())}")
    advice = []
    if died:
        advice.append("a process that dies without a word was killed from outside: `dmesg -T | grep -i -e 'out of "
                      "memory' -e killed` on its "
                      "host, the scheduler's log, preemptions")  # fmt: skip
    if is_down:
        advice.append("do what the sentence says, then go on: " + train_command(record))
    yield Finding(
        rule="failures",
        severity="error" if is_down else "warning",
        what=f"{plural(len(failed), 'start')} of {len(attempts)} failed"
        + (", the last one too." if is_down else ", and the run went on."),
        evidence=tuple(told[-9:]),
        try_next=tuple(advice) or (f"see every end: `jaxcoder report {record.path}`",),
    )


def restarts_loop(record: RunRecord) -> Iterator[Finding]:
    """Three starts in a row, or more, that failed without getting further."""
    attempts = record.goodput.attempts
    best: list[tuple[int, Attempt]] = []
    row: list[tuple[int, Attempt]] = []
    reached = -1
    for number, attempt in enumerate(attempts, 1):
        last = attempt.last_step or 0
        if not attempt.failed:
            row = []
        elif row and last <= reached and attempt.ready == row[0][1].ready:  # nor was anything saved between them
            row.append((number, attempt))
        else:
            row = [(number, attempt)]
        reached = max(reached, last)
        best = row if len(row) >= len(best) else best
    if len(best) < 3:
        return
    steps = sorted({attempt.last_step or 0 for _, attempt in best})
    same = len(steps) == 1
    is_now = best[-1][0] == len(attempts) or (best[-1][0] == len(attempts) - 1 and not attempts[-1].failed)
    never = all(attempt.ready is None for _, attempt in best)
    at = f"after step {steps[-1]:,}" if same else f"after steps {ranges(steps)}"
    where = "before the first step" if never else at
    yield Finding(
        rule="restarts_loop",
        severity="error" if is_now else "warning",
        what=f"{len(best)} starts in a row failed {where} without getting further.",
        evidence=tuple(f"start {number}: {how_ended(attempt)}" for number, attempt in best[-6:]),
        traced=() if never else (steps[-1] + 1,),
        try_next=(
            "a failure that comes back at the same step comes from its data or from its checkpoint: read the "
            "sentence above, look at the batch, or move the newest checkpoint away so that the one before it is "
            f"used: `jaxcoder checkpoint inspect {record.path} --verify`",
            "try one start on other machines",
        ),
    )


def watchdog(record: RunRecord) -> Iterator[Finding]:
    """Processes that their watchdogs ended, and the silent one that the stacks name."""
    ended = [
        (number, end)
        for number, attempt in enumerate(record.goodput.attempts, 1)
        for end in attempt.ends
        if text(end.get("reason")) == "watchdog"
    ]
    if not ended and not record.stacks:
        return
    sentences = [text(end.get("message")) for _, end in ended] + [stack.sentence for stack in record.stacks]
    told = list(dict.fromkeys(sentence for sentence in sentences if sentence))
    stuck = [f"stacks/{stack.name}: {place}" for stack in record.stacks if (place := main_frame(stack))]
    again = record.reason == "watchdog"
    count = max(len({number for number, _ in ended}), 1 if record.stacks else 0)
    suspects = Counter(said for sentence in told if (said := sentence.rpartition("): ")[2].rstrip(".")))
    suspect = f": {suspects.most_common(1)[0][0]}" if suspects else ""
    limit = "start" if told and all("watchdog.start_seconds" in sentence for sentence in told) else "step"
    yield Finding(
        rule="watchdog",
        severity="error" if again else "warning",
        what=f"The watchdog ended {plural(count, 'start')}{suspect}.",
        evidence=tuple(told[:6]) + tuple(stuck[:8]),
        try_next=(
            "look at the process that is named, on its host: its log, `dmesg -T`, `nvidia-smi`; where others waited "
            f"is in {record.path}/stacks",
            "if steps, saves or starts are slower than the limit at times, raise it: "
            + train_command(record, f"--watchdog.{limit}-seconds {1800 if limit == 'step' else 7200}"),
        ),
    )


def main_frame(stack: Stack) -> str:
    """Where the main thread of a process stood: "array.py:623 in _value, from loop.py:298 in take_step"; "" if unknown.

    Of faulthandler's text: threads apart by blank lines, the most recent call first, the main thread last.
    """
    blocks = [block for block in stack.text.split("\n\n") if 'File "' in block]
    if not blocks:
        return ""
    frames = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', blocks[-1])
    told = [f"{path.rsplit('/', 1)[-1]}:{line} in {function}" for path, line, function in frames]
    ours = [place for place, (path, _, _) in zip(told, frames, strict=True) if "/jaxcoder/" in path]
    if not told:
        return ""
    return told[0] if not ours or ours[0] == told[0] else f"{told[0]}, from {ours[0]}"


def schedule_ended(record: RunRecord) -> Iterator[Finding]:
    """The learning rate was at its floor long before the end, never reaches it, or is not the configuration's."""
    if record.config is None:
        return
    config, optimizer = record.config, record.config.optimizer
    rates = record.columns["learning_rate"].finite()
    decay = config.num_steps if optimizer.decay_steps is None else optimizer.decay_steps
    if record.reason == "finished" and record.last_step < config.num_steps:
        yield Finding(
            rule="schedule_ended",
            severity="warning",
            what=f"The run finished at step {record.last_step:,}, and its configuration now asks for "
            f"{config.num_steps:,}.",
            evidence=(
                f"the learning rate was {rate(rates.last)} there" if len(rates) else "num_steps was raised afterwards",
            ),
            try_next=(
                "the learning rate will jump where the run goes on, because its schedule is stretched: "
                + changed(record),
            ),
        )
    if len(rates):
        yield from _not_as_configured(record, config)
    if decay < 0.9 * config.num_steps:
        reached = int((rates.steps >= decay).sum())
        yield Finding(
            rule="schedule_ended",
            severity="warning" if reached else "note",
            what=f"The schedule ends early: the learning rate is at its floor from step {decay:,} on, of "
            f"{config.num_steps:,}.",
            evidence=(
                f"optimizer.decay_steps {optimizer.decay_steps:,}, floor {rate(optimizer.final_learning_rate)}; "
                f"{reached:,} steps logged at it",
            ),
            try_next=(
                changed(record, "--optimizer.decay-steps None"),
                "or end the run there: " + changed(record, f"--num-steps {decay}"),
            ),
        )
    elif decay > 1.05 * config.num_steps:
        end = float(learning_rate(optimizer, config.num_steps, config.num_steps))
        yield Finding(
            rule="schedule_ended",
            severity="note",
            what=f"The run ends before its schedule: step {config.num_steps:,} of {decay:,} that the learning rate "
            "decays over.",
            evidence=(f"it ends at {rate(end)}, the floor is {rate(optimizer.final_learning_rate)}",),
            try_next=("decay to the end: " + changed(record, "--optimizer.decay-steps None"),),
        )
    if optimizer.warmup_steps > 0.5 * config.num_steps:
        yield Finding(
            rule="schedule_ended",
            severity="warning",
            what=f"The warm-up takes {optimizer.warmup_steps:,} of {config.num_steps:,} steps.",
            evidence=(
                f"highest learning rate logged {rate(float(rates.values.max()))}, peak "
                f"{rate(optimizer.peak_learning_rate)}"
                if len(rates)
                else f"peak {rate(optimizer.peak_learning_rate)}",
            ),
            try_next=(changed(record, f"--optimizer.warmup-steps {max(config.num_steps // 50, 1)}"),),
        )


def _not_as_configured(record: RunRecord, config: RunConfig) -> Iterator[Finding]:
    rates = record.columns["learning_rate"].finite()
    expected = learning_rate(config.optimizer, rates.steps, config.num_steps)
    off = np.abs(rates.values - expected) > 0.02 * np.maximum(expected, 1e-12) + 1e-12
    if off.mean() <= 0.01:
        return
    steps = rates.steps[off]
    worst = int(np.abs(np.log(np.maximum(rates.values, 1e-12) / np.maximum(expected, 1e-12))).argmax())
    yield Finding(
        rule="schedule_ended",
        severity="warning",
        what=f"The learning rate of {len(steps):,} logged steps is not that of the configuration: num_steps or "
        "optimizer was changed on the way.",
        evidence=(
            f"steps {steps[0]:,} to {steps[-1]:,}; at step {rates.steps[worst]:,} it was "
            f"{rate(float(rates.values[worst]))}, and the configuration gives {rate(float(expected[worst]))}",
            f"last {rate(rates.last)} at step {rates.steps[-1]:,} of {config.num_steps:,}",
        ),
        try_next=(
            f"compare {record.path}/config.json with the configs of its checkpoints: `jaxcoder checkpoint inspect "
            f"{record.path}`",
        ),
    )


def damaged_checkpoints(record: RunRecord) -> Iterator[Finding]:
    """Checkpoints without a manifest, or with damage that whoever looked into them has found."""
    bad = {step: problem for step, problem in record.checkpoints.items() if problem}
    whole = [step for step, problem in record.checkpoints.items() if not problem]
    newest = max(record.checkpoints, default=0)
    if set(bad) == {newest} and record.reason == "open" and silent_for(record) is None and "manifest" in bad[newest]:
        return  # it is being written
    if not bad:
        return
    yield Finding(
        rule="damaged_checkpoints",
        severity="warning" if whole else "error",
        what=f"{plural(len(bad), 'checkpoint')} of {len(record.checkpoints)} cannot be used.",
        evidence=tuple(f"step {step:,}: {problem}" for step, problem in list(bad.items())[-6:])
        + (
            f"the newest whole one is of step {max(whole):,}; the run is at step {record.last_step:,}"
            if whole
            else "none is whole",
        ),
        try_next=(
            f"`jaxcoder checkpoint inspect {record.path} --verify`",
            "a restart uses the newest whole one; check the disk that the others lie on: free space, quota, errors",
        ),
    )


def code_changed(record: RunRecord) -> Iterator[Finding]:
    """Starts with another version of the code, of JAX, or on other devices: what changed with them is no accident."""
    told, before = [], None
    for number, attempt in enumerate(record.goodput.attempts, 1):
        if not attempt.begin:
            continue
        now = {
            key: attempt.begin.get(key)
            for key in ("version", "code", "jax", "devices", "device_kind", "processes", "mesh")
        }
        if before is not None and now != before:
            changes = "; ".join(f"{key} {before[key]} to {now[key]}" for key in now if now[key] != before[key])
            told.append(f"start {number}, after step {attempt.ready or 0:,}: {changes}")
        before = now
    if told:
        yield Finding(
            rule="code_changed",
            severity="note",
            what="The run was continued with other code or on other devices.",
            evidence=tuple(told[-6:]),
            try_next=("compare losses and speeds on both sides of these steps",),
        )


def cannot_be_read(record: RunRecord) -> Iterator[Finding]:
    """What doctor would have looked at and could not."""
    if record.config_problem:
        yield Finding(
            rule="cannot_be_read",
            severity="warning",
            what="The configuration of the run cannot be read.",
            evidence=(record.config_problem,),
            try_next=("rules that compare with the configuration were left out",),
        )
    if not record.events:
        yield Finding(
            rule="cannot_be_read",
            severity="note",
            what=f"There is no events.jsonl: {status(record)}.",
            evidence=("nothing is known of starts, ends, and the time between them",),
            try_next=("judge by the metrics alone",),
        )
    elif not record.columns.numbers:
        yield Finding(
            rule="cannot_be_read",
            severity="note",
            what="No step has been logged yet.",
            evidence=(status(record),),
            try_next=("look again after the first steps",),
        )
