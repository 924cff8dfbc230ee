"""Rules about where a run's time goes: data, hosts, checkpoints, goodput, throughput, memory."""

import math
from collections.abc import Iterator

import numpy as np

from jaxcoder.doctor.findings import Finding, profile_command, train_command
from jaxcoder.formatting import format_bytes, format_duration, plural
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.series import Series, block_medians
from jaxcoder.record.summary import CATEGORY_NAMES, ranges, recent, slowest_hosts

_LONG = 1800.0
"""Seconds of a run whose goodput says something: compiling and starting weigh little in it."""


def data_wait(record: RunRecord) -> Iterator[Finding]:
    """More than a twentieth of the time of steps goes into waiting for batches."""
    waits, steps = record.columns["data_wait"].finite(), record.columns["step_time"].finite()
    waits = waits.where(np.isfinite(steps.at(waits.steps)))
    if len(waits) < 20:
        return
    times = steps.at(waits.steps)
    share = float(waits.values.sum() / max(times.sum(), 1e-9))
    late = waits.values > 0.1 * times
    if share < 0.05 or waits.values.sum() < (1 if share > 0.3 else 5):
        return
    rare = late.mean() < 0.1
    yield Finding(
        rule="data_wait",
        severity="warning",
        what=f"Steps wait for data: {share:.0%} of their time" + (", in a few long waits." if rare else "."),
        evidence=(
            f"{waits.values.sum():,.1f} s of {times.sum():,.1f} s in {len(waits):,} steps; {late.mean():.0%} of the "
            f"steps wait for more than a tenth of their time, the longest {waits.values.max():.2f} s (step "
            f"{waits.steps[int(waits.values.argmax())]:,})",
        ),
        try_next=(
            "measure the stream alone: `jaxcoder bench loader`",
            "bring the store nearer to the hosts (a bucket in their region, or a local disk), and leave them "
            "processor cores",
        ),
    )


def slow_hosts(record: RunRecord) -> Iterator[Finding]:
    """One host is again and again behind the others by a twentieth of a step; by a fifth, when looks are few."""
    hosts = slowest_hosts(record)
    looks = sum(host.count for host in hosts)
    if looks < 2:
        return
    step = recent(record.columns["step_time"]) or 1.0
    worst = max(hosts, key=lambda host: host.count * host.behind)
    if worst.count < (0.4 if looks >= 4 else 0.9) * looks or worst.behind < (0.05 if looks >= 4 else 0.2) * step:
        return
    yield Finding(
        rule="slow_hosts",
        severity="warning",
        what=f"Host {worst} is slower than the others, and all wait for it.",
        evidence=(
            f"the slowest in {worst.count} of {looks} looks, {worst.behind:.3f} s a step behind the median; a step "
            f"takes {step:.3f} s",
        ),
        try_next=(
            f"look at it: `ssh {worst.name} top -b -n 1` (other programs?), its disk and network, its clock rate",
            "replace it, or leave it out; a profile shows what it does: `kill -USR1` of its process, or "
            + profile_command(record),
        ),
    )


def checkpoints_block(record: RunRecord) -> Iterator[Finding]:
    """Steps wait long for saves, or a save takes longer than the steps until the next one."""
    blocked = record.saved("blocked")
    if not len(blocked):
        blocked = record.columns["checkpoint_seconds"].finite()
    seconds = record.saved("seconds")
    steps = record.columns["step_time"].finite()
    if not len(blocked) or len(steps) < 20:
        return
    step = float(np.median(steps.values))
    trained = float(steps.values.sum())
    share = float(blocked.values.sum()) / max(trained, 1e-9)
    longest = int(blocked.values.argmax())
    if share > 0.03 and blocked.values.sum() > 10 or blocked.values[longest] > max(60.0, 10 * step):
        yield Finding(
            rule="checkpoints_block",
            severity="warning",
            what=f"Saving stops the steps: {share:.1%} of the time that they take themselves, "
            f"{format_duration(float(blocked.values[longest]))} at worst.",
            evidence=(
                f"{len(blocked)} saves blocked {format_duration(float(blocked.values.sum()))} in all; the longest "
                f"at step {blocked.steps[longest]:,}; a step takes {format_duration(step)}",
            ),
            try_next=(
                "save to a faster place (a bucket in the region, a local disk), or less often: "
                + train_command(record, f"--checkpoint.save-every-steps {2 * _interval(record, blocked)}"),
                "leave the hosts memory for a second copy of their share of the state",
            ),
        )
    if len(seconds) < 2:
        return
    interval = _interval(record, seconds) * step
    slow = seconds.values > interval
    if slow.mean() > 0.3:
        sizes = record.saved("bytes")
        speed = f", {format_bytes(sizes.last / max(seconds.last, 1e-9))}/s" if len(sizes) else ""
        yield Finding(
            rule="checkpoints_block",
            severity="warning",
            what="A checkpoint takes longer to write than the steps until the next one.",
            evidence=(
                f"{format_duration(float(np.median(seconds.values)))} until whole (median){speed}, and about "
                f"{format_duration(interval)} between saves",
            ),
            try_next=(
                train_command(record, f"--checkpoint.save-every-steps {_wider(seconds, step)}"),
                "write to a faster place",
            ),
        )


