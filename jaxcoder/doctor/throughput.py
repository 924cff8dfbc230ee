"""Rules about time and memory: data, hosts, checkpoints, goodput, throughput."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from jaxcoder.doctor.findings import Finding, profile_command, train_command
from jaxcoder.formatting import format_bytes, format_duration, format_ranges, plural
from jaxcoder.record.goodput import CATEGORY_NAMES
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.series import Series, block_medians
from jaxcoder.record.status import slowest_hosts

# Thresholds.
MIN_STEPS = 20  # for a median of step times
LONG_RUN = 1800.0  # seconds; in a shorter run three minutes of start-up are more than a tenth
DATA_WAIT = 0.05  # share of step time: "input bound" for XProf's input pipeline analyzer and PyTorch's profiler plugin
HOST_BEHIND = DATA_WAIT  # share of step time: all hosts wait for the slowest as they would for data
CHANCE = 1e-3  # probability below which chance does not explain the slowest host
SAVE_COST = 0.035  # share of step time: the bound of CheckFreq (Mohan et al., FAST 2021)
GOODPUT = 0.9  # "higher than 90% effective training time": Llama 3 (2407.21783, 3.3.4)
NAMED_LOSS = 0.02  # share of the run's time above which a category is named: a fifth of the loss that GOODPUT allows
COMPILE_AGAIN = 0.5  # share of the first compilation; measured: 0.13 with the cache (smoke on a CPU)
SLOWDOWN = 0.1  # five times the 1 to 2 % by which throughput varies over a day (Llama 3, 3.3.4)
MEMORY_GROWTH = 0.2  # over one start; measured: 0.08 of the host in a healthy run (quickstart, 1,800 steps)


def data_wait(record: RunRecord) -> Iterator[Finding]:
    """Steps wait for batches."""
    waits, steps = record.columns["data_wait"].finite(), record.columns["step_time"].finite()
    waits = waits.where(np.isfinite(steps.at(waits.steps)))
    times = steps.at(waits.steps)
    total = float(waits.values.sum())
    share = total / max(times.sum(), 1e-9)
    if len(waits) < MIN_STEPS or share < DATA_WAIT:
        return
    late = float((waits.values > DATA_WAIT * times).mean())
    longest = int(waits.values.argmax())
    yield Finding(
        "warning",
        f"Steps wait for data: {share:.0%} of their time.",
        evidence=(
            f"{total:,.1f} s of {times.sum():,.1f} s in {len(waits):,} steps; {late:.0%} of the steps wait for more "
            f"than {DATA_WAIT:.0%} of their time, the longest {waits.values[longest]:.2f} s (step "
            f"{waits.steps[longest]:,})",
        ),
        try_next=(
            "measure the loader: `jaxcoder bench loader`",
            "keep the store near the hosts (a bucket in their region, or a local disk), and leave them CPU cores",
        ),
    )


def slow_hosts(record: RunRecord) -> Iterator[Finding]:
    """One host is the slowest more often than chance allows, and the others wait for it."""
    hosts = slowest_hosts(record)
    step = record.columns["step_time"].recent()
    if not hosts or step is None:
        return
    worst = max(hosts, key=lambda host: host.count * host.behind)
    total = sum(host.count for host in hosts)
    sizes = record.columns["hosts/count"].finite()
    num_hosts = int(sizes.last) if len(sizes) else len(hosts) + 1
    if worst.behind < HOST_BEHIND * step or _chance(worst.count, total, num_hosts) > CHANCE:
        return
    yield Finding(
        "warning",
        f"Host {worst} is slower than the others, and all wait for it.",
        evidence=(
            f"the slowest in {worst.count} of {total} measurements, {worst.behind:.3f} s a step behind the median; a "
            f"step takes {step:.3f} s",
        ),
        try_next=(
            f"look at it: `ssh {worst.name} top -b -n 1` (other programs?), its disk and network, its clock rate",
            "replace it, or leave it out; profile it: `kill -USR1` of its process, or " + profile_command(record),
        ),
    )


def _chance(count: int, total: int, num_hosts: int) -> float:
    """Upper bound on the probability that any of equal hosts is the slowest in `count` of `total` measurements."""
    p = 1 / max(num_hosts, 1)
    tail = sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(count, total + 1))
    return min(num_hosts * tail, 1.0)


def checkpoints_block(record: RunRecord) -> Iterator[Finding]:
    """Saves are exposed to steps, or take longer than the steps until the next save."""
    exposed = record.saved("blocked")
    if not len(exposed):
        exposed = record.columns["checkpoint_seconds"].finite()
    seconds, steps = record.saved("seconds"), record.columns["step_time"].finite()
    if not len(exposed) or len(steps) < MIN_STEPS:
        return
    step, trained = float(np.median(steps.values)), float(steps.values.sum())
    share, longest = float(exposed.values.sum()) / max(trained, 1e-9), int(exposed.values.argmax())
    if share > SAVE_COST and trained > LONG_RUN / 2:
        every = 2 * _save_interval(record, exposed)
        yield Finding(
            "warning",
            f"Saves block the steps for {share:.1%} of their time.",
            evidence=(
                f"{len(exposed)} saves, exposed for {format_duration(float(exposed.values.sum()))} in all, "
                f"{format_duration(float(exposed.values[longest]))} at most (step {exposed.steps[longest]:,}); a step "
                f"takes {format_duration(step)}",
            ),
            try_next=(
                "save to a faster disk or bucket, or less often: "
                + train_command(record, f"--checkpoint.save-every-steps {every}"),
                "leave the hosts memory for a second copy of their shard of the state",
            ),
        )
    interval = _save_interval(record, seconds) * step
    if len(seconds) < 2 or (median := float(np.median(seconds.values))) <= interval:
        return
    sizes = record.saved("bytes")
    speed = f", {format_bytes(sizes.last / max(seconds.last, 1e-9))}/s" if len(sizes) else ""
    every = _two_digits(2 * median / max(step, 1e-9))
    yield Finding(
        "warning",
        "A checkpoint takes longer to write than the steps until the next one.",
        evidence=(
            f"{format_duration(median)} until committed (median){speed}, and about {format_duration(interval)} "
            "between saves",
        ),
        try_next=(
            train_command(record, f"--checkpoint.save-every-steps {every}"),
            "write to a faster disk or bucket",
        ),
    )


def _save_interval(record: RunRecord, saves: Series) -> int:
    """Steps between saves: the median of those made, or the configuration's."""
    if len(saves) > 1:
        return max(int(np.median(np.diff(saves.steps))), 1)
    return record.config.checkpoint.save_every_steps if record.config is not None else 1000


