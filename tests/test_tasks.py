"""Shard tasks: done at least once, whole or not at all, whoever dies; what was finished is not done again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from jaxcoder import tasks
from jaxcoder.errors import DataError, MissingExtraError
from jaxcoder.tasks import ProcessPool, RayCluster, Task, run_stage, run_task

WORKERS = (1, 2)


def upper(inputs, output, *, log):
    """Writes the inputs in capitals; says in `log` that it ran."""
    with open(log, "a") as file:
        file.write(f"{Path(inputs[0]).name} {os.getpid()}\n")
    text = "".join(Path(path).read_text() for path in inputs)
    output.write_text(text.upper())
    return {"length": len(text)}


def dies_on_poison(inputs, output, *, log):
    if "poison" in Path(inputs[0]).read_text():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return upper(inputs, output, log=log)


def dies_once(inputs, output, *, log):
    flag = Path(f"{inputs[0]}.died")
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return upper(inputs, output, log=log)


def fails_on_poison(inputs, output, *, log):
    upper(inputs, output, log=log)
    if "poison" in Path(inputs[0]).read_text():
        raise ZeroDivisionError("one over nothing")
    return {"length": 1}


def refuses(inputs, output):
    raise DataError("This document is on fire: pour water on it.")


def no_space(inputs, output):
    raise OSError(28, "No space left on device")


def make(directory: Path, fn, texts, **settings) -> list[Task]:
    made = []
    for number, text in enumerate(texts):
        source = directory / f"in-{number}"
        source.write_text(text)
        where = partial(fn, **settings)
        made.append(Task(where, (str(source),), str(directory / f"out/{number}"), str(directory / f"done/{number}")))
    return made


@pytest.fixture(params=WORKERS)
def pool(request):
    with contextlib.closing(ProcessPool(request.param)) as pool:
        yield pool


class Counting:
    """A progress that adds up."""

    def __init__(self):
        self.total, self.done, self.summary = None, 0.0, None

    def start(self, what, total, unit):
        self.total = total

    def advance(self, amount, note=""):
        self.done += amount

    def finish(self, summary=""):
        self.summary = summary


def test_every_task_once_in_order_and_not_again(tmp_path, pool):
    log, progress = tmp_path / "log", Counting()
    stage = make(tmp_path, upper, ["abc" * number for number in range(7)], log=log)
    summaries = run_stage(
        stage, pool, what="Shouting", unit="files", progress=progress, summarize=lambda found: f"{len(found)} done"
    )
    assert summaries == [{"length": 3 * number, "bytes": 3 * number} for number in range(7)]
    assert [Path(task.output).read_text() for task in stage] == ["ABC" * number for number in range(7)]
    assert (progress.total, progress.done, progress.summary) == (7, 7, "7 done")
    assert sorted(os.listdir(tmp_path / "done")) == sorted(os.listdir(tmp_path / "out")) == list("0123456")
    ran = log.read_text().splitlines()
    assert len(ran) == 7
    if pool.num_workers > 1:
        assert str(os.getpid()) not in {line.split()[1] for line in ran}
    assert run_stage(stage, pool, what="Shouting", unit="files") == summaries
    assert log.read_text().splitlines() == ran


def test_unfinished_tasks_alone_are_done(tmp_path):
    log = tmp_path / "log"
    stage = make(tmp_path, upper, ["a", "b", "c", "d", "e"], log=log)
    run_stage(stage, ProcessPool(1), what="Shouting", unit="files")
    log.unlink()
    os.unlink(stage[0].marker)
    os.unlink(stage[1].output)
    Path(stage[2].output).write_text("too long")
    Path(stage[3].marker).write_text("")  # power was lost
    run_stage(stage, ProcessPool(1), what="Shouting", unit="files")
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["in-0", "in-1", "in-2", "in-3"]
    assert [Path(task.output).read_text() for task in stage] == list("ABCDE")
    assert run_task(stage[0]) == {"length": 1, "bytes": 1}  # a task that is mapped twice does nothing
    assert len(log.read_text().splitlines()) == 4


def test_workers_that_die_are_replaced(tmp_path):
    stage = make(tmp_path, dies_once, [str(number) for number in range(4)], log=tmp_path / "log")
    with contextlib.closing(ProcessPool(2)) as pool:
        summaries = run_stage(stage, pool, what="Shouting", unit="files")
    assert [summary["length"] for summary in summaries] == [1] * 4
    assert sorted(os.listdir(tmp_path / "done")) == list("0123")  # nor anything temporary


def test_an_input_that_kills_workers_is_named_and_the_others_are_done(tmp_path):
    texts = [str(number) for number in range(8)]
    texts[3] = "poison"
    stage = make(tmp_path, dies_on_poison, texts, log=tmp_path / "log")
    with contextlib.closing(ProcessPool(2)) as pool:
        with pytest.raises(DataError, match="Shouting failed after 2 retries on [^;]*in-3: the worker process died"):
            run_stage(stage, pool, what="Shouting", unit="files", max_retries=2)
        assert sorted(os.listdir(tmp_path / "out")) == [str(n) for n in range(8) if n != 3]
        (tmp_path / "in-3").write_text("cured")
        assert len(run_stage(stage, pool, what="Shouting", unit="files")) == 8


def test_an_input_that_fails_is_named_with_its_reason(tmp_path, pool):
    stage = make(tmp_path, fails_on_poison, ["a", "poison", "b"], log=tmp_path / "log")
    with pytest.raises(DataError, match="after 1 retries on .*in-1: ZeroDivisionError: one over nothing") as caught:
        run_stage(stage, pool, what="Shouting", unit="files", max_retries=1)
    assert "in fails_on_poison" in str(caught.value.__cause__)
    assert (tmp_path / "log").read_text().count("in-1") == 2
    assert sorted(os.listdir(tmp_path / "done")) == ["0", "2"]


def test_errors_of_the_user_end_the_stage_at_once(tmp_path, pool):
    with pytest.raises(DataError, match="^This document is on fire: pour water on it.$"):
        run_stage(make(tmp_path, refuses, ["a", "b", "c"]), pool, what="Shouting", unit="files")
    with pytest.raises(DataError, match="Cannot write .*out/0 .No space left on device.: free some space"):
        run_stage(make(tmp_path, no_space, ["a"]), pool, what="Shouting", unit="files")


def test_outputs_on_an_object_store(tmp_path):
    stage = make(tmp_path, upper, ["a", "b"], log=tmp_path / "log")
    remote = [
        Task(task.fn, task.inputs, f"memory://tasks/out/{number}", f"memory://tasks/done/{number}")
        for number, task in enumerate(stage)
    ]
    for _ in range(2):
        run_stage(remote, ProcessPool(1), what="Shouting", unit="files")
    import fsspec

    memory = fsspec.filesystem("memory")
    assert memory.cat_file("/tasks/out/1") == b"B"
    assert json.loads(memory.cat_file("/tasks/done/1")) == {"length": 1, "bytes": 1}
    assert len((tmp_path / "log").read_text().splitlines()) == 2


SCRIPT = """
import sys, time
from functools import partial
from pathlib import Path
from jaxcoder.tasks import ProcessPool, Task, run_stage

