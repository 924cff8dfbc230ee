"""The report of a run as one HTML page of charts and tables.

Series are thinned to a few hundred points with their extremes, so the size of the page does not depend on the run's.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from jaxcoder.formatting import format_bytes, format_duration, format_ranges
from jaxcoder.record.goodput import CATEGORIES, CATEGORY_NAMES, over_time
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.series import Series, block_means, position_losses, smoothed, thinned
from jaxcoder.record.status import slowest_hosts, status
from jaxcoder.report import summary
from jaxcoder.report.charts import Line, line_chart, short, stacked_chart
from jaxcoder.report.html import Chart, Section, Table, render_page

_MOST_LINES = 8
_BINS = 240
_GIB = 2.0**30

# Palette index of each category of goodput.
_CATEGORY_COLORS = {
    "step": 2, "lost": 4, "data_wait": 1, "save": 0, "evaluate": 6, "init": 7, "restore": 8, "compile": 3, "other": 5,
    "down": 10,
}  # fmt: skip


class Curve(NamedTuple):
    """One chart over steps. lines: (name, key of metrics.jsonl, style); the style "trend" adds a moving average."""

    title: str
    unit: str
    lines: Sequence[tuple[str, str, str]]
    is_log: bool = False
    from_zero: bool = False


_LEARNING = (
    Curve("Loss", "nats per token", (("training", "loss", "trend"), ("held out", "eval/loss", "dots")), is_log=True),
    Curve("Bits per byte", "bits per byte of text",
          (("training", "bits_per_byte", "trend"), ("held out", "eval/bits_per_byte", "dots")), is_log=True),
    Curve("Gradient norm", "before clipping", (("gradient norm", "grad_norm", "trend"),), is_log=True),
    Curve("Learning rate", "", (("learning rate", "learning_rate", "line"),), from_zero=True),
    Curve("Infilled held-out lines", "share",
          (("exact match", "eval/infill/exact_match", "dots"),
           ("edit similarity", "eval/infill/edit_similarity", "dots")), from_zero=True),
)  # fmt: skip
_SPEED = (
    Curve("Throughput", "tokens a second", (("tokens", "tokens_per_second", "trend"),), from_zero=True),
    Curve("Model FLOPs utilisation", "share of the peak", (("MFU", "mfu", "trend"),), from_zero=True),
    Curve("Time of a step", "seconds",
          (("step", "step_time", "trend"), ("waiting for data", "data_wait", "trend")), from_zero=True),
)  # fmt: skip


def run_page(record: RunRecord, *, num_parameters: int | None = None, findings: Sequence[tuple[str, str]] = ()) -> str:
    """The page. num_parameters: of the model, if known. findings: (severity, sentence) of the doctor."""
    written = datetime.fromtimestamp(record.now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections = (
        Section(numbers=summary.headline(record), facts=summary.configuration(record, num_parameters)),
        Section(title="Findings of the doctor", findings=findings),
        _learning(record),
        Section(title="Speed and memory", charts=[*(_chart(record, *curve) for curve in _SPEED), _memory(record)]),
        _time(record),
        _checkpoints(record),
        _hosts(record),
        _failures(record),
    )
    return render_page(
        record.name, subtitle=status(record), sections=sections, footer=f"{record.path}, as of {written}"
    )


def _chart(
    record: RunRecord,
    title: str,
    unit: str,
    lines: Sequence[tuple[str, str | Series, str]],
    is_log: bool = False,
    from_zero: bool = False,
) -> Chart:
    drawn, legend = [], []
    for color, (name, series, style) in enumerate(lines):
        series = record.columns[series] if isinstance(series, str) else series
        if not len(series.finite()):
            continue
        legend.append((name, color))
        if style == "trend":
            drawn.append(Line(name, thinned(series), color, "faint"))
            drawn.append(Line(name, thinned(smoothed(series), 300), color))
        else:
            drawn.append(Line(name, thinned(series, 300), color, style))
    restarts = [attempt.ready for attempt in record.goodput.attempts[1:] if attempt.ready]
    svg = line_chart(drawn, label=f"{title} ({unit})", is_log=is_log, from_zero=from_zero, marks=restarts)
    return Chart(title, svg, legend, unit)


def _learning(record: RunRecord) -> Section:
    charts = [_chart(record, *curve) for curve in _LEARNING] + [_fim(record)]
    tables = []
    for kind, plural, noun in (("corpus", "corpora", "corpus"), ("lang", "languages", "language")):
        rows = summary.held_out_rows(record, kind)
        series = record.columns.matching(f"eval/{kind}/", "/bits_per_byte")
        largest = [(row[0], series[row[0]], "dots") for row in rows[:_MOST_LINES]]
        charts.append(_chart(record, f"Bits per byte of {plural}", "held out", largest, is_log=True))
        cells = [(row[0], f"{row[1]:.4f}", f"{row[2]:.4f}", f"{row[3]:,}", f"{row[4]:.4f}") for row in rows]
        tables.append(Table((noun, "first", "best", "at step", "last"), cells, "Held-out bits per byte."))
    return Section(title="Learning", charts=[*charts, _positions(record)], tables=tables)


def _fim(record: RunRecord) -> Chart:
    shares = {
        "FIM": block_means(record.columns["fim_share"]),
        "SPM of it": block_means(record.columns["fim_spm_share"]),
    }
    data = record.config.data if record.config is not None else None
    rates = (data.fim_rate, data.fim_spm_rate) if data is not None else (None, None)
    drawn = [Line(name, series, color) for color, (name, series) in enumerate(shares.items())]
    for line, rate in list(zip(drawn, rates, strict=True)):
        if rate is not None and len(line.series):
            ends = line.series.steps[[0, -1]]
            drawn.append(Line(line.name, Series(ends, np.full(2, rate)), line.color, "dashed"))
    svg = line_chart(drawn, label="Fill-in-the-middle (share of pieces)", from_zero=True)
    return Chart("Fill-in-the-middle", svg, [(line.name, line.color) for line in drawn[:2]],
                 "share of pieces; dashed: configured")  # fmt: skip


def _positions(record: RunRecord) -> Chart:
    losses = position_losses(record.columns)
    steps = sorted({int(step) for series in losses.values() for step in series.steps})
    if not steps:
        return Chart("Held-out loss by position", "")
    lines, places = [], np.arange(len(losses))
    for color, step in enumerate(sorted({steps[round(share * (len(steps) - 1))] for share in (0, 1 / 3, 2 / 3, 1)})):
        values = np.array([series.at(np.array([step]))[0] for series in losses.values()])
        lines.append(Line(f"step {step:,}", Series(places, values), color, "dots"))
    ticks = {float(place): short(first) for place, (first, _) in enumerate(losses)}
    svg = line_chart(lines, ticks=ticks, label="Held-out loss by position in the window (nats per token)")
    legend = [(line.name, line.color) for line in lines]
    return Chart("Held-out loss by position", svg, legend, "first position of a bucket")


def _memory(record: RunRecord) -> Chart:
    keys = {"host": "host_memory", "device": "device_memory", "device, peak": "device_memory_peak"}
    lines = [(name, record.columns[key].scaled(1 / _GIB), "line") for name, key in keys.items()]
    return _chart(record, "Memory", "GiB in use", lines, from_zero=True)


def _time(record: RunRecord) -> Section:
    goodput = record.goodput
    if goodput.share is None:
        text = "" if goodput.attempts else "There is no events.jsonl: times are not known."
        return Section(title="Time", text=text)
    amounts = over_time(goodput, _BINS)
    rows = summary.goodput_rows(record)
    svg = stacked_chart(
        {_CATEGORY_COLORS[name]: amounts[name] for name in CATEGORIES},
        duration=goodput.wall,
        marks=[attempt.offset for attempt in goodput.attempts[1:]],
        label="Time by category over the run: " + ", ".join(f"{name} {share}" for name, _, share in rows),
    )
    return Section(
        title="Time",
        text=f"Goodput {goodput.share:.1%}: the share of {format_duration(goodput.wall)} in steps that were not lost.",
        shares=[
            (name, goodput.seconds[key] / goodput.wall, _CATEGORY_COLORS[key])
            for key, name in CATEGORY_NAMES.items()
            if goodput.seconds[key] > summary.MIN_SECONDS
        ],
        charts=[Chart("Time over the run", svg, note="dotted: a restart")],
        tables=[Table(("category", "time", "share"), rows)],
    )


def _checkpoints(record: RunRecord) -> Section:
    exposed, seconds, sizes = (record.saved(key) for key in ("blocked", "seconds", "bytes"))
    if not len(exposed):
        exposed = record.columns["checkpoint_seconds"]
    rows = []
    for step, problem in list(record.checkpoints.items())[-20:]:
        size = sizes.at(np.array([step]))[0]
        rows.append((f"{step:,}", problem or "complete", format_bytes(size) if np.isfinite(size) else ""))
    lines = [("exposed to the step", exposed, "dots"), ("until committed", seconds, "dots")]
    size = [("checkpoint", sizes.scaled(1 / _GIB), "dots")]
    return Section(
        title="Checkpoints",
        charts=[
            _chart(record, "Time of a save", "seconds", lines, from_zero=True),
            _chart(record, "Size", "GiB", size, from_zero=True),
        ],
        tables=[Table(("checkpoint of step", "state", "size"), rows)],
    )


def _hosts(record: RunRecord) -> Section:
    lines = [("slowest host", "hosts/slowest_seconds", "line"), ("median", "hosts/median_seconds", "line")]
    rows = [(str(host), f"{host.count:,}", f"{host.behind:.3f} s") for host in slowest_hosts(record)[:20]]
    return Section(
        title="Hosts",
        charts=[_chart(record, "Time of a host's own work in a step", "seconds", lines, from_zero=True)],
        tables=[Table(("host", "times the slowest", "behind the median, a step"), rows)],
    )


def _failures(record: RunRecord) -> Section:
    attempts = summary.attempt_rows(record)
    skipped = record.skipped_steps
    alarms = [(f"{step:,}", rule, message) for step, rule, message in record.alarms]
    return Section(
        title="Starts, alarms, skipped steps",
        text=f"Skipped steps: {format_ranges(skipped, 40)}." if skipped else "",
        tables=[
            Table(
                summary.ATTEMPT_COLUMNS,
                attempts[-100:],
                f"The last 100 of {len(attempts):,} starts." if len(attempts) > 100 else "",
            ),
            Table(("step", "alarm", "message"), alarms[-200:]),
            Table(("stack file", "reason"), [(stack.name, stack.reason) for stack in record.stacks]),
        ],
    )
