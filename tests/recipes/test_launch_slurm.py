"""The SLURM launch file on a local SLURM cluster of two nodes: a job runs, is stopped, requeued and resumed.

Needs root, munge and slurm-wlm, and takes minutes: SLURM holds a requeued job for two minutes.

    apt install slurm-wlm && pytest -m slow tests/recipes/test_launch_slurm.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "runuser")
SEARCHED = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [program for program in PROGRAMS if shutil.which(program, path=SEARCHED) is None]
HOST = socket.gethostname().split(".")[0]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start SLURM's daemons"),
    pytest.mark.skipif(HOST == "localhost", reason="needs a host name other than localhost, for a second node"),
]

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/ctld.pid
SlurmdPidFile={directory}/d-%n.pid
SlurmctldLogFile={directory}/ctld.log
SlurmdLogFile={directory}/d-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
NodeName={host},localhost NodeHostname={host} NodeAddr=127.0.0.1 Port=[26818-26819] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> dict[str, str]:
    """Environment variables of the cluster's clients."""
    directory = tmp_path_factory.mktemp("slurm")
    directory.joinpath("slurm.conf").write_text(CONFIGURATION.format(host=HOST, directory=directory))
    environment = {
        **os.environ, "PATH": SEARCHED, "SLURM_CONF": f"{directory}/slurm.conf",
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2",
    }  # fmt: skip
    if subprocess.run(["munge", "--no-input"], capture_output=True, env=environment).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True, env=environment)
    (directory / "state").mkdir()
    for daemon in (["slurmctld"], ["slurmd", "-N", HOST], ["slurmd", "-N", "localhost"]):
        subprocess.run(daemon, check=True, env=environment)
        time.sleep(2)
    yield environment
    subprocess.run(["scancel", "--user", "root"], env=environment)
    time.sleep(2)
    for file in directory.glob("*.pid"):
        os.kill(int(file.read_text()), 15)


def output_of(command: list[str], environment: dict[str, str], directory: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(condition, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(1)


def test_the_file_on_two_nodes(slurm, tmp_path):
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "jaxcoder.cli.main", "launch", "slurm", "--config", "smoke", "--nodes", "2",
        "--gpus-per-node", "0", "--time", "0:30:00", "--data", "synthetic", "--num-steps", "2000",
        "--output-dir", str(run),
    ]  # fmt: skip
    job = output_of(command, slurm, tmp_path).split()[-1]
    log = tmp_path / f"jaxcoder-{job}.log"

    def steps() -> list[int]:
        file = run / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
        return [line["step"] for line in lines if "loss" in line]

    def state() -> str:
        query = ["squeue", "--noheader", "--format", "%T", "--states", "all", "--jobs", job]
        return output_of(query, slurm, tmp_path).strip()

    wait_for(lambda: len(steps()) > 3, 240, log)
    output_of(["scancel", "--signal", "TERM", job], slurm, tmp_path)  # as at the time limit
    wait_for(lambda: state() == "PENDING", 120, log)
    saved = len(steps())
    text = log.read_text()
    assert text.count(f"stopped after step {saved}, which is saved") == 2 and "the job is requeued" in text
    wait_for(lambda: len(steps()) > saved + 3, 400, log)
    assert f"Continuing after step {saved}." in log.read_text() and steps() == list(range(1, len(steps()) + 1))
    output_of(["scancel", job], slurm, tmp_path)
    wait_for(lambda: state() in ("", "CANCELLED"), 120, log)
