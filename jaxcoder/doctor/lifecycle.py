"""Rules about starts and ends: failures, restarts, the watchdog, the schedule, damaged checkpoints, changes of code."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from jaxcoder.config.schedule import learning_rate
from jaxcoder.config.schema import RunConfig
from jaxcoder.doctor.findings import Finding, changed, train_command
from jaxcoder.formatting import format_bytes, format_duration, format_ranges, plural
from jaxcoder.record.events import text
from jaxcoder.record.goodput import Attempt
from jaxcoder.record.run_record import RunRecord, Stack
from jaxcoder.record.status import exit_reason, silent_for, status

# Thresholds.
LOOP = 3  # starts in a row without progress; two may be one lost machine and its replacement
SCHEDULE = 1.25  # cycle of the cosine relative to the run: beyond that the loss is worse (Hoffmann et al. 2022, app. B)
WARMUP = 0.2  # share of the run; ten times 2 %, the longest warm-up of the StarCoder family (SantaCoder)
RATE = 1e-3  # relative difference of learning rates; rounding in float32 is below 1e-5


def not_moving(record: RunRecord) -> Iterator[Finding]:
    """The last event is older than the run's own watchdog allows, and none is an end."""
    silent = silent_for(record)
    if silent is None:
        return
    hosts = record.goodput.attempts[-1].begin.get("hosts")
    where = f" on {hosts[0]}" if isinstance(hosts, list) and hosts else ""
    yield Finding(
        "error",
        f"The run makes no progress: its last event is {format_duration(silent)} old, and it has not ended.",
        evidence=(f"last seen after step {record.last_step:,}; a running process writes every ten seconds",),
        try_next=(
            f"check whether process 0 is running{where}: `pgrep -af jaxcoder`, and the scheduler's log for kills and "
            "lost machines",
            "if not, the same command continues from the newest checkpoint: " + train_command(record),
        ),
    )


def failures(record: RunRecord) -> Iterator[Finding]:
    """Starts that died without an end event or ended with an error; an error if the last one did."""
    attempts = record.goodput.attempts
    failed = [(number, attempt) for number, attempt in enumerate(attempts, 1) if attempt.reason in ("died", "error")]
    if not failed:
        return
    is_down, has_died = attempts[-1].reason == "error", any(attempt.reason == "died" for _, attempt in failed)
    evidence = [f"start {number}, after step {each.last_step or 0:,}: {exit_reason(each)}" for number, each in failed]
    advice = []
    if has_died:
        if len(memory := record.columns["host_memory"].finite()):
            evidence.append(f"the memory of process 0 was at most {format_bytes(memory.values.max())}")
        advice.append(
            "a process without an end event was killed from outside: `dmesg -T | grep -i -e 'out of memory' -e killed` "
            "on its host, the scheduler's log, preemptions"
        )
    if is_down:
        advice.append("follow the message, then continue: " + train_command(record))
    yield Finding(
        "error" if is_down else "warning",
        f"{plural(len(failed), 'start')} of {len(attempts)} failed"
        + (", including the last." if is_down else ", and the run continued."),
        evidence=tuple(evidence[-9:]),
        try_next=tuple(advice),
    )


def restarts_loop(record: RunRecord) -> Iterator[Finding]:
    """LOOP or more consecutive starts failed without progress."""
    attempts = record.goodput.attempts
    longest: list[tuple[int, Attempt]] = []
    row: list[tuple[int, Attempt]] = []
    reached = -1
    for number, attempt in enumerate(attempts, 1):
        last = attempt.last_step or 0
        if not attempt.failed:
            row = []
        elif row and last <= reached and attempt.ready == row[0][1].ready:  # nothing was saved between them
            row.append((number, attempt))
        else:
            row = [(number, attempt)]
        reached = max(reached, last)
        longest = row if len(row) >= len(longest) else longest
    if len(longest) < LOOP:
        return
    steps = sorted({attempt.last_step or 0 for _, attempt in longest})
    # The start after the row may be running, or finished.
    is_now = not any(attempt.failed for attempt in attempts[longest[-1][0] :]) and record.reason != "finished"
    has_started = any(attempt.ready is not None for _, attempt in longest)
    where = f"after step {format_ranges(steps)}" if has_started else "before the first step"
    yield Finding(
        "error" if is_now else "warning",
        f"{len(longest)} starts in a row failed {where} without progress.",
        evidence=tuple(f"start {number}: {exit_reason(attempt)}" for number, attempt in longest[-6:]),
        traced=(steps[-1] + 1,) if has_started else (),
        try_next=(
            "a failure that repeats at the same step is caused by its batch or its checkpoint: read the message "
            "above, inspect the batch, or move the newest checkpoint away so that the one before it is used: "
            f"`jaxcoder checkpoint inspect {record.path} --verify`",
            "try one start on other machines",
        ),
    )


