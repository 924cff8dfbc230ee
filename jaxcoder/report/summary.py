"""The summary of a run as text (`describe`), and the numbers and tables of its page."""

from datetime import UTC, datetime

import numpy as np

from jaxcoder.formatting import format_bytes, format_count, format_duration, format_ranges, format_table, plural
from jaxcoder.record.events import text
from jaxcoder.record.goodput import CATEGORY_NAMES
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.status import exit_reason, slowest_hosts, status

MIN_SECONDS = 0.05
"""Shorter categories of time are left out."""
ATTEMPT_COLUMNS = ("start", "started (UTC)", "steps", "duration", "lost steps", "down before", "exit reason")
_MOST_REASON_CHARS = 90


def configuration(record: RunRecord, num_parameters: int | None = None) -> list[tuple[str, str]]:
    """(name, value) of the model, data, devices and software. num_parameters: of the model, if known."""
    rows = []
    if (config := record.config) is None:
        rows.append(("configuration", record.config_problem))
    else:
        model, data = config.model, config.data
        size = f"{num_parameters:,} parameters, " if num_parameters else ""
        heads = f"{model.num_heads} heads, {model.num_kv_heads} for keys and values"
        rows.append(("model", f"{size}{model.num_layers} layers of {model.embed_dim:,}, {heads}"))
        batch, length = config.global_batch_size, model.max_seq_len
        rows.append(("batch", f"{batch:,} windows of {length:,}: {batch * length:,} tokens"))
        stores = ", ".join(corpus.store for corpus in data.corpora) or data.store or "none"
        rows.append(("data", f"{stores}; FIM {data.fim_rate:.0%}, SPM {data.fim_spm_rate:.0%} of it"))
    if begin := record.goodput.attempts[-1].begin if record.goodput.attempts else {}:
        mesh = begin.get("mesh")
        mesh = mesh if isinstance(mesh, dict) else {}
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size != 1) or "one device"
        devices, processes = (begin[key] if isinstance(begin.get(key), int) else 0 for key in ("devices", "processes"))
        kind = text(begin.get("device_kind"))
        rows.append(("devices", f"{devices:,} {kind} as {axes}, {plural(processes, 'process', 'processes')}"))
        rows.append(("software", f"jaxcoder {text(begin.get('version'))}, jax {text(begin.get('jax'))}"))
    return rows


