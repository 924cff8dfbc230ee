"""The processes and files of a drill. The drill observes the trainer only by exit codes, files and logs.

`Start` is one start of all processes of a run, connected over loopback, with one CPU device each. `RunFiles` reads and
damages their files.
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxcoder import runtime
from jaxcoder.checkpoint.manifest import COMMIT_MARKER, MANIFEST
from jaxcoder.config import MeshConfig
from jaxcoder.errors import JaxcoderError
from jaxcoder.record.metrics import last_metrics, read_metrics

POLL_SECONDS = 0.003
"""A step takes some ten milliseconds, a save a few hundred."""


class DrillError(JaxcoderError):
    """The run violated a requirement of the drill, which the message names."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Starts the processes of the runs of the drill in `directory`. program: a broken trainer in tests."""

    directory: Path
    port: int
    program: Sequence[str] = (sys.executable, "-m", "jaxcoder")

    def start(self, run: "RunFiles", mesh: MeshConfig) -> "Start":
        """One process for each device of the mesh."""
        command = [*self.program, "drill", "--process-of", str(self.directory), "--output-dir", str(run.path)]
        variables = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.directory / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAXCODER_COORDINATOR": f"127.0.0.1:{self.port}",
            "JAXCODER_NUM_PROCESSES": str(mesh.num_devices),
        }
        sizes = ",".join(map(str, mesh.sizes.values()))
        return Start([*command, "--mesh", sizes], variables, mesh.num_devices, run.new_logs())


def free_port() -> int:
    """A free port below the range of outgoing connections. All starts of a run use it, as on a pod."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise DrillError("no port between 20,000 and 30,000 of this machine is free.")


_starts: list["Start"] = []


def kill_all() -> None:
    """Kills the processes of all starts."""
    while _starts:
        _starts.pop().kill()


class Start:
    """All processes of one start, killed at the end of the context."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], count: int, logs: Path):
        self.started = time.monotonic()
        self.logs = [logs / f"process-{index}.log" for index in range(count)]
        self.processes: list[subprocess.Popen] = []
        with runtime.stop_signals_deferred():  # Ctrl-C inside Popen would lose a process
            _starts.append(self)
            for index, log in enumerate(self.logs):
                environment = runtime.environment_with({**variables, "JAXCODER_PROCESS_ID": str(index)})
                with open(log, "wb") as file:
                    process = subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                        start_new_session=True,
                    )
                self.processes.append(process)

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def signal(self, number: int, indices: Sequence[int] | None = None) -> None:
        """Sends a signal to the processes with these indices (default: all) that have not exited."""
        for index in range(len(self.processes)) if indices is None else indices:
            if self.processes[index].poll() is None:
                self.processes[index].send_signal(number)

    def codes(self) -> list[int | None]:
        """Exit codes by process: minus the signal that killed it, None while it runs."""
        return [process.poll() for process in self.processes]

    def running(self) -> list[int]:
        return [index for index, code in enumerate(self.codes()) if code is None]

    def all_running(self) -> bool:
        return set(self.codes()) == {None}

    def wait(self, seconds: float, indices: Sequence[int] | None = None) -> bool:
        """Whether these processes (default: all) exit within so many seconds."""
        wanted = set(range(len(self.processes)) if indices is None else indices)
        return wait_until(lambda: not wanted & set(self.running()), seconds, period=0.02)

    def log_text(self, index: int) -> str:
        """The stdout and stderr of a process."""
        return self.logs[index].read_text(errors="replace")

    def missing_in_logs(self, pattern: str, indices: Sequence[int]) -> list[str]:
        """A problem, unless the log of one of these processes matches the pattern."""
        if any(re.search(pattern, self.log_text(index)) for index in indices):
            return []
        return [f"no log contains {pattern!r}: {self.log_ends()}"]

    def log_ends(self) -> str:
        """The end of every process's log, for an error message."""
        ends = [" / ".join(self.log_text(index).strip().splitlines()[-3:]) for index in range(len(self.logs))]
        return "; ".join(f"process {index}: {end}" for index, end in enumerate(ends))


