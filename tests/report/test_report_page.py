"""The report: a self-contained page with the numbers of the run, small and fast also for a long run."""

import html.parser
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import STARTED, attempt_events, healthy

from jaxcoder.record.run_record import read_run
from jaxcoder.record.series import Series, read_columns, smoothed, thinned
from jaxcoder.record.status import silent_for, status
from jaxcoder.report.charts import Line, line_chart, short
from jaxcoder.report.page import run_page
from jaxcoder.report.summary import describe

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """What a page holds: its text, its elements with attributes; every element closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.elements, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def check_self_contained(text: str) -> Page:
    parsed = Page(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in parsed.elements}
    for _, attributes in parsed.elements:
        assert not {"src", "xlink:href", "srcset"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")  # the markers of a chart
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    return parsed


def restarted(run):
    run.events = attempt_events(
        "a", STARTED, 0, 450, reason="SIGTERM", message="stopped after step 450, which is saved."
    )
    run.events += attempt_events("b", run.events[-1]["time"] + 300, 450, 730)
    run.events += attempt_events("c", run.events[-1]["time"] + 600, 700, 1000, reason="finished")
    return run


def test_a_run_with_restarts(tmp_path):
    run = restarted(healthy())
    run.metrics.append({"step": 900, "alarm/loss_spike": "the loss jumped to 9"})
    for record in run.steps()[499:502]:
        record |= {"skipped": 1, "loss": "NaN"}
    record = run.read(tmp_path / "run")
    parsed = check_self_contained(
        run_page(record, num_parameters=1234567, findings=[("warning", "The disk is <slow>.")])
    )
    share = record.goodput.share
    for words in (
        "1,000 of 1,000 (100%)", "1,234,567 parameters", f"{share:.1%}", "30", "after step 450, which is saved.",
        "died without an end event",
        "the loss jumped to 9", "500 to 502", "The disk is <slow>.",
        "haskell", "issues", "host-1",
        "8.19 million", f"{run.evaluations()[-1]['eval/loss']:.4f}", "45.0%", "451 to 730",
        "10:00", "13.0 GiB", "complete",
    ):  # fmt: skip
        assert words in parsed.text, words
    titles = (
        "Loss", "Bits per byte", "Gradient norm", "Learning rate", "Fill-in-the-middle", "Bits per byte of corpora",
        "Bits per byte of languages", "Held-out loss by position", "Throughput", "Model FLOPs utilisation",
        "Time of a step", "Memory", "Time over the run", "Time of a save", "Size",
        "Time of a host's own work in a step",
    )  # fmt: skip
    for title in titles:
        assert title in parsed.text, title
    assert parsed.count("svg") == len(titles)
    labels = [attributes["aria-label"] for tag, attributes in parsed.elements if tag == "svg"]
    assert all(labels)


def test_the_summary_has_the_same_numbers(tmp_path):
    record = restarted(healthy()).read(tmp_path / "run")
    text = describe(record, num_parameters=1234567)
    for words in (
        "made: finished", "1,234,567 parameters", f"{record.goodput.share:.1%} of", "3, 30 steps lost", "died",
        "checkpoints: 10 of 13.0 GiB", "slowest host: host-", "python", "45.0%",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize(
    "files", [(), ("config.json",), ("metrics.jsonl",), ("events.jsonl",), ("config.json", "events.jsonl")]
)
def test_files_that_are_missing(tmp_path, files):
    run = healthy(100)
    path = run.write(tmp_path / "run")
    for name in files:
        (path / name).unlink()
    record = read_run(str(path), now=run.now)
    check_self_contained(run_page(record))
    assert describe(record)
    if "events.jsonl" in files:
        assert "without events.jsonl" in run_page(record)


def test_status_in_words(tmp_path):
    run = healthy(100)
    last = run.events.pop()["time"]
    run.now = last + 20
    assert "running" in status(run.read(tmp_path / "run"))
    run.now = last + 100_000
    record = run.read(tmp_path / "run")
    assert silent_for(record) > 90_000 and "no event for 27:" in status(record)
    (tmp_path / "run" / "events.jsonl").write_text("")
    assert "only metrics" in status(read_run(str(tmp_path / "run")))


def test_hostile_names(tmp_path):
    run = healthy(100)
    evil = "<script>alert('x')</script>&\"$x_1$"
    for record in run.evaluations():
        record[f"eval/lang/{evil}/bits_per_byte"] = 1.0
    run.metrics.append(
        {"step": 3, f"alarm/{evil}": evil, "hosts/slowest_name": evil, "hosts/slowest": 1, "hosts/slowest_seconds": 1.0}
    )
    run.events.append(
        {"time": STARTED + 999, "attempt": evil, "event": "begin", "hosts": evil, "mesh": evil, "device_kind": evil}
    )
    run.events.append({"time": STARTED + 1e300, "attempt": evil, "event": "end", "reason": evil, "message": evil})
    check_self_contained(run_page(run.read(tmp_path / "run"), findings=[(evil, evil)]))


def test_a_remote_run(tmp_path):
    import fsspec

    path = healthy(100).write(tmp_path / "run")
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/report-test/run", recursive=True)
    record = read_run("memory://report-test/run")
    assert record.config is not None and record.last_step == 100 and record.checkpoints == {90: "", 100: ""}
    check_self_contained(run_page(record))


def test_a_long_run_is_quick_and_its_page_small(tmp_path):
    """A tenth of the longest run here: reading is linear, and the page hardly grows."""
    sample = [json.dumps(record) for record in healthy(200).metrics if "loss" in record]
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(25_000):
            line = sample[step % len(sample)]
            file.write(f'{{"step": {step + 1}{line[line.index(",") :]}\n')
    began = time.process_time()
    record = read_run(str(tmp_path))
    text = run_page(record)
    describe(record)
    assert time.process_time() - began < 10 and len(text) < 1_000_000
    assert record.last_step == 25_000


def test_thinning_keeps_extremes_and_ends():
    values = np.sin(np.arange(100_000) / 999)
    values[77_777], values[33_333] = 50, -50
    values[5] = np.nan
    series = Series(np.arange(1, 100_001), values)
    thin = thinned(series, 300)
    assert len(thin) <= 602 and thin.values.max() == 50 and thin.values.min() == -50
    assert thin.steps[0] == 1 and thin.steps[-1] == 100_000 and np.all(np.diff(thin.steps) > 0)
    assert len(thinned(Series(np.arange(3), np.arange(3.0)))) == 3
    assert abs(smoothed(Series(np.arange(1000), np.full(1000, 2.5))).values - 2.5).max() < 1e-12


def test_columns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "a": 1}\n{"step": 1, "a": "NaN", "t": "x"}\n{"step": 2, "a": 3.5, "b": true}\n{"step": 3, "a": '
        '[1]}\n{"st'
    )
    columns = read_columns(path)
    assert columns["a"].steps.tolist() == [1, 2] and np.isnan(columns["a"].values[0]) and columns["a"].last == 3.5
    assert columns.texts == {"t": [(1, "x")]} and columns.last_step == 2 and len(columns["none"]) == 0
    assert columns["a"].at(np.array([2, 9])).tolist()[0] == 3.5 and np.isnan(columns["a"].at(np.array([2, 9]))[1])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(allow_nan=True)), max_size=20),
    st.sampled_from(["line", "faint", "dots", "dashed"]),
    st.booleans(),
    st.booleans(),
)
def test_any_line_can_be_drawn(points, style, is_log, from_zero):
    steps = np.array(sorted({step for step, _ in points}), np.int64)
    series = Series(steps, np.array([value for _, value in points[: len(steps)]], np.float64))
    drawn = line_chart([Line("a", series, 3, style)], label="a<b", is_log=is_log, from_zero=from_zero and not is_log)
    if drawn:
        Page(drawn)
        assert "nan" not in drawn.replace("a&lt;b", "").lower().split("aria-label")[0]


def test_numbers_in_words():
    assert [short(value) for value in (0, 0.0003, 3e-6, 12, 3400, 250_000, 1.5e6)] == [
        "0", "0.0003", "3e-6", "12", "3.4k", "250k", "1.5M",
    ]  # fmt: skip


def test_a_page_is_the_same_every_time_and_takes_its_colours_from_the_style(tmp_path):
    record = restarted(healthy()).read(tmp_path / "run")
    page = run_page(record)
    assert page == run_page(record)
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--c0)" in charts and not re.search(r"#[0-9a-f]{6}[;\"]", charts)