def _interval(record: RunRecord, saves: Series) -> int:
    """Steps between saves: the configuration's, or the median of what was done."""
    done = np.diff(saves.steps)
    if len(done):
        return max(int(np.median(done)), 1)
    return record.config.checkpoint.save_every_steps if record.config is not None else 1000


def _wider(seconds: Series, step: float) -> int:
    return _round_steps(2 * float(np.median(seconds.values)) / max(step, 1e-9))


def _round_steps(steps: float) -> int:
    """To two digits, at least 1."""
    if steps < 10:
        return max(round(steps), 1)
    size = 10 ** (int(math.log10(steps)) - 1)
    return round(steps / size) * size


def checkpoints_rare(record: RunRecord) -> Iterator[Finding]:
    """Failures cost many steps: the interval that costs least is sqrt(2 x cost of a save x time between failures).

    Young, "A first order approximation to the optimum checkpoint interval", 1974.
    """
    goodput, steps = record.goodput, record.columns["step_time"].finite()
    losing = [attempt for attempt in goodput.attempts if attempt.lost_steps]
    if not losing or goodput.wall < _LONG or goodput.seconds["lost"] < 0.03 * goodput.wall:
        return
    step = float(np.median(steps.values)) if len(steps) else None
    failures = max(sum(attempt.failed for attempt in goodput.attempts), 1)
    between = goodput.wall / failures
    blocked = record.saved("blocked")
    cost = max(float(np.median(blocked.values)) if len(blocked) else 0.0, 1.0)
    best = math.sqrt(2 * cost * between)
    every = f"--checkpoint.save-every-seconds {_round_steps(best)}"
    if step:
        every = f"--checkpoint.save-every-steps {_round_steps(best / step)}"
    yield Finding(
        rule="checkpoints_rare",
        severity="warning",
        what=f"Failures cost much work: {goodput.lost_steps:,} steps were done again, "
        f"{goodput.seconds['lost'] / goodput.wall:.1%} of the time of the run.",
        evidence=tuple(
            f"start {number}: steps {attempt.last_step - attempt.lost_steps + 1:,} to {attempt.last_step:,}, "
            f"{format_duration(attempt.seconds['lost'])}"
            for number, attempt in enumerate(goodput.attempts, 1)
            if attempt.lost_steps
        )[:8]
        + (
            f"a failure every {format_duration(between)}, a save costs about {format_duration(cost)}: one every "
            f"{format_duration(best)} loses least",
        ),
        try_next=(train_command(record, every),),
    )


_CURES = {
    "lost": "save more often (checkpoint.save_every_steps)",
    "data_wait": "measure the stream: `jaxcoder bench loader`",
    "save": "save less often, or to a faster place",
    "evaluate": "evaluate less often or on fewer windows (eval.every_steps, eval.num_windows)",
    "init": "look at what the start-up waits for in the log: hosts that arrive late, slow imports from a network disk",
    "restore": "keep checkpoints near the hosts",
    "compile": "keep the compilation cache where all starts find it (JAX_COMPILATION_CACHE_DIR on shared storage)",
    "down": "let the scheduler restart at once (launch/ has files that do)",
    "other": "look at the log around the gaps; a profile shows what the hosts do",
}


def low_goodput(record: RunRecord) -> Iterator[Finding]:
    """Of a run of half an hour or more, less than four fifths went into steps that survived."""
    goodput = record.goodput
    if goodput.share is None or goodput.wall < _LONG or goodput.share >= 0.8:
        return
    losses = sorted(((seconds, name) for name, seconds in goodput.seconds.items() if name != "step"), reverse=True)
    named = [(seconds, name) for seconds, name in losses[:3] if seconds > 0.03 * goodput.wall] or losses[:1]
    yield Finding(
        rule="low_goodput",
        severity="warning",
        what=f"Only {goodput.share:.0%} of the run's time went into steps that survived.",
        evidence=tuple(
            f"{CATEGORY_NAMES[name]}: {format_duration(seconds)}, {seconds / goodput.wall:.0%}"
            for seconds, name in named
        )
        + (f"{plural(len(goodput.attempts), 'start')} in {format_duration(goodput.wall)}",),
        try_next=tuple(_CURES[name] for _, name in named) + (f"see it drawn: `jaxcoder report {record.path}`",),
    )