def watchdog(record: RunRecord) -> Iterator[Finding]:
    """Processes ended by their watchdogs, and the silent process in their messages."""
    ends = [
        (number, text(end.get("message")))
        for number, attempt in enumerate(record.goodput.attempts, 1)
        for end in attempt.ends
        if text(end.get("reason")) == "watchdog"
    ]
    if not ends and not record.stacks:
        return
    messages = [message for _, message in ends] + [stack.reason for stack in record.stacks]
    messages = [message for message in dict.fromkeys(messages) if message]
    frames = [f"stacks/{stack.name}: {frame}" for stack in record.stacks if (frame := main_frame(stack))]
    silent = Counter(name for message in messages if (name := message.rpartition("): ")[2].rstrip(".")))
    suspect = f": {silent.most_common(1)[0][0]}" if silent else ""
    limit, seconds = "step", 1800
    if messages and all("watchdog.start_seconds" in message for message in messages):
        limit, seconds = "start", 7200
    yield Finding(
        "error" if record.reason == "watchdog" else "warning",
        f"The watchdog ended {plural(len({number for number, _ in ends}) or 1, 'start')}{suspect}.",
        evidence=(*messages[:6], *frames[:8]),
        try_next=(
            "inspect that process on its host: its log, `dmesg -T`, `nvidia-smi`; the stacks of the others are in "
            f"{record.path}/stacks",
            "if steps, saves or starts are sometimes slower than the limit, raise it: "
            + train_command(record, f"--watchdog.{limit}-seconds {seconds}"),
        ),
    )


def main_frame(stack: Stack) -> str:
    """Where the main thread of a process was: "array.py:623 in _value, from loop.py:298 in take_step"; "" if unknown.

    faulthandler separates threads by blank lines, the most recent call first, and writes the main thread last.
    """
    threads = [block for block in stack.text.split("\n\n") if 'File "' in block]
    frames = re.findall(r'File "([^"]*)", line (\d+) in (\S+)', threads[-1]) if threads else []
    if not frames:
        return ""
    places = [
        (f"{path.rsplit('/', 1)[-1]}:{line} in {function}", "/jaxcoder/" in path) for path, line, function in frames
    ]
    newest = places[0][0]
    caller = next((place for place, is_jaxcoder in places if is_jaxcoder), newest)
    return newest if caller == newest else f"{newest}, from {caller}"


def schedule_ended(record: RunRecord) -> Iterator[Finding]:
    """The schedule does not match num_steps, or the logged rates do not match the configuration."""
    if record.config is None:
        return
    config, optimizer = record.config, record.config.optimizer
    num_steps, warmup = config.num_steps, optimizer.warmup_steps
    rates = record.columns["learning_rate"].finite()
    decay = num_steps if optimizer.decay_steps is None else optimizer.decay_steps
    if record.reason == "finished" and record.last_step < num_steps:
        yield Finding(
            "warning",
            f"The run finished at step {record.last_step:,}, and its configuration now asks for {num_steps:,}.",
            evidence=(f"last learning rate {rates.last:.2g}" if len(rates) else "num_steps was raised afterwards",),
            try_next=(
                "the learning rate will jump where the run continues, because its schedule is stretched: "
                + changed(record),
            ),
        )
    if len(rates):
        yield from _not_as_configured(record, config)
    if decay * SCHEDULE < num_steps:
        reached = int((rates.steps >= decay).sum())
        yield Finding(
            "warning" if reached else "note",
            f"The schedule ends early: the learning rate is at its floor from step {decay:,} on, of {num_steps:,}.",
            evidence=(
                f"optimizer.decay_steps {decay:,}, floor {optimizer.final_learning_rate:.2g}; {reached:,} steps were "
                "logged at it",
            ),
            try_next=(
                changed(record, "--optimizer.decay-steps None"),
                "or end the run there: " + changed(record, f"--num-steps {decay}"),
            ),
        )
    elif decay > SCHEDULE * num_steps:
        yield Finding(
            "note",
            f"The run ends before its schedule: step {num_steps:,} of {decay:,} that the learning rate decays over.",
            evidence=(
                f"it ends at {float(learning_rate(optimizer, num_steps, num_steps)):.2g}, the floor is "
                f"{optimizer.final_learning_rate:.2g}",
            ),
            try_next=("decay to the end: " + changed(record, "--optimizer.decay-steps None"),),
        )
    if warmup > WARMUP * num_steps:
        highest = f"highest learning rate logged {rates.values.max():.2g}, " if len(rates) else ""
        yield Finding(
            "warning",
            f"The warm-up takes {warmup:,} of {num_steps:,} steps.",
            evidence=(f"{highest}peak {optimizer.peak_learning_rate:.2g}",),
            try_next=(changed(record, f"--optimizer.warmup-steps {max(num_steps // 50, 1)}"),),
        )


