"""Undetected accelerators, signals, the run lock, out-of-memory errors, initialization."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxcoder import runtime
from jaxcoder.config import MeshConfig, ModelConfig, RunConfig
from jaxcoder.errors import JaxcoderError
from jaxcoder.runtime import accelerators

RUN = RunConfig(
    name="x",
    model=ModelConfig(num_layers=2, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=32, max_seq_len=64),
    num_steps=10,
    global_batch_size=8,
)


# --- accelerators ----------------------------------------------------------------------------------------------------


def put(root, path, text=""):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def check(root, platforms=("cpu",), **environment):
    return runtime.check_accelerator(platforms=set(platforms), root=root, environment=environment)


def test_no_accelerator_no_warning(tmp_path):
    put(tmp_path, "dev/accel/accel0")  # another vendor's accelerators
    put(tmp_path, "dev/nvidiactl")
    put(tmp_path, "sys/bus/pci/devices/0000:00:03.0/vendor", "0x1ae0\n")
    put(tmp_path, "sys/bus/pci/devices/0000:00:03.0/device", "0x0042\n")  # Google's network card
    assert check(tmp_path) is None


@pytest.mark.parametrize("path", ["dev/nvidia0", "dev/nvidia3", "proc/driver/nvidia/gpus/0000:01:00.0/information"])
def test_gpu_names_the_extra(tmp_path, path, monkeypatch):
    monkeypatch.setattr(accelerators, "find_spec", lambda name: None)
    put(tmp_path, path)
    text = check(tmp_path)
    assert "GPU" in text and "[cuda]" in text


def test_gpu_by_nvidia_smi(tmp_path):
    program = tmp_path / "bin" / "nvidia-smi"
    put(tmp_path, "bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    assert "nvidia-smi" in check(tmp_path, PATH=str(program.parent))
    program.write_text("#!/bin/sh\necho 'no devices'; exit 9\n")
    assert check(tmp_path, PATH=str(program.parent)) is None


def test_installed_plugin_gets_other_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerators, "find_spec", lambda name: name == "jax_cuda12_plugin")
    put(tmp_path, "dev/nvidia0")
    text = check(tmp_path)
    assert "pip install" not in text and "jax_cuda12_plugin is installed" in text and "nvidia-smi" in text


def test_tpu_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerators, "find_spec", lambda name: None)
    put(tmp_path, "dev/accel0")
    assert "[tpu]" in check(tmp_path)


def test_tpu_by_pci_and_by_metadata(tmp_path):
    put(tmp_path / "pci", "sys/bus/pci/devices/0000:00:05.0/vendor", "0x1ae0\n")
    put(tmp_path / "pci", "sys/bus/pci/devices/0000:00:05.0/device", "0x0063\n")
    assert "TPU" in check(tmp_path / "pci")
    put(tmp_path / "vfio", "dev/vfio/0")
    assert check(tmp_path / "vfio") is None
    assert "v5litepod-8" in check(tmp_path / "vfio", TPU_ACCELERATOR_TYPE="v5litepod-8")


def test_a_choice_is_respected(tmp_path):
    put(tmp_path, "dev/nvidia0")
    assert check(tmp_path, JAX_PLATFORMS="cpu") is None
    assert check(tmp_path, CUDA_VISIBLE_DEVICES="") is None
    assert check(tmp_path, platforms=("gpu",)) is None


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_a_request(number, code):
    before = signal.getsignal(number)
    with runtime.GracefulStop() as stop:
        assert stop.requested is None and stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.requested == number and stop.exit_code == code
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat it
        assert stop.requested == number
    assert signal.getsignal(number) is before


def test_second_ctrl_c_stops_at_once(capfd):
    with pytest.raises(KeyboardInterrupt), runtime.GracefulStop():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_install_nothing():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with runtime.GracefulStop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_stop_in_a_real_process():
    code = (
        "import time; from jaxcoder.runtime import GracefulStop\n"
        "with GracefulStop() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while stop.requested is None: time.sleep(0.01)\n"
        "raise SystemExit(stop.exit_code)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 143 and b"SIGTERM" in text


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "Terminated"), (signal.SIGINT, "KeyboardInterrupt")])
def test_a_signal_inside_a_callback_that_cannot_fail_is_not_lost(number, name):
    """Python drops what a garbage-collection callback raises, and JAX has one."""
    code = (
        "import gc, os, time; from jaxcoder import runtime\n"
        "def callback(phase, info):\n"
        f"    gc.callbacks.clear(); os.kill(os.getpid(), {int(number)}); time.sleep(0)\n"
        "try:\n"
        "    with runtime.stop_signals_raise():\n"
        "        gc.callbacks.append(callback); gc.collect(); time.sleep(20)\n"
        "except KeyboardInterrupt as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == (name + "\n", "", 0)


# --- the run lock ----------------------------------------------------------------------------------------------------


def test_a_directory_is_locked_by_one_process(tmp_path):
    code = (
        "import sys, time; from jaxcoder.runtime import acquire_run_lock\n"
        "with acquire_run_lock(sys.argv[1]): print('locked', flush=True); time.sleep(60)"
    )
    run = str(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", code, run], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(JaxcoderError, match=f"`{run}` is in use by process {process.pid} of .*: wait"):
        with runtime.acquire_run_lock(run, timeout=0.2):
            pass
    process.kill()
    process.wait()
    with runtime.acquire_run_lock(run), runtime.acquire_run_lock(run, lock=".another"):
        pass


# --- the command to resume -------------------------------------------------------------------------------------------


def test_resume_command_is_quoted(tmp_path, monkeypatch):
    program = tmp_path / "jaxcoder"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    arguments = ["train", "my run.py:tiny", "--data.store", "a'b"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert (
        runtime.resume_command([str(program), *arguments])
        == f"{program} train 'my run.py:tiny' --data.store 'a'\"'\"'b'"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.resume_command([str(program), "train"]) == "jaxcoder train"
    assert runtime.resume_command([".venv/bin/jaxcoder", "train"]) == ".venv/bin/jaxcoder train"
    assert "-m jaxcoder train" in runtime.resume_command(["/x/jaxcoder/cli/main.py", "train"])


# --- memory and disk -------------------------------------------------------------------------------------------------


class JaxRuntimeError(RuntimeError):
    """Recognized by its name, as JAX's."""


