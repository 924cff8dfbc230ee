"""Charts as inline SVG, written by hand: small, sharp on paper, and coloured by the page's style (light or dark).

Colours are classes (c0 .. c9, and the categories of goodput), so a chart holds no colour of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from jaxcoder.record.series import Series

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 24
NUM_COLORS = 10
_LEAST, _MOST = 1e-30, 1e30


@dataclass(frozen=True)
class Line:
    """style: "line", "faint" (behind the others), "dots" (a line with its points) or "dashed"."""

    name: str
    series: Series
    color: int = 0
    style: str = "line"


@dataclass(frozen=True)
class _Scale:
    """From values to places along an axis of the picture."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        values, low, high = np.asarray(values, np.float64), self.low, self.high
        if self.is_log:
            values, low, high = np.log10(np.maximum(values, low)), math.log10(low), math.log10(high)
        return self.start + (values - low) / (high - low) * (self.stop - self.start)


def line_chart(
    lines: Sequence[Line],
    *,
    unit: str,
    is_log: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    ticks: Mapping[float, str] | None = None,
    label: str = "",
) -> str:
    """An SVG of the lines over steps, "" when there is nothing to draw.

    unit: what the values are, for screen readers. marks: steps with a vertical line (restarts).
    ticks: places and texts of the horizontal axis; None means numbers of steps.
    """
    lines = [Line(line.name, _drawable(line.series, is_log), line.color, line.style) for line in lines]
    lines = [line for line in lines if len(line.series)]
    if not lines:
        return ""
    x_low, x_high = _bounds([line.series.steps for line in lines])
    y_low, y_high = _bounds([line.series.values for line in lines])
    if from_zero:
        y_low = min(y_low, 0.0)
    y_low, y_high = _roomier(y_low, y_high, is_log, from_zero)
    x = _Scale(x_low, x_high if x_high > x_low else x_low + 1, LEFT, WIDTH - RIGHT)
    y = _Scale(y_low, y_high, HEIGHT - BOTTOM, TOP, is_log)
    parts = [_y_axis(y), _x_axis(x, {v: short(v) for v in nice_ticks(x.low, x.high, 5)} if ticks is None else ticks)]
    parts += [f'<path class="mark" d="M{float(x(np.array(at))):.1f} {TOP}V{HEIGHT - BOTTOM}"/>' for at in marks]
    parts += [_path(line, x, y) for line in sorted(lines, key=lambda line: line.style != "faint")]
    return _svg(parts, label or f"{', '.join(line.name for line in lines)} ({unit})")


def _drawable(series: Series, is_log: bool) -> Series:
    """Values that arithmetic in float64 can place; for a logarithmic axis those above 0."""
    series = Series(series.steps, np.where(np.abs(series.values) < _LEAST, 0.0, series.values))
    return series.where((np.abs(series.values) <= _MOST) & ((series.values > 0) | (not is_log)))


def _path(line: Line, x: _Scale, y: _Scale) -> str:
    xs, ys = x(line.series.steps), y(line.series.values)
    color = f"c{line.color % NUM_COLORS}"
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))
    drawn = f'<polyline class="{line.style} {color}" points="{points}"/>' if len(xs) > 1 else ""
    if line.style == "dots" or len(xs) == 1:
        drawn += "".join(
            f'<circle class="{color}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"><title>{escape(line.name)}, {step:,}: '
            f'{value:.5g}'
            "</title></circle>"
            for a, b, step, value in zip(xs, ys, line.series.steps.tolist(), line.series.values.tolist(), strict=True)
        ) if len(xs) <= 60 else ""  # fmt: skip
    return drawn


