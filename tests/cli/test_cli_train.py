"""`jaxcoder train`: errors of the command line, before anything is compiled or written."""

import json
import subprocess
import sys

import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.cli.main import main
from jaxcoder.config.serialize import to_json
from jaxcoder.runtime import acquire_run_lock


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, command: str) -> str:
    assert main(["train", *command.split()]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("smoke --data a --data.store b", "--data and --data.store set the same field"),
        ("smoke --data a --data.store=b", "--data and --data.store set the same field"),
        ("smoke --data synthetic --steps 3 --num_steps 4", "--steps and --num-steps set the same field"),
        ("smoke --data synthetic --steps 0", "--steps is 0, but must be at least 1"),
        ("smoke --data synthetic --num-steps 1", "warmup_steps 2 is larger than num_steps 1"),
        ("smoke --data synthetic --mesh.fsdp 64", "fsdp 64 x tensor 1 is 64 devices, but there are 8: set one axis"),
        ("smoke --data synthetic --profile-steps ten", "--profile-steps is 'ten': give the first and the last step"),
        ("smoke --data synthetic --init-from ./nowhere", "init_from is `nowhere`, which does not exist"),
        ("smoke", "data.store is not set"),
    ],
)
def test_refusals(capsys, tmp_path, command, expected):
    assert expected in refused(capsys, command)
    assert not list(tmp_path.iterdir())


def test_a_config_of_another_version_names_its_fields(capsys, tmp_path):
    plain = json.loads(to_json(smoke()))
    plain["learning_rate"] = 1e-3
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    (tmp_path / "runs" / "smoke" / "config.json").write_text(json.dumps(plain))
    printed = refused(capsys, "smoke --data synthetic")
    assert "learning_rate is unknown" in printed and "Use the version that wrote it, or correct these fields" in printed


def test_two_runs_in_one_directory(tmp_path):
    """The second process reports the owner of the run lock and exits."""
    command = [sys.executable, "-m", "jaxcoder.cli.main", "train", "smoke", "--data", "synthetic"]
    with acquire_run_lock(str(tmp_path / "runs" / "smoke")):
        second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and "Traceback" not in second.stderr
    assert "runs/smoke` is in use by process" in second.stderr and "give another --output-dir" in second.stderr