def slow(inputs, output):
    Path(inputs[0]).touch()
    time.sleep(60)

if __name__ == "__main__":
    folder = sys.argv[1]
    stage = [Task(slow, (f"{folder}/started-{n}",), f"{folder}/out-{n}", f"{folder}/done-{n}") for n in range(2)]
    run_stage(stage, ProcessPool(2), what="Sleeping", unit="naps")
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_owner(tmp_path, signal_number):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"started-{number}").exists() for number in range(2)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal_number)
    assert process.wait(30) != 0
    while True:  # the group is gone when its last process is
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a worker outlived its owner"
        time.sleep(0.05)


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"Ray cluster needs the extra `cluster`: run `pip install"):
        RayCluster()


def test_no_ray_cluster(monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra `cluster`")

    def refuse(*_, **__):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(DataError, match="no Ray cluster that is running: start one with `ray start --head`"):
        RayCluster("auto")


def test_the_same_stage_on_ray(tmp_path):
    pytest.importorskip("ray", reason="needs the extra `cluster`")
    stage = make(tmp_path, fails_on_poison, ["a", "poison", "b"], log=tmp_path / "log")
    with contextlib.closing(RayCluster("local")) as cluster:
        with pytest.raises(DataError, match="after 1 retries on .*in-1: ZeroDivisionError"):
            run_stage(stage, cluster, what="Shouting", unit="files", max_retries=1)
        deadly = make(tmp_path, dies_on_poison, ["c", "poison"], log=tmp_path / "log")
        with pytest.raises(DataError, match="after 0 retries on .*in-1: WorkerCrashedError"):
            run_stage(deadly, cluster, what="Shouting", unit="files", max_retries=0)
        (tmp_path / "in-1").write_text("cured")
        assert len(run_stage(deadly, cluster, what="Shouting", unit="files")) == 2


def test_cores():
    assert 1 <= tasks.available_cores() <= (os.cpu_count() or 1)
    assert ProcessPool().num_workers == tasks.available_cores()