def _not_as_configured(record: RunRecord, config: RunConfig) -> Iterator[Finding]:
    rates = record.columns["learning_rate"].finite()
    expected = learning_rate(config.optimizer, rates.steps, config.num_steps)
    difference = np.abs(rates.values - expected) / np.maximum(expected, 1e-12)
    steps = rates.steps[difference > RATE]
    if not len(steps):
        return
    worst = int(difference.argmax())
    yield Finding(
        "warning",
        f"The learning rate of {len(steps):,} logged steps is not that of the configuration: num_steps or optimizer "
        "was changed during the run.",
        evidence=(
            f"steps {steps[0]:,} to {steps[-1]:,}; at {rates.steps[worst]:,} it was {rates.values[worst]:.2g} instead "
            f"of {expected[worst]:.2g}",
            f"last {rates.last:.2g} at step {rates.steps[-1]:,} of {config.num_steps:,}",
        ),
        try_next=(
            f"compare {record.path}/config.json with the configs of its checkpoints: `jaxcoder checkpoint inspect "
            f"{record.path}`",
        ),
    )


def damaged_checkpoints(record: RunRecord) -> Iterator[Finding]:
    """Checkpoints without a manifest or with damaged files."""
    bad = {step: problem for step, problem in record.checkpoints.items() if problem}
    complete = [step for step in record.checkpoints if step not in bad]
    newest = max(record.checkpoints, default=0)
    is_writing = record.reason == "open" and silent_for(record) is None
    if not bad or (is_writing and set(bad) == {newest} and "manifest" in bad[newest]):
        return
    newest_complete = "none is complete"
    if complete:
        newest_complete = f"the newest complete one is of step {max(complete):,}; the run is at {record.last_step:,}"
    yield Finding(
        "warning" if complete else "error",
        f"{plural(len(bad), 'checkpoint')} of {len(record.checkpoints)} cannot be used.",
        evidence=(*(f"step {step:,}: {problem}" for step, problem in list(bad.items())[-6:]), newest_complete),
        try_next=(
            f"`jaxcoder checkpoint inspect {record.path} --verify`",
            "a restart uses the newest complete one; check the disk of the others: free space, quota, errors",
        ),
    )


def code_changed(record: RunRecord) -> Iterator[Finding]:
    """Starts with another version of the code or of JAX, or on other devices."""
    keys = ("version", "code", "jax", "devices", "device_kind", "processes", "mesh")
    starts = [(number, each) for number, each in enumerate(record.goodput.attempts, 1) if each.begin]
    evidence = []
    for (_, before), (number, attempt) in itertools.pairwise(starts):
        values = {key: (before.begin.get(key), attempt.begin.get(key)) for key in keys}
        changes = [f"{key} {old} to {new}" for key, (old, new) in values.items() if old != new]
        if changes:
            evidence.append(f"start {number}, after step {attempt.ready or 0:,}: {'; '.join(changes)}")
    if evidence:
        yield Finding(
            "note",
            "The run was continued with other code or on other devices.",
            evidence=tuple(evidence[-6:]),
            try_next=("compare losses and speeds before and after these steps",),
        )


def cannot_be_read(record: RunRecord) -> Iterator[Finding]:
    """Files that are missing or of another version."""
    if record.config_problem:
        yield Finding(
            "warning",
            "The configuration of the run cannot be read.",
            evidence=(record.config_problem,),
            try_next=("rules that need the configuration were skipped",),
        )
    if not record.events:
        yield Finding(
            "note",
            f"There is no events.jsonl: {status(record)}.",
            evidence=("starts, ends, and the time between them are not known",),
            try_next=("only metrics were checked",),
        )
    elif not record.columns.numbers:
        yield Finding(
            "note",
            "No step has been logged yet.",
            evidence=(status(record),),
            try_next=("run the doctor again after the first steps",),
        )
