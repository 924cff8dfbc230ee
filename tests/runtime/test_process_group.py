"""Two processes that agree, disagree and exit; and a stuck process, which its watchdog ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from jaxcoder.drill.processes import DrillError, free_port
from jaxcoder.errors import DataError, JaxcoderError, MissingExtraError
from jaxcoder.runtime.process_group import rebuild_error


def two_processes(script: str) -> tuple[list[subprocess.Popen], list[tuple[str, str]]]:
    """Both after their exit, and the (stdout, stderr) of each."""
    command = [sys.executable, Path(__file__).with_name(script), f"127.0.0.1:{free_port()}"]
    processes = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    return processes, [process.communicate(timeout=240) for process in processes]


def test_a_process_that_stopped_and_saved_does_not_end_the_others():
    """SIGTERM: process 0 completes the checkpoint after the other process has exited."""
    processes, outputs = two_processes("slow_save_script.py")
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert outputs[0][0] == "COMPLETE\n", outputs


def test_two_processes_agree_and_one_leaves():
    processes, outputs = two_processes("process_group_script.py")
    host = socket.gethostname()
    both = [
        "hosts 2",
        "agreed 21",
        f"refused DataError process 1 ({host}) has 1 and process 0 ({host}) 0.",
        None,
        "posted [('0', '0'), ('1', '1')]",
    ]
    firsts = set()
    for (out, errors), process in zip(outputs, processes, strict=True):
        lines = out.splitlines()
        assert len(lines) >= 5, out + errors
        assert [line for line, wanted in zip(lines, both) if wanted] == [wanted for wanted in both if wanted]
        firsts.add(lines[3])
        assert process.returncode == 2, out + errors
    assert len(firsts) == 1 and firsts <= {"first 0 None", "first 1 None"}
    assert outputs[1][0].splitlines()[5:] == ["left with 2 the store of process 1 is gone"]
    ended = f"process 1 ({host}) has ended: the store of process 1 is gone."
    assert outputs[0][0].splitlines()[5:] == [f"ended 2 True {ended}", f"left with 2 {ended}"]


STUCK = """
import sys, time
from jaxcoder.config import WatchdogConfig
from jaxcoder.runtime import ProcessGroup, Watchdog

def inner_function_that_hangs():
    time.sleep(float(sys.argv[4]))

limits = WatchdogConfig(step_seconds=float(sys.argv[2]), start_seconds=float(sys.argv[3]))
log = lambda message, step: print("LOGGED", step, message, flush=True)
with ProcessGroup() as group, Watchdog(group, limits, stacks=lambda step: sys.argv[1], on_end=log) as watchdog:
    phases = ("restore", 0, 1.5), ("data", 1, 0.4), ("step", 1, 0.4), ("data", 2, 0.4), ("step", 2, 0)
    for phase, step, seconds in phases:
        watchdog.enter(phase, step)
        time.sleep(seconds)
    print("READY", flush=True)
    inner_function_that_hangs()
print("DONE", flush=True)
"""


def stuck(stacks: Path, *, step: float, start: float, hangs: float) -> subprocess.Popen:
    command = [sys.executable, "-c", STUCK, str(stacks), str(step), str(start), str(hangs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_stuck_process_exits_and_writes_its_stacks(tmp_path):
    """A long start does not count as a step, nor do two short steps as one."""
    stacks = tmp_path / "stacks" / "it.txt"
    process = stuck(stacks, step=1.2, start=60, hangs=90)
    out, errors = process.communicate(timeout=80)
    assert process.returncode == 75, errors
    sentence = "step 2 has taken longer than 1.2 seconds (watchdog.step_seconds): this process is stuck."
    assert f"LOGGED 2 {sentence}" in out and sentence in errors
    assert stacks.read_text().splitlines()[0] == sentence and "inner_function_that_hangs" in stacks.read_text()


def test_the_start_has_a_limit_of_its_own(tmp_path):
    process = stuck(tmp_path / "it.txt", step=60, start=1, hangs=90)
    _, errors = process.communicate(timeout=80)
    assert process.returncode == 75 and "(watchdog.start_seconds)" in errors, errors


def test_a_machine_that_slept_is_not_stuck(tmp_path):
    """SIGSTOP for longer than the limit, then SIGCONT."""
    process = stuck(tmp_path / "it.txt", step=6, start=60, hangs=1.5)
    assert process.stdout.readline() == "READY\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(8)
    os.kill(process.pid, signal.SIGCONT)
    out, errors = process.communicate(timeout=60)
    assert out == "DONE\n" and process.returncode == 0, errors


def test_errors_of_process_0_are_rebuilt_without_their_constructors():
    for error in (MissingExtraError("Reading s3://", "s3"), DataError("no store."), DrillError("elsewhere.")):
        again = rebuild_error(error=str(error), kind=type(error).__name__, exit_code=error.exit_code)
        assert str(again) == str(error) and again.exit_code == error.exit_code and isinstance(again, JaxcoderError)
        assert type(again) in (type(error), JaxcoderError)
