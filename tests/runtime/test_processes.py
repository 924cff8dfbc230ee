"""Processes of a run from flags, variables, SLURM and TPU pods; and two processes that share a run."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxcoder.errors import ConfigError
from jaxcoder.runtime.processes import Processes, TpuPod, find_processes, host_names

STEP = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "gpu[003-006]",
}  # fmt: skip
VARIABLES = {"JAXCODER_COORDINATOR": "a:1", "JAXCODER_NUM_PROCESSES": "2", "JAXCODER_PROCESS_ID": "1"}


def test_order_of_sources():
    assert find_processes({}) is None
    assert find_processes(VARIABLES) == Processes(coordinator="a:1", count=2, index=1, source="the environment")
    by_flags = find_processes(VARIABLES | STEP, coordinator="[::1]:9", num_processes=3, process_id=0)
    assert by_flags == Processes(coordinator="[::1]:9", count=3, index=0, source="the command line")
    nodes = ("gpu003", "gpu004", "gpu005", "gpu006")
    by_slurm = Processes(coordinator="gpu003:61441", count=4, index=2, source="SLURM", hosts=nodes)
    assert find_processes(STEP) == by_slurm
    assert find_processes(STEP | {"SLURM_STEP_NODELIST": "gpu[003-004]"}).hosts is None
    assert find_processes(STEP | VARIABLES).source == "the environment"
    assert find_processes(VARIABLES | {"JAXCODER_NUM_PROCESSES": "1", "JAXCODER_PROCESS_ID": "0"}) is None


def test_a_batch_script_and_a_single_task_are_alone():
    """The script sees SLURM_NTASKS and SLURM_PROCID of the job, but is no task of a step."""
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "a,b"}
    assert find_processes(job) is None
    assert find_processes(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_tpu_pods():
    assert find_processes({"TPU_WORKER_HOSTNAMES": "host-a"}) is None
    for pod in (
        {"TPU_WORKER_HOSTNAMES": "host-a,host-b"},
        {"TPU_WORKER_HOSTNAMES": "host-a", "MEGASCALE_NUM_SLICES": "2"},
        {"JAXCODER_TPU_POD": "1"},
    ):
        assert isinstance(find_processes(pod), TpuPod)


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("login", ("login",)),
        ("a,b[2-3]", ("a", "b2", "b3")),
        ("gpu[008-010,12],login", ("gpu008", "gpu009", "gpu010", "gpu12", "login")),
        ("rack[7,9]-n[01-02]", ("rack7-n01", "rack7-n02", "rack9-n01", "rack9-n02")),
        ("n-1.cluster[2]", ("n-1.cluster2",)),
    ],
)
def test_node_lists(nodes, names):
    assert host_names(nodes) == names


def test_node_lists_without_a_host():
    with pytest.raises(ConfigError, match="SLURM's node list ''"):
        host_names("")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "a:1"}, "--coordinator came without --num-processes and --process-id: give all three"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process-id is 2 of 2 processes: .* 0 to 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator is 'a': give the host .* HOST:PORT"),
        ({"coordinator": "a:99999", "num_processes": 2, "process_id": 0}, "--coordinator is 'a:99999'"),
    ],
)
def test_invalid_flags(flags, message):
    with pytest.raises(ConfigError, match=message):
        find_processes({}, **flags)


def test_invalid_variables():
    with pytest.raises(ConfigError, match="JAXCODER_PROCESS_ID is 'one': give an integer"):
        find_processes(VARIABLES | {"JAXCODER_PROCESS_ID": "one"})
    with pytest.raises(ConfigError, match="JAXCODER_COORDINATOR and JAXCODER_PROCESS_ID came without JAXCODER_NUM"):
        find_processes(VARIABLES | {"JAXCODER_NUM_PROCESSES": ""})


# --- real processes --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def local_command(output: Path, steps: int, *, processes: int = 2, devices: int = 2) -> subprocess.Popen:
    """`jaxcoder launch local`, in a group of its own."""
    command = [
        sys.executable, "-m", "jaxcoder.cli.main", "launch", "local", "--config", "smoke",
        "--processes", str(processes), "--devices", str(devices), "--port", str(free_port()),
        "--data", "synthetic", "--num-steps", str(steps), "--output-dir", str(output),
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    log = open(output.with_suffix(".log"), "a")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def log_of(run: Path) -> str:
    return run.with_suffix(".log").read_text()


@pytest.fixture
def ended():
    """Processes whose groups are killed at the end, whatever happened."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_two_processes_train_like_one(tmp_path, ended):
    """The same losses on the same mesh of four devices; only process 0 reports."""
    for name, processes, devices in (("two", 2, 2), ("one", 1, 4)):
        process = local_command(tmp_path / name, 6, processes=processes, devices=devices)
        ended.append(process)
        assert process.wait(timeout=300) == 0, log_of(tmp_path / name)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert log_of(tmp_path / "two").count("Finished step 6") == log_of(tmp_path / "two").count("Training smoke") == 1


@pytest.mark.slow
def test_sigterm_saves_and_more_processes_go_on(tmp_path, ended):
    """SIGTERM as a scheduler sends it: all stop after the same step, save, and end with 143. Then four processes go on
    from there, and stop like that too."""
    run, steps = tmp_path / "run", 0
    for processes, devices in ((2, 2), (4, 1)):
        process = local_command(run, 100_000, processes=processes, devices=devices)
        ended.append(process)
        deadline = time.monotonic() + 240
        while not ((run / "metrics.jsonl").is_file() and len(losses(run)) > steps + 3):
            assert process.poll() is None and time.monotonic() < deadline, log_of(run)
            time.sleep(0.3)
        (script,) = children(process.pid)
        os.kill(script, signal.SIGTERM)
        assert process.wait(timeout=120) == 143, log_of(run)
        steps = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_missing_process_is_named(tmp_path):
    """Likewise a port that is in use."""
    code = (
        "import sys; from jaxcoder import runtime; from jaxcoder.errors import JaxcoderError\n"
        "where = dict(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))\n"
        "try: runtime.initialize_distributed(**where, timeout=3)\n"
        "except JaxcoderError as error: print('ERROR', error)"
    )
    with socket.socket(socket.AF_INET6) as busy:
        busy.bind(("::", 0))
        busy.listen()
        for address, index, message in (
            (f"127.0.0.1:{free_port()}", 1, "process 1 of 2 waited 3 seconds for process 0 at 127.0.0.1"),
            (f"127.0.0.1:{busy.getsockname()[1]}", 0, "cannot listen on port"),
        ):
            done = subprocess.run(
                [sys.executable, "-c", code, address, str(index)], capture_output=True, text=True, timeout=120
            )
            assert "ERROR" in done.stdout and message in done.stdout, done.stdout + done.stderr
