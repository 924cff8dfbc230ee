"""metrics.jsonl: its format, kills and resumes; TensorBoard; several writers."""

import json
import math
import os
import signal
import subprocess
import sys

import fsspec
import numpy as np
import pytest

from jaxcoder.errors import DataError, MissingExtraError
from jaxcoder.record.metrics import JsonlWriter, MultiWriter, TensorBoardWriter, read_metrics


def write_steps(path, steps, **options):
    writer = JsonlWriter(path, **options)
    for step in steps:
        writer.write(step, {"loss": step / 4})
    writer.close()


def steps_in(path):
    return [record["step"] for record in read_metrics(path)]


def test_a_line_is_one_object(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(np.int64(3), {"loss": np.float32(2.5), "tokens": 7, "lr": 1e-4})
    assert path.read_text() == '{"step": 3, "loss": 2.5, "tokens": 7, "lr": 0.0001}\n'  # there before close
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(4, {})


def test_jax_scalars(tmp_path):
    import jax.numpy as jnp

    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"loss": jnp.float32(2.5), "n": jnp.int32(3)})
    writer.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 2.5, "n": 3.0}]


def test_not_a_number_stays_json(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"a": math.nan, "b": math.inf, "c": -np.float32(np.inf)})
    writer.close()
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    record = read_metrics(path)[0]
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_continuing_drops_the_torn_line_only(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, range(1, 4))
    complete = path.read_bytes()
    path.write_bytes(complete + b'{"step": 4, "lo')
    write_steps(path, [4])
    assert path.read_bytes() == complete + b'{"step": 4, "loss": 1.0}\n'


def test_resuming_drops_the_steps_that_come_again(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, range(1, 10))
    write_steps(path, range(6, 8), resume_from_step=5)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6, 7]
    write_steps(path, [1], resume_from_step=0)
    assert steps_in(path) == [1]
    assert sorted(os.listdir(tmp_path)) == ["m.jsonl"]


def test_an_untouched_file_is_not_rewritten(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, range(3))
    inode = path.stat().st_ino
    write_steps(path, [3], resume_from_step=2)
    assert path.stat().st_ino == inode and steps_in(path) == [0, 1, 2, 3]


@pytest.mark.parametrize("garbage", [b"\x00\xff\n", b"[]\n", b"{}\n", b'{"step": "x"}\n', b"\n\n", b"NaN\n"])
def test_garbage_lines_are_left_out(tmp_path, garbage):
    path = tmp_path / "m.jsonl"
    path.write_bytes(garbage + b'{"step": 1}\n' + garbage)
    assert steps_in(path) == [1]
    write_steps(path, [2])
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2, "loss": 0.5}\n'


def test_kill_loses_nothing_that_was_written(tmp_path):
    path = tmp_path / "m.jsonl"
    code = (
        "import sys; from jaxcoder.record.metrics import JsonlWriter\n"
        f"writer = JsonlWriter({str(path)!r})\n"
        "for step in range(10**9):\n    writer.write(step, {'loss': 1.0})\n    step == 200 and print('go', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = steps_in(path)
    assert len(steps) > 200 and steps == list(range(len(steps)))


def test_remote_files_are_continued_too():
    path = "memory://jaxcoder-test/metrics.jsonl"
    writer = JsonlWriter(path, remote_every=2)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})
    assert steps_in(path) == [1, 2]
    writer.close()
    write_steps(path, [3, 4], resume_from_step=2)
    assert steps_in(path) == [1, 2, 3, 4]
    fsspec.filesystem("memory").rm("/jaxcoder-test", recursive=True)


def test_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match="no metrics file"):
        read_metrics(tmp_path / "none.jsonl")


def test_tensorboard_absent_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e .*\[tensorboard\]"):
        TensorBoardWriter(tmp_path)


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra `tensorboard` is not installed")
    writer = TensorBoardWriter(tmp_path, resume_from_step=1)
    writer.write(2, {"loss": np.float32(1.5), "note": "text"})
    writer.close()
    (events,) = tmp_path.glob("events.*")
    assert b"loss" in events.read_bytes()


class Recorder:
    def __init__(self, fails=False):
        self.seen, self.closed, self.fails = [], False, fails

    def write(self, step, metrics):
        self.seen.append((step, dict(metrics)))

    def close(self):
        self.closed = True
        if self.fails:
            raise OSError("full")


def test_multi_writer_closes_all():
    writers = [Recorder(fails=True), Recorder()]
    multi = MultiWriter(writers)
    multi.write(1, {"loss": 2.0})
    with pytest.raises(OSError, match="full"):
        multi.close()
    assert [writer.seen for writer in writers] == [[(1, {"loss": 2.0})]] * 2 and all(
        writer.closed for writer in writers
    )


def test_lines_that_are_not_metrics_are_reported(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\ngarbage\n{"no": "step"}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert "has 2 lines that are not metrics, which are ignored" in caplog.text