def compiles_again(record: RunRecord) -> Iterator[Finding]:
    """Starts after the first compile as long as the first one: the compilation cache does not work."""
    found = [attempt for attempt in record.goodput.attempts if attempt.seconds["compile"] > 0]
    if len(found) < 2:
        return
    first, later = found[0].seconds["compile"], [attempt.seconds["compile"] for attempt in found[1:]]
    same = [found[0].begin.get("code") == attempt.begin.get("code") for attempt in found[1:]]
    slow = [seconds for seconds, is_same in zip(later, same, strict=True) if is_same and seconds > 0.7 * first]
    if first < 60 or not slow or len(slow) * 2 < sum(same):
        return
    yield Finding(
        rule="compiles_again",
        severity="warning",
        what=f"{len(slow)} of {len(later)} restarts compile as long as the first start: the compilation cache is not "
        "found.",
        evidence=(
            f"first step {format_duration(first)} at the first start, {format_duration(float(np.median(slow)))} later",
        ),
        try_next=(
            "put the cache where every start of every host finds it: `export "
            "JAX_COMPILATION_CACHE_DIR=gs://BUCKET/cache` (or a shared disk) before the command",
        ),
    )


def throughput_decays(record: RunRecord) -> Iterator[Finding]:
    """FLOP/s of a device in the last fifth of the run are a tenth below those of the first."""
    speeds = record.columns["flops_per_second_per_device"].finite()
    what = "FLOP/s of a device"
    if not len(speeds):
        speeds, what = record.columns["tokens_per_second"].finite(), "tokens a second"
    speeds = speeds.between(_same_devices_since(record) + 1, 2**62)
    if len(speeds) < 100:
        return
    levels = block_medians(speeds, 10)
    first, now = float(np.median(levels.values[:2])), float(np.median(levels.values[-2:]))
    if not first > 0 or now > 0.9 * first:
        return
    drops = np.diff(levels.values) / levels.values[:-1]
    worst = int(drops.argmin())
    sudden = levels.values[worst] - levels.values[worst + 1] > 0.7 * (first - now)
    how = f"most of it at once, around step {levels.steps[worst + 1]:,}" if sudden else "little by little"
    restarts = [attempt.ready for attempt in record.goodput.attempts[1:] if attempt.ready]
    waits = record.columns["data_wait"].finite()
    evidence = [f"{what}: {first:.3g} at first, {now:.3g} now; {how}"]
    if restarts:
        evidence.append(f"restarts after steps {ranges(sorted(set(restarts)))}")
    if len(waits) >= 20:
        tenth = len(waits) // 10
        evidence.append(
            f"waiting for data: {np.median(waits.values[:tenth]):.3f} s a step at first, "
            f"{np.median(waits.values[-tenth:]):.3f} s now"
        )
    yield Finding(
        rule="throughput_decays",
        severity="warning",
        what=f"The run has become slower by {1 - now / first:.0%}.",
        evidence=tuple(evidence),
        try_next=(
            "compare a profile of now with one of a fresh start: " + profile_command(record),
            "look for hosts that are throttled or shared, memory that grows, a store that moved further away",
        ),
    )


def _same_devices_since(record: RunRecord) -> int:
    """The step after which all starts ran on the devices, and the mesh, of the last one."""
    since, keys = 0, ("devices", "device_kind", "processes", "mesh")
    attempts = [attempt for attempt in record.goodput.attempts if attempt.begin and attempt.ready is not None]
    for before, attempt in zip(attempts[:-1], attempts[1:], strict=True):
        if any(before.begin.get(key) != attempt.begin.get(key) for key in keys):
            since = attempt.ready or 0
    return since


def memory_grows(record: RunRecord) -> Iterator[Finding]:
    """Memory that grows all through a start, by a tenth or more."""
    for key, whose, least in (("host_memory", "process 0", 2**28), ("device_memory", "a device", 2**26)):
        for number, series in _by_start(record, record.columns[key].finite()):
            if len(series) < 100:
                continue
            levels = block_medians(series, 6).values[1:]  # the first holds what is allocated once
            growth, half = levels[-1] - levels[0], levels[-1] - levels[2]
            if growth < max(0.1 * levels[0], least) or np.any(np.diff(levels) < 0) or half < 0.25 * growth:
                continue
            steps = int(series.steps[-1] - series.steps[0]) * 4 / 6
            yield Finding(
                rule="memory_grows",
                severity="warning",
                what=f"The memory of {whose} grows: {format_bytes(levels[0])} to {format_bytes(levels[-1])} in "
                f"start {number}.",
                evidence=(
                    f"{format_bytes(growth / max(steps, 1) * 1000)} in a thousand steps, in steps "
                    f"{series.steps[0]:,} to {series.steps[-1]:,}; medians "
                    f"{', '.join(format_bytes(level) for level in levels)}",
                ),
                try_next=(
                    "until it is found, a restart now and then keeps a host from being killed: `kill -TERM` saves "
                    "first",
                    "compare with a run on random tokens: if that does not grow, it is the reading of data: "
                    "`jaxcoder train smoke --data synthetic --steps 2000`",
                ),
            )
            break


def _by_start(record: RunRecord, series: Series) -> Iterator[tuple[int, Series]]:
    """(number, the part of a series that the start wrote and no later one wrote again)."""
    attempts = record.goodput.attempts
    if not attempts:
        yield 1, series
    for number, attempt in enumerate(attempts, 1):
        later = [other.ready for other in attempts[number:] if other.ready is not None]
        if attempt.ready is not None:
            yield number, series.between(attempt.ready + 1, min(later, default=2**62))
