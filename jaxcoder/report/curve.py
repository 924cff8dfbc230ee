"""The loss curve of a run as a PNG file."""

from pathlib import Path

from jaxcoder.errors import DataError
from jaxcoder.record.series import read_columns, smoothed

TRAIN_COLOR, EVAL_COLOR = "#3366aa", "#cc6600"


def draw_curve(metrics_path: str | Path, picture_path: str | Path, *, title: str = "") -> Path:
    """Writes a PNG of the training loss (each step faint, smoothed strong) and of the held-out loss where there is one.

    Losses are nats per token; those that are not finite are left out. DataError when there is nothing to draw.
    """
    columns = read_columns(metrics_path)
    train, held_out = columns["loss"].finite(), columns["eval/loss"].finite()
    if not len(train) and not len(held_out):
        raise DataError(f"{str(metrics_path)!r} has no finite 'loss': let the run log at least one step.")

    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if len(train):
        mean = smoothed(train)
        axes.plot(train.steps, train.values, color=TRAIN_COLOR, alpha=0.25, linewidth=0.8)
        axes.plot(mean.steps, mean.values, color=TRAIN_COLOR, linewidth=1.8, label="training (smoothed)")
    if len(held_out):
        axes.plot(
            held_out.steps, held_out.values, color=EVAL_COLOR, linewidth=1.8, marker="o", markersize=4, label="held out"
        )
        axes.annotate(
            f"{held_out.last:.3f}", (held_out.steps[-1], held_out.last), xytext=(-4, 8), ha="right",
            textcoords="offset points", color=EVAL_COLOR,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture_path = Path(picture_path)
    picture_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture_path, format="png")
    return picture_path