def stacked_chart(
    values: Mapping[str, np.ndarray], *, ends: tuple[float, float], marks: Sequence[float], label: str
) -> str:
    """Columns from 0 to 1, each stacked from the categories' shares (names are CSS classes), over hours or minutes.

    ends: seconds at the two sides. marks: seconds with a vertical line.
    """
    bins = len(next(iter(values.values())))
    total = np.maximum(np.sum(list(values.values()), axis=0), 1e-12)
    edges = np.linspace(LEFT, WIDTH - RIGHT, bins + 1)
    height = HEIGHT - BOTTOM - TOP
    parts, below = [], np.zeros(bins)
    for name, amounts in values.items():
        share = amounts / total
        tops, bottoms = below + share, below
        below = tops
        if not share.any():
            continue
        # One closed outline per category: its upper edge from left to right, its lower one back.
        places = [
            f"{a:.1f} {HEIGHT - BOTTOM - height * t:.1f}H{b:.1f}"
            for a, b, t in zip(edges[:-1], edges[1:], tops, strict=True)
        ]
        back = [
            f"V{HEIGHT - BOTTOM - height * bottoms[i]:.1f}H{edges[i]:.1f}" for i in range(bins - 1, -1, -1)
        ]  # fmt: skip
        steps = "".join(("M" if i == 0 else "L") + place for i, place in enumerate(places))
        parts.append(f'<path class="area {name}" d="{steps}{"".join(back)}Z"/>')
    x = _Scale(ends[0], max(ends[1], ends[0] + 1e-9), LEFT, WIDTH - RIGHT)
    parts.append(_y_axis(_Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP), percent=True))
    parts.append(_x_axis(x, time_ticks(*ends)))
    parts += [f'<path class="mark" d="M{float(x(np.array(at))):.1f} {TOP}V{HEIGHT - BOTTOM}"/>' for at in marks]
    return _svg(parts, label)


def share_bar(shares: Mapping[str, float], label: str) -> str:
    """One horizontal bar: the categories' shares of the whole (names are CSS classes)."""
    whole, at, parts = sum(shares.values()) or 1.0, 0.0, []
    for name, amount in shares.items():
        width = 1000 * amount / whole
        if width >= 0.5:
            parts.append(
                f'<rect class="area {name}" x="{at:.1f}" width="{width:.1f}" height="40"><title>{escape(name)}: '
                f"{amount / whole:.1%}</title></rect>"
            )
        at += width
    return (
        f'<svg class="bar" viewBox="0 0 1000 40" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


# --- axes ------------------------------------------------------------------------------------------------------------


def _svg(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _y_axis(y: _Scale, *, percent: bool = False) -> str:
    values = log_ticks(y.low, y.high) if y.is_log else nice_ticks(y.low, y.high, 4)
    parts = []
    for value in values:
        at = float(y(np.array(value)))
        text = f"{value:.0%}" if percent else short(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    return "".join(parts)


def _x_axis(x: _Scale, ticks: Mapping[float, str]) -> str:
    parts = [f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>']
    for value, text in ticks.items():
        at = float(x(np.array(value)))
        anchor = "end" if at > WIDTH - RIGHT - 12 else "start" if at < LEFT + 4 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{escape(text)}</text>')
    return "".join(parts)


def _bounds(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    return min(float(values.min()) for values in arrays), max(float(values.max()) for values in arrays)


def _roomier(low: float, high: float, is_log: bool, from_zero: bool) -> tuple[float, float]:
    """A little more than the values span, and never nothing."""
    if is_log:
        room = max((high / low) ** 0.04, 1.02)
        return low / room, high * room
    if high - low < 1e-9 * max(abs(high), abs(low)):
        low, high = (low + high) / 2, (low + high) / 2
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within low..high."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    size = 10 ** math.floor(math.log10(span / count))
    step = next((factor * size for factor in (1, 2, 5) if span / (factor * size) <= count), 10 * size)
    first = math.ceil(low / step - 1e-9)
    digits = 12 - math.floor(math.log10(step))
    return [round(float(i * step), digits) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low..high; also their doubles and fives where those are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ten = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(ten) > 5:
        return ten[:: math.ceil(len(ten) / 5)]
    if len(ten) >= 3:
        return ten
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 3, 5) if low <= factor * 10.0**power <= high]
    return fine if len(fine) >= 3 else nice_ticks(low, high, 4)


def time_ticks(low: float, high: float) -> dict[float, str]:
    """Round times within low..high seconds, as "40 min", "12 h" or "3 d"."""
    unit, name = next(
        (pair for pair in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")) if high - low >= 3 * pair[0]), (1.0, "s")
    )
    return {tick * unit: f"{tick:g} {name}" for tick in nice_ticks(low / unit, high / unit, 5)}


def short(value: float) -> str:
    """ "0.0003", "12", "3.4k", "250k", "1.5M", "2.1G"."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}" if size >= 1e-4 or size == 0 else f"{value:.0e}".replace("e-0", "e-")