def wait_until(condition: Callable[[], bool], seconds: float, *, period: float = POLL_SECONDS) -> bool:
    """Whether `condition` becomes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(period)
    return True


class RunFiles:
    """The files of a run. Remembers what the drill has damaged."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self._logs = path.with_name(f"{path.name}-logs")
        self._damaged: dict[int, int] = {}

    def new_logs(self) -> Path:
        """A directory for the logs of another start."""
        number = len(list(self._logs.iterdir())) if self._logs.is_dir() else 0
        logs = self._logs / f"start-{number:03}"
        logs.mkdir(parents=True)
        return logs

    def all_logs(self) -> str:
        """The logs of all processes of all starts."""
        return "\n".join(log.read_text(errors="replace") for log in sorted(self._logs.glob("*/*.log")))

    # --- metrics -----------------------------------------------------------------------------------------------------

    def last_step(self) -> int:
        """The newest step in metrics.jsonl, 0 without one."""
        records = last_metrics(self.metrics, 4) if self.metrics.exists() else []
        return max((record["step"] for record in records), default=0)

    def metrics_file(self) -> tuple[int, int]:
        """(inode, newest step): the inode changes when lines are removed."""
        return (self.metrics.stat().st_ino if self.metrics.exists() else 0), self.last_step()

    def steps(self) -> list[dict]:
        """The records of optimizer steps."""
        return [record for record in read_metrics(self.metrics) if "loss" in record] if self.metrics.exists() else []

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def complete_steps(self) -> list[int]:
        """Steps with a complete save that the drill has not damaged since, ascending."""
        return [step for step in self._directories() if self._version(step) not in (None, self._damaged.get(step))]

    def _directories(self) -> list[int]:
        """Steps with a directory, ascending."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def is_saving(self) -> bool:
        """Whether the save of the newest step is not complete. (Deleting an old one removes its manifest first.)"""
        steps = self._directories()
        return bool(steps) and self._version(steps[-1]) is None

    def _version(self, step: int) -> int | None:
        """The time at which the manifest was written; None without one."""
        try:
            return (self.checkpoints / str(step) / MANIFEST).stat().st_mtime_ns
        except OSError:
            return None

    def damage_newest(self, how: str, draw: random.Random) -> str:
        """Damages the newest complete checkpoint and returns a description.

        how: "lose" (remove it), "truncate" or "flip" (one file), "manifest" or "commit" (remove that file).
        """
        step = self.complete_steps()[-1]
        path = self.checkpoints / str(step)
        self._damaged[step] = self._version(step) or 0
        if how == "lose":
            shutil.rmtree(path)
            return f"checkpoint {step} removed"
        if how in ("manifest", "commit"):
            name = MANIFEST if how == "manifest" else COMMIT_MARKER
            (path / name).unlink()
            return f"{name} of {step} removed"
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size > 1)
        file = draw.choice(files)
        content = bytearray(file.read_bytes())
        offset = draw.randrange(1, len(content))
        if how == "truncate":
            del content[offset:]
        else:
            content[offset] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        self._damaged[step] = self._version(step) or 0  # the file may be the manifest, which is newer now
        name = re.sub(r"\b([0-9a-f]{6})[0-9a-f]{26}\b", r"\1...", str(file.relative_to(path)))
        return f"{name} of {step} {'truncated' if how == 'truncate' else 'one bit flipped'} at {offset}"

    def largest_file(self) -> int:
        """Bytes of the largest file of the newest complete checkpoint."""
        path = self.checkpoints / str(self.complete_steps()[-1])
        return max(file.stat().st_size for file in path.rglob("*") if file.is_file())


def continued_after(log: str) -> int:
    """The step after which a run continued, from the log of process 0; 0 for a new run."""
    found = re.search(r"Continuing after step ([\d,]+)\.", log)
    return int(found[1].replace(",", "")) if found else 0
