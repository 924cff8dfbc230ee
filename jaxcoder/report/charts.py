"""Charts as inline SVG, drawn by matplotlib. Colours are CSS variables of the page, so they follow light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcoder.record.series import Series

NUM_COLORS = 11
"""Palette indices; the last is the neutral fill."""

# Placeholders that matplotlib draws with (its own cycle, so that an SVG taken out of the page still has colours);
# `_inline` replaces each by the page's variable.
_PALETTE = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#d62728", "#7f7f7f",
    "#17becf", "#bcbd22", "#e377c2", "#8c564b", "#dcdcdc",
)  # fmt: skip
_DIM, _RULE = "#616161", "#dddddd"
_VARIABLES = {color: f"var(--c{index})" for index, color in enumerate(_PALETTE)}
_VARIABLES |= {_DIM: "var(--dim)", _RULE: "var(--rule)"}

# Beyond these, axis arithmetic in float64 overflows or loses the ticks.
_SMALLEST, _LARGEST = 1e-30, 1e30
_MAX_MARKERS = 60
_STEPS = (1, 2, 5, 10)  # of ticks


@dataclass(frozen=True)
class Line:
    """style: "line", "faint" (behind the others), "dots" (a line with its points) or "dashed"."""

    name: str
    series: Series
    color: int = 0
    style: str = "line"


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    is_log: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    ticks: Mapping[float, str] | None = None,
) -> str:
    """SVG of lines over steps; "" when no value can be drawn.

    label: for screen readers. marks: steps with a vertical line. ticks: positions and texts of the horizontal axis,
    numbers of steps by default. Values that are not finite are left out, with `is_log` those that are not positive too.
    """
    from matplotlib import ticker

    lines = [Line(line.name, _drawable(line.series, is_log), line.color, line.style) for line in lines]
    lines = [line for line in lines if len(line.series)]
    if not lines:
        return ""
    figure, axes = _axes()
    for line in sorted(lines, key=lambda line: line.style != "faint"):
        steps, values = line.series.steps, line.series.values
        has_markers = len(steps) == 1 or (line.style == "dots" and len(steps) <= _MAX_MARKERS)
        axes.plot(
            steps.astype(np.float64), values, color=_PALETTE[line.color % NUM_COLORS], clip_on=False,
            linewidth=1.0 if line.style == "faint" else 1.7, alpha=0.3 if line.style == "faint" else None,
            linestyle="--" if line.style == "dashed" else "-", marker="o" if has_markers else None, markersize=4.5,
        )  # fmt: skip
    low = min(float(line.series.values.min()) for line in lines)
    high = max(float(line.series.values.max()) for line in lines)
    if is_log:
        axes.set_yscale("log")
        # Within a decade powers of ten would give one tick or none.
        narrow = high < 10 * low
        subs = (1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)
        axes.yaxis.set_major_locator(
            ticker.MaxNLocator(4, steps=_STEPS) if narrow else ticker.LogLocator(subs=subs, numticks=6)
        )
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=_STEPS))
        if from_zero and low >= 0:
            axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    if ticks is None:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=_STEPS))
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
    else:
        axes.set_xticks(list(ticks), list(ticks.values()))
    return _inline(figure, axes, marks, label)


def stacked_chart(amounts: Mapping[int, np.ndarray], *, duration: float, marks: Sequence[float], label: str) -> str:
    """SVG of the shares of each category over time.

    amounts: palette index -> float64 [bins], in any unit. duration: seconds of the whole axis. marks: seconds with a
    vertical line.
    """
    from matplotlib import ticker

    size, unit = next((pair for pair in ((86400, "d"), (3600, "h"), (60, "min")) if duration >= 3 * pair[0]), (1, "s"))
    total = np.maximum(np.sum(list(amounts.values()), axis=0), 1e-12)
    edges = np.linspace(0.0, duration / size, len(total) + 1)
    # One value more than bins: the last step of a "post" step plot needs its right edge.
    shares = {color: np.append(values, values[-1]) / np.append(total, total[-1]) for color, values in amounts.items()}
    shares = {color: values for color, values in shares.items() if values.any()}
    figure, axes = _axes()
    axes.stackplot(edges, *shares.values(), colors=[_PALETTE[color] for color in shares], step="post", clip_on=False)
    axes.set(ylim=(0, 1))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=_STEPS))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} {unit}")
    return _inline(figure, axes, [mark / size for mark in marks], label)


def short(value: float) -> str:
    """ "0.0003", "12", "3.4k", "250k", "1.5M", "2.1G"."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}" if size >= 1e-4 or size == 0 else f"{value:.0e}".replace("e-0", "e-")


def _drawable(series: Series, is_log: bool) -> Series:
    series = Series(series.steps, np.where(np.abs(series.values) < _SMALLEST, 0.0, series.values))
    return series.where((np.abs(series.values) <= _LARGEST) & ((series.values > 0) | (not is_log)))


def _axes():
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(480 / 72, 230 / 72), layout="constrained")  # 480 x 230 points, matplotlib's unit of SVG
    axes = figure.subplots()
    axes.margins(x=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_DIM)
    axes.tick_params(left=False, bottom=False, labelcolor=_DIM, labelsize=12)
    axes.grid(axis="y", color=_RULE, linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    return figure, axes


def _inline(figure, axes, marks: Sequence[float], label: str) -> str:
    """The figure as SVG for an HTML page: deterministic, and without what a standalone file needs."""
    import html

    import matplotlib

    for mark in marks:
        axes.axvline(mark, color=_DIM, linewidth=1, linestyle=":", alpha=0.6, clip_on=False)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jaxcoder"}):
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[a-z]\w*_\d+"', "", body).replace("xlink:href", "href")
    # A tenth of a point is enough, and a quarter of the bytes.
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), body)
    body = re.sub("#[0-9a-f]{6}", lambda color: _VARIABLES.get(color[0], color[0]), body)
    return f'<svg viewBox="0 0 480 230" role="img" aria-label="{html.escape(label)}">{body}'
