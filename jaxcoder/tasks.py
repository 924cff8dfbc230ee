"""Shard tasks over files: the engine under the corpus, the tokenizer and the token store.

A pipeline is a list of stages, a stage a list of tasks, and a task a function of files: `fn(inputs, output)` reads the
files `inputs` and writes the local file `output`; the small dict that it returns is its summary. All data between tasks
are files, so the engine does one thing: it maps tasks, each at least once, over a pool of processes on this machine
(`ProcessPool`) or over a Ray cluster (`RayCluster`).

Tasks are idempotent. The output is written under a temporary name and renamed, or put into the object store, both of
which are atomic; then the marker is written, which holds the summary. A task whose marker and output are there is
finished: whatever was killed, running the same stage again does the rest. For the bytes to be the same for any number
of workers and after any kill, an output must depend on nothing but the task: no clock, no process id, one thread.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from jaxcoder.errors import DataError, JaxcoderError, MissingExtraError
from jaxcoder.io.addresses import is_local, open_address
from jaxcoder.io.atomic import atomic_path
from jaxcoder.io.os_errors import describe_os_error, is_disk_full
from jaxcoder.protocols import SILENT, Progress

MAX_RETRIES = 3
_MOST_FAILURES = 8  # with this many failed inputs a stage is given up: the inputs are not the cause


@dataclass(frozen=True)
class Task:
    """One shard of work. Paths are local or addresses (gs://, s3://). size: its weight in the progress.

    fn: a picklable function (inputs, output) -> summary of JSON values, which writes the local file `output`.
    marker: file of the summary, written after the output. Names depend on the task only.
    """

    fn: Callable[[tuple[str, ...], Path], dict]
    inputs: tuple[str, ...]
    output: str
    marker: str
    size: float = 1.0


@dataclass(frozen=True)
class Failure:
    """Why a task failed. fatal: an error that the user must fix; it is not retried."""

    reason: str
    details: str = ""
    fatal: bool = False
    worker_died: bool = False


class Mapper(Protocol):
    """Runs tasks and yields (index, summary or failure) as they end."""

    def map(self, tasks: Sequence[Task]) -> Generator[tuple[int, dict | Failure], None, None]:
        """Runs the tasks, or only some of them if workers die (the caller maps the rest again). Closing the generator
        stops it."""

    def close(self) -> None:
        """Stop the workers."""


# A stage --------------------------------------------------------------------------------------------------------------


def run_stage(
    tasks: Sequence[Task],
    mapper: Mapper,
    *,
    what: str,
    unit: str,
    progress: Progress = SILENT,
    summarize: Callable[[list[dict]], str] = lambda summaries: "",
    max_retries: int = MAX_RETRIES,
) -> list[dict]:
    """Runs the tasks that are not finished; returns the summaries of all, in order.

    what, unit, summarize: for the progress.

    A task that fails, or whose worker dies, is retried up to `max_retries` times while the others continue. Raises
    DataError that names the inputs that still failed; immediately for an error that the user must fix.
    """
    progress.start(what, sum(task.size for task in tasks), unit)
    stage = _Stage(tasks, max_retries)
    for index in stage.summaries:
        progress.advance(tasks[index].size)
    groups = [stage.unfinished()]
    while groups and len(stage.poison) < _MOST_FAILURES:
        group = groups.pop(0)
        suspects, rest, retries = stage.run(group, mapper, progress)
        # When a worker dies, all running tasks are lost. Running each of them alone shows which one is the cause.
        groups = [[index] for index in suspects] + [rest] * bool(rest) + groups + [[index] for index in retries]
    if stage.unfinished():
        raise stage.error(what)
    summaries = [stage.summaries[index] for index in range(len(tasks))]
    progress.finish(summarize(summaries))
    return summaries


class _Stage:
    """The state of the tasks so far, by index."""

    def __init__(self, tasks: Sequence[Task], max_retries: int):
        self._tasks, self._max_retries = tasks, max_retries
        self.summaries = _finished(tasks)
        self.poison: dict[int, Failure] = {}  # given up
        self._attempts = [0] * len(tasks)

    def unfinished(self) -> list[int]:
        return [index for index in range(len(self._tasks)) if index not in self.summaries]

    def run(self, group: list[int], mapper: Mapper, progress: Progress) -> tuple[list[int], list[int], list[int]]:
        """Maps the tasks of the group; returns the tasks to run alone, those not reached, and those to retry."""
        failed: dict[int, Failure] = {}
        with contextlib.closing(mapper.map([self._tasks[index] for index in group])) as outcomes:
            for position, outcome in outcomes:
                index = group[position]
                if not isinstance(outcome, Failure):
                    self.summaries[index] = outcome
                    progress.advance(self._tasks[index].size)
                elif outcome.fatal:
                    raise DataError(outcome.reason) from _Details(outcome.details)
                else:
                    failed[index] = outcome
        suspects = [index for index, failure in failed.items() if failure.worker_died]
        for index, failure in failed.items():
            if not failure.worker_died or len(suspects) == 1:
                self._attempts[index] += 1
            if self._attempts[index] > self._max_retries:
                self.poison[index] = failure
        rest = [index for index in group if index not in failed and index not in self.summaries]
        again = [index for index in failed if index not in self.poison]
        return [i for i in again if i in suspects], rest, [i for i in again if i not in suspects]

    def error(self, what: str) -> DataError:
        failures = list(self.poison.items())
        named = "; ".join(f"{_last(self._tasks[index])}: {failure.reason}" for index, failure in failures[:3])
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        error = DataError(
            f"{what} failed after {self._max_retries} retries on {named}{more}. Finished tasks are kept: fix or "
            "remove that input (or give it more memory) and run again."
        )
        error.__cause__ = _Details("\n".join(failure.details for _, failure in failures[:3]))
        return error


def _last(task: Task) -> str:
    """The input that identifies a task: common inputs come first."""
    return (*task.inputs, task.output)[max(0, len(task.inputs) - 1)]


class _Details(Exception):
    """The traceback of a worker, shown by `--debug`."""


def _finished(tasks: Sequence[Task]) -> dict[int, dict]:
    """Summaries of the finished tasks: the marker exists and the output has the size in it."""
    if not tasks:
        return {}
    fs, _ = open_address(tasks[0].marker)
    fs.invalidate_cache()
    paths = [open_address(path)[1] for task in tasks for path in (task.marker, task.output)]
    sizes: dict[str, int] = {}
    for folder in sorted({path.rsplit("/", 1)[0] for path in paths}):
        if fs.exists(folder):
            sizes |= {path: entry["size"] for path, entry in fs.find(folder, maxdepth=1, detail=True).items()}
    found = {index: paths[2 * index] for index in range(len(tasks)) if paths[2 * index] in sizes}
    contents = fs.cat(list(found.values()), on_error="omit") if found else {}
    summaries = {}
    for index, path in found.items():
        summary = _parse(contents.get(path, b""))
        if sizes.get(paths[2 * index + 1]) == summary["bytes"]:
            summaries[index] = summary
    return summaries


def _parse(marker: bytes) -> dict:
    try:
        return json.loads(marker)
    except ValueError:
        return {"bytes": None}  # a power failure may leave an empty file


# One task -------------------------------------------------------------------------------------------------------------


def run_task(task: Task) -> dict:
    """Runs the task unless it is finished; returns its summary, with the size of the output as `bytes`."""
    fs, output = open_address(task.output)
    _, marker = open_address(task.marker)
    if fs.exists(marker) and fs.exists(output):
        summary = _parse(fs.cat_file(marker))
        if summary["bytes"] == fs.size(output):
            return summary
    writing = atomic_path if is_local(fs) else functools.partial(_uploading, fs)
    with writing(output) as temporary:
        summary = task.fn(task.inputs, temporary)
        summary["bytes"] = temporary.stat().st_size
    with writing(marker) as temporary:
        temporary.write_text(json.dumps(summary))
    return summary


@contextlib.contextmanager
def _uploading(fs, path: str) -> Iterator[Path]:
    """Yields a temporary local path; on success the file becomes the object `path`."""
    with tempfile.TemporaryDirectory() as directory:
        temporary = Path(directory, "output")
        yield temporary
        fs.put_file(str(temporary), path)


def _attempt(task: Task) -> dict | Failure:
    """`run_task` in a worker. Failures are returned as text, because not every exception can be pickled."""
    try:
        return run_task(task)
    except JaxcoderError as error:
        return Failure(str(error), traceback.format_exc(), fatal=True)
    except Exception as error:
        details = traceback.format_exc()
        if is_disk_full(error):
            return Failure(describe_os_error(error, task.output, "write"), details, fatal=True)
        return Failure(f"{type(error).__name__}: {error}".rstrip(": "), details)


# Mappers --------------------------------------------------------------------------------------------------------------


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessPool:
    """`num_workers` processes of this machine (default: one per core); with 1, the tasks run in this process.

    Workers are started by a forkserver (never by forking a process with threads), live until `close`, and end when this
    process ends. A script with more than one worker needs `if __name__ == "__main__":`.
    """

    def __init__(self, num_workers: int | None = None):
        self.num_workers = num_workers or available_cores()
        self._pool: ProcessPoolExecutor | None = None
        self._alive: Any = None

    def map(self, tasks: Sequence[Task]) -> Generator[tuple[int, dict | Failure], None, None]:
        if self.num_workers == 1:
            yield from ((index, _attempt(task)) for index, task in enumerate(tasks))
            return
        todo = iter(enumerate(tasks))
        running: dict[Future, int] = {}
        died = Failure("the worker process died (possibly out of memory)", worker_died=True)
        try:
            while True:
                # Submit only as many as there are workers: a queued task would be lost and suspected with a worker.
                for index, task in islice(todo, self.num_workers - len(running)):
                    running[self._submit(task)] = index
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    try:
                        outcome = future.result()
                    except BrokenProcessPool:
                        for lost in wait(running).done:
                            yield running.pop(lost), died if lost.exception() else lost.result()
                        self.close()
                        return
                    yield running.pop(future), outcome
        finally:
            if running:  # the stage was abandoned
                self.close()

    def _submit(self, task: Task) -> Future:
        for _ in range(2):
            pool = self._pool or self._start()
            with contextlib.suppress(BrokenProcessPool):  # an idle worker was killed
                return pool.submit(_attempt, task)
            self.close()
        raise DataError("Worker processes die at start: run with one worker (`--workers 1`) to see the error.")

    def _start(self) -> ProcessPoolExecutor:
        import multiprocessing

        context = multiprocessing.get_context("forkserver")
        watched, self._alive = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(self.num_workers, context, _start_worker, (watched,))
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._alive.close()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _start_worker(watched) -> None:
    """Ends a worker when its parent process dies; otherwise it would wait forever."""
    import signal
    import threading

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            watched.recv()  # nothing is sent; it returns when the parent closes its end or dies
        os._exit(1)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the parent handles Ctrl-C and closes the pool
    threading.Thread(target=watch, daemon=True).start()


class RayCluster:
    """A mapper on a Ray cluster, which schedules the tasks and retries those of lost nodes. Only paths are sent.

    address: of a running cluster (default: RAY_ADDRESS, else a new cluster on this machine). All nodes need the same
    versions of Python and jaxcoder and a common file system or object store. DataError if there is no such cluster.
    """

    def __init__(self, address: str | None = None, *, wave: int = 1024):
        try:
            import ray
        except ImportError:
            raise MissingExtraError("Running tasks on a Ray cluster", "cluster") from None
        if not ray.is_initialized():
            environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
            try:
                ray.init(address, runtime_env=environment, include_dashboard=False, log_to_driver=False)
            except ConnectionError:
                which = "that is running" if address in (None, "auto") else f"at {address}"
                raise DataError(
                    f"There is no Ray cluster {which}: start one with `ray start --head`, correct its address, or run "
                    "without Ray, on all cores of this machine."
                ) from None
        self._ray, self._wave = ray, wave

    def map(self, tasks: Sequence[Task]) -> Generator[tuple[int, dict | Failure], None, None]:
        attempt = self._ray.remote(max_retries=MAX_RETRIES)(_attempt)
        todo: Iterator[tuple[int, Task]] = iter(enumerate(tasks))
        running: dict[Any, int] = {}
        try:
            while True:
                running |= {attempt.remote(task): index for index, task in islice(todo, self._wave - len(running))}
                if not running:
                    return
                for done in self._ray.wait(list(running), num_returns=1)[0]:
                    index = running.pop(done)
                    try:
                        outcome = self._ray.get(done)
                    except self._ray.exceptions.RayError as error:  # it died, MAX_RETRIES times and once more
                        outcome = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
                    yield index, outcome
        finally:
            for left in running:
                self._ray.cancel(left)

    def close(self) -> None:
        self._ray.shutdown()
