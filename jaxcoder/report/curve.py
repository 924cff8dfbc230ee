"""The loss curve of a run as a picture, drawn from metrics.jsonl with matplotlib (no display needed)."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from jaxcoder.errors import DataError
from jaxcoder.record.metrics import read_metrics

TRAIN_COLOR, EVAL_COLOR = "#3366aa", "#cc6600"


def draw_curve(
    metrics_path: str | Path,
    picture_path: str | Path,
    *,
    title: str = "",
    train_key: str = "loss",
    eval_key: str = "eval/loss",
) -> Path:
    """Writes a PNG of the training loss (every step faint, smoothed strong) and, where there is one, the held-out loss.

    Losses are nats per token. Steps without the key and losses that are not finite are left out.
    Raises DataError when there is nothing to draw.
    """
    records = read_metrics(metrics_path)
    train = _series(records, train_key)
    held_out = _series(records, eval_key)
    if not train and not held_out:
        raise DataError(f"{str(metrics_path)!r} has no finite {train_key!r}: let the run log at least one step.")

    from matplotlib.figure import Figure  # without pyplot: no global state, no window, always the Agg canvas

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train)
        axes.plot(steps, losses, color=TRAIN_COLOR, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(losses), color=TRAIN_COLOR, linewidth=1.8, label="training (smoothed)")
    if held_out:
        steps, losses = zip(*held_out)
        axes.plot(steps, losses, color=EVAL_COLOR, linewidth=1.8, marker="o", markersize=4, label="held out")
        axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(-4, 8), ha="right",
                      textcoords="offset points", color=EVAL_COLOR)  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    picture_path = Path(picture_path)
    picture_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture_path, format="png")
    return picture_path


def _series(records: Sequence[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) in order of steps; of a step written twice (after a resume) the later line counts."""
    values = {record["step"]: record[key] for record in records if isinstance(record.get(key), int | float)}
    return sorted((step, float(value)) for step, value in values.items() if math.isfinite(value))


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Centred moving average over about `share` of the points, so that the curve does not lag behind a falling loss.

    At the start, where the loss falls fast, the window shrinks evenly; at the end it only loses its missing half.
    """
    reach = int(share * len(values) / 2)
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for i in range(len(values)):
        first, last = i - min(reach, i), min(i + min(reach, i), len(values) - 1)
        result.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return result
