"""The gist of a run in words and numbers: what `jaxcoder report` prints, and the head of its page."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from jaxcoder.formatting import format_bytes, format_count, format_duration, format_table
from jaxcoder.record.events import text
from jaxcoder.record.goodput import Attempt
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.series import Series

SILENT_STEPS, SILENT_START = 900.0, 3900.0
"""Seconds without an event after which a run counts as not moving: with steps; while it starts, compiles, evaluates.
More where the run's own watchdog waits longer."""

CATEGORY_NAMES = {
    "step": "steps",
    "lost": "steps lost and done again",
    "data_wait": "waiting for data",
    "save": "saving",
    "evaluate": "evaluating",
    "init": "starting up",
    "restore": "restoring or making weights",
    "compile": "compiling (first steps)",
    "other": "other (hangs, what is not measured)",
    "down": "down, between starts",
}
REASONS = {"died": "died without a word", "open": "not ended", "error": "an error", "finished": "finished"}


@dataclass(frozen=True)
class Figure:
    """A headline number."""

    name: str
    value: str


def silent_for(record: RunRecord) -> float | None:
    """Seconds since the last event of a run that does not move and has not ended; None for every other."""
    if record.reason != "open":
        return None
    attempt, config = record.goodput.attempts[-1], record.config
    steps, start = SILENT_STEPS, SILENT_START
    if config is not None:
        steps = max(steps, 1.5 * (config.watchdog.step_seconds or 0))
        start = max(start, 1.1 * (config.watchdog.start_seconds or 0))
    has_stepped = any(spent.step is not None and spent.step > (attempt.ready or 0) for spent in attempt.spent)
    may_evaluate = config is not None and record.last_step % config.eval.every_steps == 0
    silent = record.now - attempt.last_seen
    return silent if silent > (steps if has_stepped and not may_evaluate else start) else None


def status(record: RunRecord) -> str:
    """Where the run stands, in half a sentence."""
    if not record.goodput.attempts:
        return "only its metrics are there: it is of a version that wrote no events.jsonl"
    attempt = record.goodput.attempts[-1]
    if attempt.reason == "open":
        silent = silent_for(record)
        if silent is not None:
            return f"not ended, and silent for {format_duration(silent)}"
        return f"under way (last event {format_duration(max(record.now - attempt.last_seen, 0))} ago)"
    if attempt.reason == "finished":
        return "finished"
    return f"stopped: {how_ended(attempt)}"


def how_ended(attempt: Attempt) -> str:
    """The reason and the sentence of an attempt's end."""
    reason = REASONS.get(attempt.reason, attempt.reason)
    process = attempt.ends[0].get("process") if attempt.ends else None
    where = f" (process {process})" if isinstance(process, int) and process else ""
    return f"{reason}{where}: {attempt.message}" if attempt.message else f"{reason}{where}"


def recent(series: Series, share: float = 0.1) -> float | None:
    """The median of the last `share` of the finite values."""
    values = series.finite().values
    return float(np.median(values[-max(int(len(values) * share), 1) :])) if len(values) else None


def trained(record: RunRecord, parameters: int | None = None) -> list[Figure]:
    """What was trained, on what. parameters: of the model, of somebody who can count them."""
    found = []
    if record.config is not None:
        config = record.config
        model = config.model
        size = f"{parameters:,} parameters, " if parameters else ""
        heads = f"{model.num_heads} heads, {model.num_kv_heads} for keys and values"
        found.append(Figure("model", f"{size}{model.num_layers} layers of {model.embed_dim:,}, {heads}"))
        tokens = config.global_batch_size * model.max_seq_len
        found.append(
            Figure("a step", f"{config.global_batch_size:,} windows of {model.max_seq_len:,}: {tokens:,} tokens")
        )
        data = config.data
        stores = ", ".join(corpus.store for corpus in data.corpora) or data.store or "none"
        found.append(Figure("data", f"{stores}; FIM {data.fim_rate:.0%}, of it SPM {data.fim_spm_rate:.0%}"))
    else:
        found.append(Figure("configuration", record.config_problem))
    begin = record.goodput.attempts[-1].begin if record.goodput.attempts else {}
    if begin:
        mesh = begin.get("mesh") if isinstance(begin.get("mesh"), dict) else {}
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size != 1) or "one device"
        found.append(Figure("devices", f"{_count(begin, 'devices')} {text(begin.get('device_kind'))} as {axes}, "
                                       f"{_count(begin, 'processes')} process(es)"))  # fmt: skip
        found.append(Figure("software", f"jaxcoder {text(begin.get('version'))}, jax {text(begin.get('jax'))}"))
    return found