OUT_OF_MEMORY = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 70368744177664 bytes.")
DISK_FULL = ValueError(
    'RESOURCE_EXHAUSTED: Error writing local file "/runs/x/state/_sharding": Failed to write 83 bytes to file 20: '
    "No space left on device [os_error_code='28']"
)


def test_out_of_memory_is_not_a_full_disk():
    assert runtime.is_out_of_memory(MemoryError()) and runtime.is_out_of_memory(OUT_OF_MEMORY)
    assert not runtime.is_out_of_memory(JaxRuntimeError(str(DISK_FULL)))
    assert not runtime.is_out_of_memory(JaxRuntimeError("INVALID_ARGUMENT: shapes"))
    cpu = JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 115259476804 bytes.")
    assert runtime.is_out_of_memory(cpu)
    assert not runtime.is_out_of_memory(ValueError("out of memory"))


def test_an_impossible_allocation():
    import jax.numpy as jnp

    with pytest.raises(JaxcoderError, match=r"64\.0 TiB"), runtime.out_of_memory_explained(RUN):
        jnp.ones((1 << 22, 1 << 22)).block_until_ready()


def test_out_of_memory_names_settings_and_values():
    config = dataclasses.replace(RUN, microbatch_size=4, mesh=MeshConfig(fsdp=2, tensor=3))
    text = str(runtime.explain_out_of_memory(OUT_OF_MEMORY, config))
    for setting in (
        "microbatch_size (now 4)", 'compute.remat (now "minimal")', "global_batch_size (now 8)",
        "model.max_seq_len (now 64)", "mesh (now data 1 x fsdp 2 x tensor 3)", "64.0 TiB",
    ):  # fmt: skip
        assert setting in text
    assert "the whole global batch" in str(runtime.explain_out_of_memory(MemoryError(), RUN))
    assert "batch" in str(runtime.explain_out_of_memory(MemoryError(), None))


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError), runtime.out_of_memory_explained(RUN):
        raise ZeroDivisionError


