"""The loss curve: a picture that is not empty, from logs with holes, resumes and infinities."""

import math
import subprocess
import sys

import pytest

from jaxcoder.errors import DataError
from jaxcoder.record.metrics import JsonlWriter
from jaxcoder.report.curve import draw_curve


def log(path, records):
    writer = JsonlWriter(path)
    for step, metrics in records:
        writer.write(step, metrics)
    writer.close()
    return path


def colours(picture):
    """How many pixels look blue (training) and orange (held out)."""
    from matplotlib.image import imread

    red, green, blue = (imread(picture)[..., channel] for channel in range(3))
    return int(((blue > 0.5) & (red < 0.4)).sum()), int(((red > 0.7) & (green < 0.6) & (blue < 0.3)).sum())


def test_two_lines(tmp_path):
    records = [
        (s, {"loss": 2 + 8 * math.exp(-s / 20)} | ({"eval/loss": 3.0} if s % 25 == 0 else {})) for s in range(1, 101)
    ]
    picture = draw_curve(log(tmp_path / "m.jsonl", records), tmp_path / "new" / "curve.png", title="tiny")
    training, held_out = colours(picture)
    assert training > 500 and held_out > 300


def test_one_line_with_holes_resumes_and_infinities(tmp_path):
    records = [
        (1, {"loss": math.nan}),
        (2, {"loss": 5}),
        (3, {}),
        (2, {"loss": 4.0}),
        (5, {"loss": math.inf}),
        (6, {"loss": 3.0}),
    ]
    training, held_out = colours(draw_curve(log(tmp_path / "m.jsonl", records), tmp_path / "curve.png"))
    assert training > 300 and held_out == 0


@pytest.mark.parametrize("records", [[], [(1, {"lr": 1.0})], [(1, {"loss": math.nan})]])
def test_nothing_to_draw(tmp_path, records):
    with pytest.raises(DataError, match="no finite 'loss'"):
        draw_curve(log(tmp_path / "m.jsonl", records), tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_matplotlib_is_lazy():
    code = "import sys, jaxcoder.report.curve; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