def _count(begin, key: str) -> str:
    return f"{begin[key]:,}" if isinstance(begin.get(key), int) else "?"


def headline(record: RunRecord) -> list[Figure]:
    """The numbers that a person asks for first."""
    columns, goodput = record.columns, record.goodput
    found = [Figure("steps", _steps(record))]
    samples = columns["samples"].finite()
    if record.config is not None and len(samples):
        found.append(Figure("tokens read", format_count(samples.last * record.config.model.max_seq_len)))
    if (loss := recent(columns["loss"], 0.01)) is not None:
        found.append(Figure("training loss", f"{loss:.4f}"))
    for key, name in (("eval/loss", "held-out loss"), ("eval/bits_per_byte", "held-out bits per byte")):
        if len(values := columns[key].finite()):
            found.append(Figure(name, f"{values.last:.4f}"))
    if (speed := recent(columns["tokens_per_second"])) is not None:
        found.append(Figure("tokens a second", format_count(speed)))
    if (mfu := recent(columns["mfu"])) is not None:
        found.append(Figure("MFU", f"{mfu:.1%}"))
    if goodput.share is not None:
        found.append(Figure("goodput", f"{goodput.share:.1%} of {format_duration(goodput.wall)}"))
        found.append(Figure("starts", f"{len(goodput.attempts)}, {goodput.lost_steps:,} steps done again"))
    skipped = columns["skipped"]
    if count := int((skipped.values > 0).sum()):
        found.append(Figure("skipped steps", f"{count:,}"))
    if alarms := alarm_rows(record):
        found.append(Figure("alarms", f"{len(alarms):,}"))
    return found


def _steps(record: RunRecord) -> str:
    if record.config is None:
        return f"{record.last_step:,}"
    share = record.last_step / max(record.config.num_steps, 1)
    return f"{record.last_step:,} of {record.config.num_steps:,} ({share:.0%})"


def alarm_rows(record: RunRecord) -> list[tuple[int, str, str]]:
    """(step, rule, message) of every alarm, in order."""
    texts = record.columns.texts
    rows = [(step, key[6:], said) for key, found in texts.items() if key.startswith("alarm/") for step, said in found]
    return sorted(rows)


def attempt_rows(record: RunRecord) -> list[tuple[str, ...]]:
    """Of each start: number, when, steps, how long, steps lost, time down before it, how it ended."""
    rows = []
    for index, attempt in enumerate(record.goodput.attempts):
        began = datetime.fromtimestamp(min(max(attempt.started, 0), 2**33), UTC)
        if attempt.ready is None:
            steps = "never ready"
        elif attempt.last_step is None or attempt.last_step <= attempt.ready:
            steps = f"none after {attempt.ready:,}"
        else:
            steps = f"{attempt.ready + 1:,} to {attempt.last_step:,}"
        down = record.goodput.down_before(index)
        rows.append(
            (str(index + 1), began.strftime("%Y-%m-%d %H:%M:%S"), steps, format_duration(attempt.duration),
             f"{attempt.lost_steps:,}", format_duration(down) if index else "", how_ended(attempt))
        )  # fmt: skip
    return rows


ATTEMPT_COLUMNS = ("start", "began (UTC)", "steps", "took", "lost", "down before", "how it ended")


def goodput_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """(category, time, share) of what took any time, as in CATEGORY_NAMES."""
    goodput = record.goodput
    return [
        (name, format_duration(goodput.seconds[key]), f"{goodput.seconds[key] / goodput.wall:.1%}")
        for key, name in CATEGORY_NAMES.items()
        if goodput.wall > 0 and goodput.seconds[key] > 0.05
    ]


def held_out_rows(record: RunRecord, kind: str) -> list[tuple[str, float, float, int, float]]:
    """Bits per byte of each language or corpus (kind: "lang", "corpus"): name, first, best, step of it, last.

    Those with most tokens first.
    """
    tokens = record.columns.matching(f"eval/{kind}/", "/tokens")
    rows = []
    for name, series in record.columns.matching(f"eval/{kind}/", "/bits_per_byte").items():
        if len(series := series.finite()):
            best = int(series.values.argmin())
            size = tokens[name].last if name in tokens else 0.0
            rows.append(
                (size, name, float(series.values[0]), float(series.values[best]), int(series.steps[best]), series.last)
            )
    return [tuple(row[1:]) for row in sorted(rows, key=lambda row: (-row[0], row[1]))]