def headline(record: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of the most important numbers."""
    config, columns, goodput = record.config, record.columns, record.goodput
    steps = f"{record.last_step:,}"
    if config is not None:
        steps += f" of {config.num_steps:,} ({record.last_step / max(config.num_steps, 1):.0%})"
    rows = [("steps", steps)]
    if config is not None and len(samples := columns["samples"].finite()):
        rows.append(("tokens read", format_count(samples.last * config.model.max_seq_len)))
    if (loss := columns["loss"].recent(0.01)) is not None:
        rows.append(("training loss", f"{loss:.4f}"))
    for key, name in (("eval/loss", "held-out loss"), ("eval/bits_per_byte", "held-out bits per byte")):
        if len(values := columns[key].finite()):
            rows.append((name, f"{values.last:.4f}"))
    if (speed := columns["tokens_per_second"].recent()) is not None:
        rows.append(("tokens a second", format_count(speed)))
    if (mfu := columns["mfu"].recent()) is not None:
        rows.append(("MFU", f"{mfu:.1%}"))
    if goodput.share is not None:
        rows.append(("goodput", f"{goodput.share:.1%} of {format_duration(goodput.wall)}"))
        rows.append(("starts", f"{len(goodput.attempts)}, {plural(goodput.lost_steps, 'step')} lost"))
    if skipped := record.skipped_steps:
        rows.append(("skipped steps", f"{len(skipped):,}"))
    if alarms := record.alarms:
        rows.append(("alarms", f"{len(alarms):,}"))
    return rows


def attempt_rows(record: RunRecord) -> list[tuple[str, ...]]:
    """Rows of ATTEMPT_COLUMNS, one for each start."""
    rows: list[tuple[str, ...]] = []
    for index, attempt in enumerate(record.goodput.attempts):
        started = datetime.fromtimestamp(min(max(attempt.started, 0), 2**33), UTC)
        if attempt.ready is None:
            steps = "never ready"
        elif attempt.last_step is None or attempt.last_step <= attempt.ready:
            steps = f"none after {attempt.ready:,}"
        else:
            steps = f"{attempt.ready + 1:,} to {attempt.last_step:,}"
        down = format_duration(record.goodput.down_before(index)) if index else ""
        rows.append(
            (str(index + 1), f"{started:%Y-%m-%d %H:%M:%S}", steps, format_duration(attempt.duration),
             f"{attempt.lost_steps:,}", down, exit_reason(attempt))
        )  # fmt: skip
    return rows


def goodput_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """(category, time, share of the run's time)."""
    seconds, wall = record.goodput.seconds, record.goodput.wall
    return [
        (name, format_duration(seconds[key]), f"{seconds[key] / wall:.1%}")
        for key, name in CATEGORY_NAMES.items()
        if wall > 0 and seconds[key] > MIN_SECONDS
    ]


def held_out_rows(record: RunRecord, kind: str) -> list[tuple[str, float, float, int, float]]:
    """(name, first, best, step of the best, last) held-out bits per byte of each language or corpus, largest first.

    kind: "lang" or "corpus".
    """
    tokens = record.columns.matching(f"eval/{kind}/", "/tokens")
    rows = []
    for name, series in record.columns.matching(f"eval/{kind}/", "/bits_per_byte").items():
        if len(series := series.finite()):
            best = int(series.values.argmin())
            row = (name, float(series.values[0]), float(series.values[best]), int(series.steps[best]), series.last)
            rows.append((-tokens[name].last if name in tokens else 0.0, row))
    return [row for _, row in sorted(rows)]


def describe(record: RunRecord, num_parameters: int | None = None) -> str:
    """The summary for a terminal."""
    rows = [*configuration(record, num_parameters), *headline(record)]
    width = max(len(name) for name, _ in rows)
    parts = [f"{record.name}: {status(record)}", "\n".join(f"{name:<{width}}  {value}" for name, value in rows)]
    if times := goodput_rows(record):
        parts.append(format_table(("category of time", "time", "share"), times))
    if len(record.goodput.attempts) > 1 or any(attempt.failed for attempt in record.goodput.attempts):
        attempts = [(*row[:-1], _shortened(row[-1])) for row in attempt_rows(record)[-20:]]
        parts.append(format_table(ATTEMPT_COLUMNS, attempts))
    for kind, title in (("corpus", "corpus"), ("lang", "language")):
        if held_out := held_out_rows(record, kind)[:12]:
            cells = [(row[0], f"{row[1]:.4f}", f"{row[2]:.4f} at {row[3]:,}", f"{row[4]:.4f}") for row in held_out]
            parts.append(format_table((f"bits per byte of a {title}", "first", "best", "last"), cells))
    if sizes := record.saved("bytes"):
        durations = [
            f"{name} {format_duration(np.median(series.values))}"
            for name, key in (("committed after", "seconds"), ("exposed", "blocked"))
            if len(series := record.saved(key))
        ]
        parts.append(f"checkpoints: {', '.join([f'{len(sizes)} of {format_bytes(sizes.last)}', *durations])} (medians)")
    if (hosts := slowest_hosts(record)) and hosts[0].count > 1:
        total = sum(host.count for host in hosts)
        parts.append(
            f"slowest host: {hosts[0]} in {hosts[0].count} of {total} measurements, {hosts[0].behind:.3f} s a step "
            "behind the median"
        )
    if skipped := record.skipped_steps:
        parts.append(f"skipped steps: {format_ranges(skipped)}")
    if alarms := record.alarms:
        parts.append(
            "\n".join(["alarms:", *(f"  step {step:,}: {rule}: {message}" for step, rule, message in alarms[-8:])])
        )
    return "\n\n".join(parts)


def _shortened(sentence: str) -> str:
    """For a table in a terminal; the page has the full sentence."""
    return sentence if len(sentence) <= _MOST_REASON_CHARS else f"{sentence[: _MOST_REASON_CHARS - 4].rstrip()} ..."