# --- start -----------------------------------------------------------------------------------------------------------


def test_initialize_sets_jax_options_in_a_fresh_process(tmp_path):
    code = (
        "from jaxcoder import runtime\n"
        "for _ in range(2):\n"
        f"    runtime.initialize(compilation_cache_dir={str(tmp_path)!r}, num_cpu_devices=3, deterministic=True)\n"
        "import jax, os\n"
        "flags = os.environ['XLA_FLAGS']\n"
        "print(jax.device_count(), jax.config.jax_compilation_cache_dir, flags.count('deterministic'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split() == ["3", str(tmp_path), "1"], done.stderr


def test_compilation_cache_of_the_user(tmp_path):
    """In XDG_CACHE_HOME or ~/.cache, of limited size, by kind of processor; incomplete entries are removed."""
    code = (
        "from jaxcoder import runtime\n"
        "runtime.initialize()\n"
        "import jax\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))).block_until_ready()\n"
        "print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "XLA_FLAGS"))}

    def run(**variables: str) -> list[str]:
        environment = kept | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)} | variables
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout.split()

    directory, most = run()
    assert Path(directory).parent == tmp_path / "jaxcoder" / "xla" and int(most) == runtime.CACHE_BYTES
    entry = next(Path(directory).glob("jit__lambda*-cache"))
    complete = entry.read_bytes()
    entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    entry.write_bytes(complete[:100])
    os.utime(entry, (0, 0))
    run()
    assert entry.read_bytes() == complete

    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))[0] == str(tmp_path / "mine")
    assert run(JAX_ENABLE_COMPILATION_CACHE="false")[0] == "None"
    (tmp_path / "file").write_text("no directory")
    assert run(XDG_CACHE_HOME=str(tmp_path / "file"))[0] == "None"


# --- a lease on remote storage ---------------------------------------------------------------------------------------

LOCK = """
import sys, time
from jaxcoder.errors import JaxcoderError
from jaxcoder.runtime import run_lock
run_lock.RENEW_SECONDS, run_lock.EXPIRED_SECONDS = 0.3, 4.0
try:
    with run_lock.acquire_run_lock(sys.argv[1]):
        print("LOCKED", flush=True)
        time.sleep(float(sys.argv[2]))
except JaxcoderError as error:
    print("ERROR", error, flush=True)
"""


def lock(address: str, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", LOCK, address, str(seconds)], stdout=subprocess.PIPE, text=True)


def test_a_remote_directory_is_locked_by_a_lease_that_expires(tmp_path):
    """By file://, which uses the same code as gs:// and s3://."""
    address = f"file://{tmp_path}"
    first = lock(address, 60)
    assert first.stdout.readline() == "LOCKED\n"
    refused = lock(address, 0)
    text = refused.communicate(timeout=60)[0]
    assert text.startswith("ERROR") and f"is in use by process {first.pid} of " in text
    lease = json.loads((tmp_path / ".lock").read_text())
    first.kill()
    first.wait()
    (tmp_path / ".lock").write_text(
        json.dumps(lease | {"host": "another"})
    )  # so that only its expiry shows that it is dead
    began = time.monotonic()
    second = lock(address, 0)
    assert second.communicate(timeout=60)[0] == "LOCKED\n" and time.monotonic() - began > 4
    assert not (tmp_path / ".lock").exists()


def test_a_process_exits_if_another_has_its_lease(tmp_path):
    process = lock(f"file://{tmp_path}", 60)
    assert process.stdout.readline() == "LOCKED\n"
    lease = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(lease | {"token": "another", "host": "host-b"}))
    assert process.wait(timeout=30) == 2