@dataclass(frozen=True)
class Host:
    """A process that was found the slowest: its host, how often, and mean seconds a step behind the median."""

    name: str
    process: int
    count: int
    behind: float

    def __str__(self) -> str:
        return f"{self.name} (process {self.process})"


def slowest_hosts(record: RunRecord) -> list[Host]:
    """The most frequent first."""
    columns = record.columns
    slowest, median = columns["hosts/slowest_seconds"], columns["hosts/median_seconds"]
    names, processes = dict(columns.texts.get("hosts/slowest_name", ())), columns["hosts/slowest"].at(slowest.steps)
    behind: dict[tuple[str, int], list[float]] = {}
    for step, seconds, usual, process in zip(
        slowest.steps.tolist(), slowest.values, median.at(slowest.steps), processes, strict=True
    ):
        if np.isfinite(seconds - usual) and np.isfinite(process):
            behind.setdefault((names.get(step, "?"), int(process)), []).append(float(seconds - usual))
    rows = [Host(*key, len(seconds), sum(seconds) / len(seconds)) for key, seconds in behind.items()]
    return sorted(rows, key=lambda host: (-host.count, host.process))


def _shortened(sentence: str, most: int = 90) -> str:
    """For a table in a terminal; the page has all of it."""
    return sentence if len(sentence) <= most else f"{sentence[: most - 4].rstrip()} ..."


def ranges(steps: Sequence[int], most: int = 12) -> str:
    """ "3, 7 to 9, 20 and 4 more": the steps, runs of them folded."""
    folded: list[list[int]] = []
    for step in steps:
        if folded and step == folded[-1][1] + 1:
            folded[-1][1] = step
        else:
            folded.append([step, step])
    shown = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in folded[:most]]
    rest = sum(last - first + 1 for first, last in folded[most:])
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")


def describe(record: RunRecord, parameters: int | None = None) -> str:
    """The summary for a terminal."""
    name = record.config.name if record.config is not None else record.path
    figures = [*trained(record, parameters), *headline(record)]
    width = max(len(figure.name) for figure in figures)
    lines = [f"{name}: {status(record)}", "", *(f"{figure.name:<{width}}  {figure.value}" for figure in figures)]
    if rows := goodput_rows(record):
        lines += ["", format_table(("where the time went", "time", "share"), rows)]
    if len(record.goodput.attempts) > 1 or any(attempt.failed for attempt in record.goodput.attempts):
        lines += [
            "",
            format_table(ATTEMPT_COLUMNS, [(*row[:-1], _shortened(row[-1])) for row in attempt_rows(record)[-20:]]),
        ]
    for kind, title in (("corpus", "corpus"), ("lang", "language")):
        if rows := held_out_rows(record, kind):
            table = [(row[0], f"{row[1]:.4f}", f"{row[2]:.4f} at {row[3]:,}", f"{row[4]:.4f}") for row in rows[:12]]
            lines += ["", format_table((f"bits per byte of a {title}", "first", "best", "last"), table)]
    if sizes := record.saved("bytes"):
        seconds, blocked = record.saved("seconds"), record.saved("blocked")
        took = f", whole after {format_duration(np.median(seconds.values))}" if len(seconds) else ""
        stops = f", steps wait {format_duration(np.median(blocked.values))}" if len(blocked) else ""
        lines += ["", f"checkpoints: {len(sizes)} of {format_bytes(sizes.last)}{took}{stops} (medians)"]
    if (hosts := slowest_hosts(record)) and hosts[0].count > 1:
        looks = sum(host.count for host in hosts)
        lines += [
            "",
            f"slowest host: {hosts[0]} in {hosts[0].count} of {looks} looks, {hosts[0].behind:.3f} s a step behind",
        ]
    skipped = record.columns["skipped"]
    if (skipped.values > 0).any():
        lines += ["", f"skipped steps: {ranges(skipped.steps[skipped.values > 0].tolist())}"]
    if alarms := alarm_rows(record):
        lines += ["", "alarms:", *(f"  step {step:,}: {rule}: {said}" for step, rule, said in alarms[-8:])]
    return "\n".join(lines)