def _two_digits(steps: float) -> int:
    return max(int(float(f"{steps:.1e}")), 1)


def checkpoints_rare(record: RunRecord) -> Iterator[Finding]:
    """Failures cost many steps; the best interval is sqrt(2 x cost of a save x time between failures).

    Young, "A first order approximation to the optimum checkpoint interval", 1974.
    """
    goodput, step = record.goodput, record.columns["step_time"].recent(1.0)
    if goodput.wall < LONG_RUN or goodput.seconds["lost"] < SAVE_COST * goodput.wall:
        return
    failures = max(sum(attempt.failed for attempt in goodput.attempts), 1)
    between = goodput.wall / failures
    cost = max(record.saved("blocked").recent(1.0) or 0.0, 1.0)
    best = math.sqrt(2 * cost * between)
    unit, value = ("steps", best / step) if step else ("seconds", best)
    yield Finding(
        "warning",
        f"Failures cost much work: {goodput.lost_steps:,} steps were lost, "
        f"{goodput.seconds['lost'] / goodput.wall:.1%} of the time of the run.",
        evidence=tuple(
            f"start {number}: steps {attempt.last_step - attempt.lost_steps + 1:,} to {attempt.last_step:,}, "
            f"{format_duration(attempt.seconds['lost'])}"
            for number, attempt in enumerate(goodput.attempts, 1)
            if attempt.lost_steps and attempt.last_step is not None
        )[:8]
        + (
            f"a failure every {format_duration(between)}, a save costs about {format_duration(cost)}: one every "
            f"{format_duration(best)} loses least",
        ),
        try_next=(train_command(record, f"--checkpoint.save-every-{unit} {_two_digits(value)}"),),
    )


_REMEDIES = {
    "lost": "save more often (checkpoint.save_every_steps)",
    "data_wait": "measure the loader: `jaxcoder bench loader`",
    "save": "save less often, or to a faster disk or bucket",
    "evaluate": "evaluate less often or on fewer windows (eval.every_steps, eval.num_windows)",
    "init": "see in the log what delays the start: late hosts, slow imports from a network disk",
    "restore": "keep checkpoints near the hosts",
    "compile": "keep the compilation cache on shared storage (JAX_COMPILATION_CACHE_DIR)",
    "down": "let the scheduler restart at once (see launch/)",
    "other": "see the log around the gaps; profile the hosts",
}


def low_goodput(record: RunRecord) -> Iterator[Finding]:
    """Too little of a long run's time went into steps that were not lost."""
    goodput = record.goodput
    if goodput.share is None or goodput.wall < LONG_RUN or goodput.share >= GOODPUT:
        return
    lost = sorted(((seconds, name) for name, seconds in goodput.seconds.items() if name != "step"), reverse=True)
    lost = [(seconds, name) for seconds, name in lost if seconds > NAMED_LOSS * goodput.wall][:3] or lost[:1]
    yield Finding(
        "warning",
        f"Only {goodput.share:.0%} of the run's time went into steps that were not lost.",
        evidence=(
            *(f"{CATEGORY_NAMES[name]}: {format_duration(took)}, {took / goodput.wall:.0%}" for took, name in lost),
            f"{plural(len(goodput.attempts), 'start')} in {format_duration(goodput.wall)}",
        ),
        try_next=(*(_REMEDIES[name] for _, name in lost), f"see the chart of `jaxcoder report {record.path}`"),
    )


