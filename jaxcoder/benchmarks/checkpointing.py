"""`jaxcoder bench checkpoint`: what a save costs a run, in time and in memory, and what a restart takes.

Saving is measured in a process of its own that holds the state of a run and nothing else, so that the memory it grows
by is the save's; the floor is a plain write of as many bytes to the same disk, with fsync. On CPUs the arrays' own
memory is the host's: the copy that a save takes before the next step may change them counts as host memory here, while
accelerators hold it themselves or copy it out. Then `jaxcoder train` is started on a checkpoint, with and without the
compilation cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxcoder.benchmarks.measure import Report, Reports, environment
from jaxcoder.config.load import load_run
from jaxcoder.errors import ConfigError, JaxcoderError

_PATIENCE = 900.0
_BLOCK = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="tiny_starcoder_py", help="whose state (default %(default)s, 164M)")
    parser.add_argument("--runs", type=int, default=3, help="saves, of which the median counts (default %(default)s)")
    parser.add_argument("--directory", type=Path, help="where to save (default: the system's place for such files)")
    parser.add_argument("--no-restart", action="store_true", help="leave the restarts out")
    parser.add_argument("--seq-len", type=int, default=256, help="of the run that is restarted (default %(default)s)")


def run(args: argparse.Namespace) -> Reports:
    if args.runs < 1:
        raise ConfigError("--runs takes a number of at least 1.")
    load_run(args.config)  # a wrong name is found before the first process starts
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="jaxcoder-bench-") as temporary:
        reports = [_saving(args, Path(temporary))]
        if not args.no_restart:
            reports.append(_restarting(args, Path(temporary)))
    return Reports(reports)


# --- saving ----------------------------------------------------------------------------------------------------------


def _saving(args: argparse.Namespace, directory: Path) -> Report:
    command = [sys.executable, "-m", "jaxcoder.benchmarks.checkpointing", args.config, str(directory / "saves")]
    done = subprocess.run([*command, str(args.runs)], capture_output=True, text=True)
    if done.returncode:
        raise JaxcoderError(f"the state of {args.config} was not saved: {done.stderr.strip().splitlines()[-1]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    size = measured["bytes"]
    floor = statistics.median(plain_write(directory / "plain", size) for _ in range(args.runs))
    saves = {key: statistics.median(save[key] for save in measured["saves"]) for key in measured["saves"][0]}
    rows = [
        {"way": "plain write and fsync: the floor", "whole": floor, "speed": size / floor / 1e6},
        {
            "way": "**save**",
            "blocked": saves["blocked"],
            "whole": saves["whole"],
            "speed": size / saves["whole"] / 1e6,
            "floor": saves["whole"] / floor,
            "peak": measured["peak"] / size,
        },
    ]
    return Report(
        title=f"Saving the state of {args.config}: {size / 1e9:.2f} GB",
        settings={"runs": args.runs, "load": round(os.getloadavg()[0], 1)},
        columns={
            "way": "way",
            "blocked": "s a step is blocked",
            "whole": "s until whole",
            "speed": "MB/s",
            "floor": "x the floor",
            "peak": "memory of the process at its peak, x the state",
        },
        rows=rows,
        targets={"less than three times the state in memory, itself included": measured["peak"] < 3 * size},
        environment=environment(["jax", "orbax-checkpoint", "tensorstore"]),
    )


def plain_write(path: Path, size: int) -> float:
    """Seconds to write so many bytes and have them on the disk; the file is removed again."""
    block = os.urandom(_BLOCK)
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, _BLOCK):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def measure_saves(name: str, directory: str, runs: int) -> dict:
    """Bytes of a run's state; of each save the seconds a step is blocked and until it is whole; and most resident bytes
    of the process while it saves, which holds the state, what making it has left, and the libraries."""
    from jaxcoder import runtime

    runtime.initialize()
    import jax

    from jaxcoder.checkpoint.checkpointer import Checkpointer
    from jaxcoder.config import CheckpointConfig
    from jaxcoder.sharding.mesh import single_device_mesh
    from jaxcoder.train.state import flatten_state, initial_state

    config = load_run(name)
    with jax.set_mesh(single_device_mesh()):
        state = jax.block_until_ready(jax.jit(lambda: initial_state(config))())
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        saves = []
        keep_one = CheckpointConfig(keep_last=1)
        with highest_memory() as memory, Checkpointer(directory, keep_one, run=config) as checkpointer:
            for step in range(1, runs + 2):  # the first one warms up
                began = time.perf_counter()
                checkpointer.save(step, flatten_state(state), {"samples": 0}, force=True)
                blocked = time.perf_counter() - began
                checkpointer.wait()
                saves.append({"blocked": blocked, "whole": time.perf_counter() - began})
    return {"bytes": size, "saves": saves[1:], "peak": memory.peak}


class _Memory:
    peak = 0


@contextmanager
def highest_memory() -> Iterator[_Memory]:
    """`peak`: most bytes of resident memory that this process has in the block, sampled every 2 ms."""
    memory, is_over = _Memory(), threading.Event()

    def sample() -> None:
        while not is_over.wait(0.002):
            memory.peak = max(memory.peak, _resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        is_over.set()
        thread.join()


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- starting again --------------------------------------------------------------------------------------------------


def _restarting(args: argparse.Namespace, directory: Path) -> Report:
    output, cache = directory / "run", str(directory / "cache")
    with_cache = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    new = _until_a_step(args, output, with_cache, after=0, until_saved=True)
    ways = {"without the cache": {"JAX_ENABLE_COMPILATION_CACHE": "false"}, "with the cache of the run": with_cache}
    rows = [{"way": "a new run, cache empty", "seconds": new}]
    for way, variables in ways.items():
        rows.append({"way": f"on its checkpoint, {way}", "seconds": _until_a_step(args, output, variables, after=1)})
    return Report(
        title=f"`jaxcoder train {args.config}` from its start until the metrics of its first step are there",
        settings={"batch": f"1 x {args.seq_len}", "load": round(os.getloadavg()[0], 1)},
        columns={"way": "way", "seconds": "seconds"},
        rows=rows,
        targets={},
        environment=environment(["jax", "flax", "orbax-checkpoint"]),
    )


def _until_a_step(
    args: argparse.Namespace, output: Path, variables: dict[str, str], *, after: int, until_saved: bool = False
) -> float:
    """Seconds to the first step beyond `after`; then the run is killed, or first has saved."""
    from jaxcoder import runtime
    from jaxcoder.record.metrics import read_metrics

    settings = ["--data", "synthetic", "--steps", "1000", "--global-batch-size", "1", "--compute.dtype", "float32"]
    settings += ["--model.max-seq-len", str(args.seq_len), "--output-dir", str(output)]
    settings += ["--checkpoint.save-every-steps", "1" if until_saved else "1000"]
    command = [sys.executable, "-m", "jaxcoder.cli.main", "train", args.config, *settings]
    metrics = output / "metrics.jsonl"

    def has_a_step() -> bool:
        return metrics.exists() and any("loss" in r and r["step"] > after for r in read_metrics(metrics))

    def is_saved() -> bool:
        return any((output / "checkpoints").glob("*/manifest.json"))

    def wait(condition) -> float:
        while not condition():
            if process.poll() is not None or time.perf_counter() - began > _PATIENCE:
                raise JaxcoderError(f"the run did not get to its first step: {log.read_text()[-500:]}")
            time.sleep(0.02)
        return time.perf_counter() - began

    log = output.with_suffix(".log")
    if after:  # steps of the start before this one are written again
        metrics.unlink(missing_ok=True)
    began = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=runtime.environment_with(variables))
        try:
            seconds = wait(has_a_step)
            if until_saved:
                wait(is_saved)
            return seconds
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    print(json.dumps(measure_saves(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
