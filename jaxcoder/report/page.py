"""The report of a run as one HTML page that needs nothing else: no network, no script, plain CSS, SVG in the text.

Reads well in light and dark, on paper and on a phone. Series are thinned to a few hundred points with their extremes
before they are drawn, so the page of a run of 250,000 steps is no larger than that of a short one.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

import numpy as np

from jaxcoder.formatting import format_bytes, format_duration
from jaxcoder.record import summary
from jaxcoder.record.goodput import CATEGORIES, over_time
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.series import Columns, Series, smoothed, thinned
from jaxcoder.report.charts import NUM_COLORS, Line, line_chart, share_bar, short, stacked_chart
from jaxcoder.report.style import STYLE

_MOST_LINES = 8
_BINS = 240


def page(record: RunRecord, *, parameters: int | None = None, findings: Sequence[tuple[str, str]] = ()) -> str:
    """The whole page. findings: (severity, sentence) of `doctor`."""
    name = record.config.name if record.config is not None else record.path
    written = datetime.fromtimestamp(record.now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        f"<header><h1>{escape(name)}</h1><p>{escape(summary.status(record))}</p></header>",
        _headline(record),
        _definitions(summary.trained(record, parameters)),
        _findings(findings),
        _section("Learning", [*_learning(record), *_held_out(record)]),
        _section("Speed and memory", _speed(record)),
        _section("Where the time went", _time(record)),
        _section("Checkpoints", _checkpoints(record)),
        _section("Hosts", _hosts(record)),
        _section("What went wrong", _wrong(record)),
        f"<footer>{escape(record.path)}, as of {written}</footer>",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(name)}: jaxcoder report</title>'
        f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(filter(None, body)) + "\n</main></body></html>\n"
    )


# --- pieces of a page ------------------------------------------------------------------------------------------------


def _headline(record: RunRecord) -> str:
    cells = "".join(
        f"<div><b>{escape(figure.value)}</b><span>{escape(figure.name)}</span></div>"
        for figure in summary.headline(record)
    )
    return f'<section class="numbers">{cells}</section>'


def _definitions(figures: Sequence[summary.Figure]) -> str:
    rows = "".join(f"<dt>{escape(figure.name)}</dt><dd>{escape(figure.value)}</dd>" for figure in figures)
    return f"<dl>{rows}</dl>"


def _findings(findings: Sequence[tuple[str, str]]) -> str:
    rows = "".join(
        f'<li class="{escape(level)}"><b>{escape(level)}</b> {escape(said)}</li>' for level, said in findings
    )
    return f"<section><h2>What doctor sees</h2><ul>{rows}</ul></section>" if rows else ""


def _section(title: str, parts: Sequence[str]) -> str:
    inside = "\n".join(part for part in parts if part)
    return f"<section><h2>{title}</h2>\n{inside}\n</section>" if inside else ""


def _figure(title: str, chart: str, lines: Sequence[tuple[str, int]] = (), note: str = "") -> str:
    """lines: (name, color) for a legend."""
    if not chart:
        return ""
    legend = "".join(f'<span><i class="c{color % NUM_COLORS}"></i>{escape(name)}</span>' for name, color in lines)
    legend = f'<p class="legend">{legend}</p>' if len(lines) > 1 else ""
    note = f"<small>{escape(note)}</small>" if note else ""
    return f"<figure><figcaption>{escape(title)} {note}</figcaption>{chart}{legend}</figure>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    note = f"<p><small>{escape(note)}</small></p>" if note else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _charts(figures: Sequence[str]) -> str:
    inside = "".join(figure for figure in figures if figure)
    return f'<div class="charts">{inside}</div>' if inside else ""


def _restarts(record: RunRecord) -> list[int]:
    return [attempt.ready for attempt in record.goodput.attempts[1:] if attempt.ready]


def _curve(
    record: RunRecord,
    title: str,
    wanted: Sequence[tuple[str, Series, str]],
    *,
    unit: str,
    is_log=False,
    from_zero=False,
) -> str:
    """wanted: (name, series, style) of each line; the style "both" is faint with its moving average over it."""
    lines, legend = [], []
    for color, (name, series, style) in enumerate(wanted):
        if not len(series.finite()):
            continue
        legend.append((name, color))
        if style == "both":
            lines.append(Line(name, thinned(series), color, "faint"))
            lines.append(Line(name, thinned(smoothed(series), 300), color))
        else:
            lines.append(Line(name, thinned(series, 300), color, style))
    chart = line_chart(
        lines, unit=unit, is_log=is_log, from_zero=from_zero, marks=_restarts(record), label=f"{title} ({unit})"
    )
    return _figure(title, chart, legend, unit)


# --- sections --------------------------------------------------------------------------------------------------------


def _learning(record: RunRecord) -> list[str]:
    columns = record.columns
    return [
        _charts(
            [
                _curve(
                    record,
                    "Loss",
                    [("training", columns["loss"], "both"), ("held out", columns["eval/loss"], "dots")],
                    unit="nats per token",
                    is_log=True,
                ),
                _curve(
                    record,
                    "Bits per byte",
                    [
                        ("training", columns["bits_per_byte"], "both"),
                        ("held out", columns["eval/bits_per_byte"], "dots"),
                    ],
                    unit="bits per byte of text",
                    is_log=True,
                ),
                _curve(
                    record,
                    "Gradient norm",
                    [("before clipping", columns["grad_norm"], "both")],
                    unit="norm",
                    is_log=True,
                ),
                _curve(
                    record,
                    "Learning rate",
                    [("learning rate", columns["learning_rate"], "line")],
                    unit="",
                    from_zero=True,
                ),
                _fim(record),
                _curve(
                    record,
                    "Infilled held-out lines",
                    [
                        ("exact match", columns["eval/infill/exact_match"], "dots"),
                        ("edit similarity", columns["eval/infill/edit_similarity"], "dots"),
                    ],
                    unit="share",
                    from_zero=True,
                ),
            ]
        )
    ]


def _fim(record: RunRecord) -> str:
    lines, legend = [], []
    for color, (name, field) in enumerate((("FIM", "fim_rate"), ("SPM of it", "fim_spm_rate"))):
        series = _block_means(record.columns, "fim_share" if field == "fim_rate" else "fim_spm_share")
        if not len(series):
            continue
        lines.append(Line(name, series, color))
        legend.append((name, color))
        if record.config is not None:
            asked = record.config.data.fim_rate if field == "fim_rate" else record.config.data.fim_spm_rate
            ends = np.array([series.steps[0], series.steps[-1]])
            lines.append(Line(f"{name}, as configured", Series(ends, np.full(2, asked)), color, "dashed"))
    chart = line_chart(
        lines, unit="share of pieces", from_zero=True, marks=_restarts(record), label="Fill-in-the-middle"
    )
    return _figure("Fill-in-the-middle", chart, legend, "share of pieces; dashed: as configured")


def _block_means(columns: Columns, key: str, blocks: int = 60) -> Series:
    """Shares of single batches say little: means over stretches of steps."""
    series = columns[key].finite()
    if len(series) < 2:
        return series
    edges = np.linspace(0, len(series), min(blocks, len(series)) + 1).astype(np.int64)
    means = np.add.reduceat(series.values, edges[:-1]) / np.diff(edges)
    return Series(series.steps[edges[:-1]], means)


def _held_out(record: RunRecord) -> list[str]:
    parts, figures = [], []
    for kind, title, column in (("corpus", "Bits per byte of each corpus", "corpus"),
                                ("lang", "Bits per byte of each language", "language")):  # fmt: skip
        rows = summary.held_out_rows(record, kind)
        series = record.columns.matching(f"eval/{kind}/", "/bits_per_byte")
        shown = [(row[0], series[row[0]], "dots") for row in rows[:_MOST_LINES]]
        figures.append(_curve(record, title, shown, unit="held out", is_log=True))
        cells = [(row[0], f"{row[1]:.4f}", f"{row[2]:.4f}", f"{row[3]:,}", f"{row[4]:.4f}") for row in rows]
        parts.append(_table((column, "first", "best", "at step", "last"), cells, "Held-out bits per byte."))
    return [_charts([*figures, _positions(record)]), *parts]


def position_losses(record: RunRecord) -> tuple[list[str], list[Series]]:
    """Names of the buckets of positions ("0-63") in order, and the held-out loss of each."""
    found = record.columns.matching("eval/position/", "/loss")
    names = [name for name in found if name.partition("-")[0].isdecimal()]
    names.sort(key=lambda name: int(name.partition("-")[0]))
    return names, [found[name].finite() for name in names]


def _positions(record: RunRecord) -> str:
    names, losses = position_losses(record)
    steps = sorted({int(step) for series in losses for step in series.steps})
    if not steps:
        return ""
    chosen = sorted({steps[round(place * (len(steps) - 1))] for place in (0, 1 / 3, 2 / 3, 1)})
    lines, places = [], np.arange(len(names))
    for color, step in enumerate(chosen):
        values = np.array([series.at(np.array([step]))[0] for series in losses])
        lines.append(Line(f"step {step:,}", Series(places, values), color, "dots"))
    ticks = {float(place): short(int(name.partition("-")[0])) for place, name in enumerate(names)}
    chart = line_chart(lines, unit="nats per token", ticks=ticks, label="Held-out loss by position in the window")
    return _figure(
        "Held-out loss by position", chart, [(line.name, line.color) for line in lines], "first position of a bucket"
    )


def _speed(record: RunRecord) -> list[str]:
    columns = record.columns
    gib = 2.0**30
    memory = [("of the host", columns["host_memory"]), ("of a device", columns["device_memory"]),
              ("of a device, at most", columns["device_memory_peak"])]  # fmt: skip
    return [
        _charts(
            [
                _curve(
                    record,
                    "Throughput",
                    [("tokens a second", columns["tokens_per_second"], "both")],
                    unit="tokens a second",
                    from_zero=True,
                ),
                _curve(
                    record,
                    "Model FLOPs utilisation",
                    [("MFU", columns["mfu"], "both")],
                    unit="share of the peak",
                    from_zero=True,
                ),
                _curve(
                    record,
                    "Time of a step",
                    [("step", columns["step_time"], "both"), ("waiting for data", columns["data_wait"], "both")],
                    unit="seconds",
                    from_zero=True,
                ),
                _curve(
                    record,
                    "Memory",
                    [(name, Series(s.steps, s.values / gib), "line") for name, s in memory],
                    unit="GiB in use",
                    from_zero=True,
                ),
            ]
        )
    ]


def _time(record: RunRecord) -> list[str]:
    goodput = record.goodput
    if goodput.wall <= 0:
        note = "There is no events.jsonl: the run is of a version that wrote none, and only its metrics are known."
        return [] if goodput.attempts else [f"<p>{note}</p>"]
    shares = {name: goodput.seconds[name] for name in CATEGORIES}
    words = ", ".join(f"{name} {share}" for name, _, share in summary.goodput_rows(record))
    marks = [attempt.offset for attempt in goodput.attempts[1:]]
    chart = stacked_chart(
        over_time(goodput, _BINS),
        ends=(0.0, goodput.wall),
        marks=marks,
        label=f"Time by category over the run: {words}",
    )
    legend = "".join(
        f'<span><i class="{key}"></i>{escape(name)}</span>'
        for key, name in summary.CATEGORY_NAMES.items()
        if goodput.seconds[key] > 0.05
    )
    shown = f"Goodput {goodput.share:.1%}: time in steps that survived, of {format_duration(goodput.wall)} in all."
    return [
        f"<p>{shown}</p>{share_bar(shares, words)}<p class=legend>{legend}</p>",
        _charts([_figure("Over the whole run; a line is a restart", chart)]),
        _table(("", "time", "share"), summary.goodput_rows(record)),
    ]


def _checkpoints(record: RunRecord) -> list[str]:
    blocked, seconds, sizes = (record.saved(key) for key in ("blocked", "seconds", "bytes"))
    if not len(blocked):
        blocked = record.columns["checkpoint_seconds"]
    figures = [
        _curve(
            record,
            "Saving",
            [("a step waits", blocked, "dots"), ("until it is whole", seconds, "dots")],
            unit="seconds",
            from_zero=True,
        ),
    ]
    if len(sizes):
        sizes = Series(sizes.steps, sizes.values / 2**30)
        figures.append(_curve(record, "Size", [("checkpoint", sizes, "dots")], unit="GiB", from_zero=True))
    there = [(f"{step:,}", problem or "whole", _size(record, step)) for step, problem in record.checkpoints.items()]
    return [_charts(figures), _table(("checkpoint of step", "state", "size"), there[-20:])]


def _size(record: RunRecord, step: int) -> str:
    size = record.saved("bytes").at(np.array([step]))[0]
    return format_bytes(size) if np.isfinite(size) else ""


def _hosts(record: RunRecord) -> list[str]:
    columns = record.columns
    wanted = [
        ("slowest host", columns["hosts/slowest_seconds"], "line"),
        ("median", columns["hosts/median_seconds"], "line"),
    ]
    chart = _curve(record, "A host's own work in a step", wanted, unit="seconds", from_zero=True)
    rows = [(str(host), f"{host.count:,}", f"{host.behind:.3f} s") for host in summary.slowest_hosts(record)[:20]]
    return [_charts([chart]), _table(("host", "times the slowest", "behind the median, a step"), rows)]


def _wrong(record: RunRecord) -> list[str]:
    attempts = summary.attempt_rows(record)
    folded = f"The last 100 of {len(attempts):,} starts." if len(attempts) > 100 else ""
    alarms = [(f"{step:,}", rule, said) for step, rule, said in summary.alarm_rows(record)]
    skipped = record.columns["skipped"]
    steps = skipped.steps[skipped.values > 0].tolist()
    stacks = [(stack.name, stack.sentence) for stack in record.stacks]
    return [
        _table(summary.ATTEMPT_COLUMNS, attempts[-100:], folded),
        f"<p>Skipped steps, whose numbers were not usable: {summary.ranges(steps, 40)}.</p>" if steps else "",
        _table(("step", "alarm", "what"), alarms[-200:]),
        _table(("stacks of", "why"), stacks),
    ]