def compiles_again(record: RunRecord) -> Iterator[Finding]:
    """Restarts with the same code compile as long as the first start: the compilation cache does not work."""
    attempts = [attempt for attempt in record.goodput.attempts if attempt.seconds["compile"] > 0]
    if len(attempts) < 2 or (first := attempts[0].seconds["compile"]) < 60:  # shorter compilations do not matter
        return
    code = attempts[0].begin.get("code")
    later = [attempt.seconds["compile"] for attempt in attempts[1:] if attempt.begin.get("code") == code]
    if not later or (median := float(np.median(later))) < COMPILE_AGAIN * first:
        return
    yield Finding(
        "warning",
        "Restarts compile as long as the first start: the compilation cache is not used.",
        evidence=(f"first step {format_duration(first)} at the first start, {format_duration(median)} later (median)",),
        try_next=(
            "put the cache on storage that all hosts share: `export "
            "JAX_COMPILATION_CACHE_DIR=gs://BUCKET/cache` (or a shared disk) before the command",
        ),
    )


def throughput_decays(record: RunRecord) -> Iterator[Finding]:
    """FLOP/s of a device in the last fifth of the run are below those of the first fifth."""
    speeds, unit = record.columns["flops_per_second_per_device"].finite(), "FLOP/s of a device"
    if not len(speeds):
        speeds, unit = record.columns["tokens_per_second"].finite(), "tokens a second"
    speeds = speeds.between(_same_devices_since(record) + 1, 2**62)
    if len(speeds) < 5 * MIN_STEPS:
        return
    levels = block_medians(speeds, 10)
    first, now = float(np.median(levels.values[:2])), float(np.median(levels.values[-2:]))
    if not first > 0 or now > (1 - SLOWDOWN) * first:
        return
    drops = levels.values[:-1] - levels.values[1:]
    worst = int(drops.argmax())
    is_sudden = drops[worst] > (first - now) / 2
    how = f"most of it at once, around step {levels.steps[worst + 1]:,}" if is_sudden else "gradually"
    evidence = [f"{unit}: {first:.3g} at first, {now:.3g} now; {how}"]
    if restarts := sorted({attempt.ready for attempt in record.goodput.attempts[1:] if attempt.ready}):
        evidence.append(f"restarts after steps {format_ranges(restarts)}")
    waits = block_medians(record.columns["data_wait"], 10).values
    if len(waits):
        evidence.append(f"waiting for data: {waits[0]:.3f} s a step at first, {waits[-1]:.3f} s now")
    yield Finding(
        "warning",
        f"The run has become slower by {1 - now / first:.0%}.",
        evidence=tuple(evidence),
        try_next=(
            "compare a current profile with one of a fresh start: " + profile_command(record),
            "look for throttled or shared hosts, growing memory, a more distant store",
        ),
    )


def _same_devices_since(record: RunRecord) -> int:
    """The step after which all starts ran on the devices, and the mesh, of the last one."""
    since, keys = 0, ("devices", "device_kind", "processes", "mesh")
    attempts = [attempt for attempt in record.goodput.attempts if attempt.begin and attempt.ready is not None]
    for before, attempt in itertools.pairwise(attempts):
        if any(before.begin.get(key) != attempt.begin.get(key) for key in keys):
            since = attempt.ready or 0
    return since


def memory_grows(record: RunRecord) -> Iterator[Finding]:
    """Memory grows throughout a start."""
    for key, whose in (("host_memory", "process 0"), ("device_memory", "a device")):
        for number, series in _by_start(record, record.columns[key].finite()):
            if len(series) < 5 * MIN_STEPS:
                continue
            # The first sixth contains one-time allocations. A leak continues in the second half.
            levels = block_medians(series, 6)
            values = levels.values[1:]
            growth = values[-1] - values[0]
            continues = np.all(np.diff(values) >= 0) and values[-1] - values[2] > growth / 4
            if growth < MEMORY_GROWTH * values[0] or not continues:
                continue
            rate = growth / max(int(levels.steps[-1] - levels.steps[1]), 1) * 1000
            yield Finding(
                "warning",
                f"The memory of {whose} grows: {format_bytes(values[0])} to {format_bytes(values[-1])} in start "
                f"{number}.",
                evidence=(
                    f"{format_bytes(rate)} in a thousand steps, in steps {series.steps[0]:,} to "
                    f"{series.steps[-1]:,}; medians {', '.join(map(format_bytes, values))}",
                ),
                try_next=(
                    "until the cause is known, restart before a host runs out of memory: `kill -TERM` saves first",
                    "compare with a run on random tokens; if its memory does not grow, the data pipeline leaks: "
                    "`jaxcoder train smoke --data synthetic --steps 2000`",
                ),
            )
            break


def _by_start(record: RunRecord, series: Series) -> Iterator[tuple[int, Series]]:
    """(number of a start, its values that no later start wrote again)."""
    attempts = record.goodput.attempts
    if not attempts:
        yield 1, series
    for number, attempt in enumerate(attempts, 1):
        later = [other.ready for other in attempts[number:] if other.ready is not None]
        if attempt.ready is not None:
            yield number, series.between(attempt.ready + 1, min(later, default=2**62))
