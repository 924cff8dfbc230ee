"""`jaxcoder bench checkpoint`: time and memory of a save, and time of a restart.

Saves are measured in a process of its own that holds only the state of a run, so that the growth of its memory is the
save's. The lower bound is a plain write of as many bytes to the same disk, with fsync. On CPUs the arrays are host
memory: the copy that a save takes before the next step counts here, while accelerators hold it themselves. Then
`jaxcoder train` is started on a checkpoint, with and without the compilation cache.
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

from jaxcoder.benchmarks.measure import Report, Reports, add_runs_argument, check_at_least, environment
from jaxcoder.config.load import load_run
from jaxcoder.errors import JaxcoderError
from jaxcoder.formatting import format_bytes
from jaxcoder.record.memory import host_memory

TIMEOUT = 900.0
BLOCK_BYTES = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="tiny_starcoder_py", help="whose state (default %(default)s, 164M)")
    add_runs_argument(parser, default=3)
    parser.add_argument("--directory", type=Path, help="where to save (default: the system's temporary directory)")
    parser.add_argument("--no-restart", action="store_true", help="measure saves only")
    parser.add_argument("--seq-len", type=int, default=256, help="of the run that is restarted (default %(default)s)")


def run(args: argparse.Namespace) -> Reports:
    check_at_least(1, runs=args.runs, seq_len=args.seq_len)
    load_run(args.config)  # a wrong name fails before the first subprocess
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="jaxcoder-bench-") as temporary:
        reports = [_saving(args, Path(temporary))]
        if not args.no_restart:
            reports.append(_restarting(args, Path(temporary)))
    return Reports(reports)


# --- saving ----------------------------------------------------------------------------------------------------------


def _saving(args: argparse.Namespace, directory: Path) -> Report:
    command = [sys.executable, "-m", "jaxcoder.benchmarks.checkpoint", args.config, str(directory / "saves")]
    done = subprocess.run([*command, str(args.runs)], capture_output=True, text=True)
    if done.returncode:
        raise JaxcoderError(f"the state of {args.config} was not saved: {done.stderr.strip().splitlines()[-1]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    size = measured["bytes"]
    plain = statistics.median(plain_write(directory / "plain", size) for _ in range(args.runs))
    saves = {key: statistics.median(save[key] for save in measured["saves"]) for key in measured["saves"][0]}
    rows = [
        {"name": "plain write and fsync", "total": plain, "speed": size / plain / 1e6},
        {
            "name": "save",
            "blocked": saves["blocked"],
            "total": saves["total"],
            "speed": size / saves["total"] / 1e6,
            "ratio": saves["total"] / plain,
            "peak": measured["peak"] / size,
        },
    ]
    return Report(
        title=f"Saving the state of {args.config}: {format_bytes(size)}",
        settings={"runs": args.runs, "load": round(os.getloadavg()[0], 1)},
        columns={
            "name": "",
            "blocked": "s a step is blocked",
            "total": "s until committed",
            "speed": "MB/s",
            "ratio": "x plain write",
            "peak": "peak memory of the process, x the state",
        },
        rows=rows,
        targets={"peak memory less than three times the state, which is included": measured["peak"] < 3 * size},
        environment=environment(["jax", "orbax-checkpoint", "tensorstore"]),
    )


def plain_write(path: Path, size: int) -> float:
    """Seconds to write so many bytes and have them on the disk; the file is removed again."""
    block = os.urandom(BLOCK_BYTES)
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, BLOCK_BYTES):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def measure_saves(name: str, directory: str, runs: int) -> dict:
    """Bytes of a run's state; for each save the seconds that a step is blocked and until the commit; and the peak
    resident bytes of the process during the saves, libraries included."""
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
        with peak_memory() as memory, Checkpointer(directory, keep_one, run=config) as checkpointer:
            for step in range(1, runs + 2):  # the first one warms up
                began = time.perf_counter()
                checkpointer.save(step, flatten_state(state), {"samples": 0}, force=True)
                blocked = time.perf_counter() - began
                checkpointer.wait()
                saves.append({"blocked": blocked, "total": time.perf_counter() - began})
    return {"bytes": size, "saves": saves[1:], "peak": memory.bytes}


class _Peak:
    bytes = 0


@contextmanager
def peak_memory() -> Iterator[_Peak]:
    """`bytes`: peak resident memory of this process inside the block, sampled every 2 ms."""
    memory, is_over = _Peak(), threading.Event()

    def sample() -> None:
        while not is_over.wait(0.002):
            memory.bytes = max(memory.bytes, host_memory())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        is_over.set()
        thread.join()


# --- restarting ----------------------------------------------------------------------------------------------------


def _restarting(args: argparse.Namespace, directory: Path) -> Report:
    output = directory / "run"
    settings = ["--compute.dtype", "float32", "--checkpoint.save-every-steps"]
    with_cache = {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache")}
    with_cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def seconds(variables, save_every: int, **options) -> float:
        return seconds_to_first_step(
            args.config, args.seq_len, output, [*settings, str(save_every)], variables, **options
        )

    rows = [
        {"name": "a new run, empty cache", "seconds": seconds(with_cache, 1, until_saved=True)},
        {
            "name": "restart without the cache",
            "seconds": seconds({"JAX_ENABLE_COMPILATION_CACHE": "false"}, 1000, after=1),
        },
        {"name": "restart with the run's cache", "seconds": seconds(with_cache, 1000, after=1)},
    ]
    return Report(
        title=f"`jaxcoder train {args.config}` from process start to the metrics of its first step",
        settings={"batch": f"1 x {args.seq_len}", "load": round(os.getloadavg()[0], 1)},
        columns={"name": "", "seconds": "seconds"},
        rows=rows,
        environment=environment(["jax", "flax", "orbax-checkpoint"]),
    )


def seconds_to_first_step(
    config: str,
    seq_len: int,
    output: Path,
    settings: list[str],
    variables: dict[str, str],
    *,
    after: int = 0,
    until_saved: bool = False,
) -> float:
    """Starts `jaxcoder train` on synthetic data in `output`; seconds to the metrics of the first step beyond `after`.

    The batch has one window, so of several GPUs it uses one.

    The run is killed then, or once a checkpoint is committed. Raises JaxcoderError if it ends or times out first.
    """  # fmt: skip
    from jaxcoder import runtime
    from jaxcoder.record.metrics import read_metrics

    command = [
        sys.executable, "-m", "jaxcoder", "train", config, "--data", "synthetic", "--steps", "1000",
        "--global-batch-size", "1", "--model.max-seq-len", str(seq_len), "--output-dir", str(output), *settings,
    ]  # fmt: skip
    metrics, log = output / "metrics.jsonl", output.with_suffix(".log")
    metrics.unlink(missing_ok=True)  # of the start before: its steps would count

    def has_step() -> bool:
        return metrics.exists() and any("loss" in r and r["step"] > after for r in read_metrics(metrics))

    def is_saved() -> bool:
        return any((output / "checkpoints").glob("*/manifest.json"))

    def wait(condition) -> float:
        while not condition():
            if process.poll() is not None or time.perf_counter() - start > TIMEOUT:
                raise JaxcoderError(f"the run did not reach its first step: {log.read_text()[-500:]}")
            time.sleep(0.02)
        return time.perf_counter() - start

    start = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=runtime.environment_with({"CUDA_VISIBLE_DEVICES": "0"} | variables)
        )
        try:
            seconds = wait(has_step)
            if until_saved:
                wait(is_saved)
            return seconds
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    print(json.dumps(measure_saves(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
