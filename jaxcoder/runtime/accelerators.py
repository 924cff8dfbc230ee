"""Detection of accelerators that JAX cannot use."""

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from jaxcoder.errors import install_command

# PCI device ids of TPUs (vendor 0x1ae0, Google, which also makes network cards).
TPU_PCI_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


def check_accelerator(
    *,
    platforms: set[str] | None = None,
    root: Path = Path("/"),
    environment: dict[str, str] | None = None,
) -> str | None:
    """A warning if this machine has a GPU or TPU but JAX has only CPU devices, else None.

    JAX_PLATFORMS, or an empty CUDA_VISIBLE_DEVICES, silences it. `platforms` (of JAX's devices, which initializes JAX),
    `root` and `environment` replace the machine's own in tests.
    """
    environment = dict(os.environ) if environment is None else environment
    if environment.get("JAX_PLATFORMS"):
        return None
    if platforms is None:
        import jax

        platforms = {device.platform for device in jax.devices()}
    if platforms != {"cpu"}:
        return None
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    gpu = None if hidden else find_gpu(root, environment.get("PATH", ""))
    if gpu is not None:
        plugin = next((name for name in ("jax_cuda13_plugin", "jax_cuda12_plugin") if find_spec(name)), None)
        return _unseen("GPU", gpu, "cuda", plugin, "check the driver with `nvidia-smi`")
    tpu = find_tpu(root, environment)
    if tpu is not None:
        plugin = "libtpu" if find_spec("libtpu") else None
        return _unseen("TPU", tpu, "tpu", plugin, "check that no other process uses the TPU")
    return None


def _unseen(kind: str, evidence: str, extra: str, plugin: str | None, advice: str) -> str:
    start = f"This machine has a {kind} ({evidence}), but JAX sees only CPUs"
    silence = "or set JAX_PLATFORMS=cpu to run on CPUs without this warning."
    if plugin is None:
        return f"{start}: run `{install_command(extra)}` to use it, {silence}"
    return (
        f"{start} although {plugin} is installed: {advice}, "
        f"print JAX's error with `JAX_PLATFORMS={extra} python -c 'import jax; jax.devices()'`, {silence}"
    )


def find_gpu(root: Path, search_path: str) -> str | None:
    """The device file, directory or program that shows an NVIDIA GPU, or None."""
    device = next(iter(sorted(root.glob("dev/nvidia[0-9]*"))), None)
    if device is not None:
        return f"/{device.relative_to(root)}"
    if any(root.glob("proc/driver/nvidia/gpus/*")):
        return "/proc/driver/nvidia/gpus"
    nvidia_smi = shutil.which("nvidia-smi", path=search_path)
    if nvidia_smi is None:
        return None
    try:  # a container image may have the program without a GPU
        listed = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "listed by nvidia-smi" if listed.returncode == 0 and "GPU 0" in listed.stdout else None


def find_tpu(root: Path, environment: dict[str, str]) -> str | None:
    """The device or variable that shows a TPU, or None."""
    device = next(iter(sorted(root.glob("dev/accel[0-9]*"))), None)
    if device is not None:
        return f"/{device.relative_to(root)}"
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        chip = vendor.with_name("device")
        if vendor.read_text().strip() == "0x1ae0" and chip.is_file() and chip.read_text().strip() in TPU_PCI_DEVICES:
            return f"PCI device {vendor.parent.name}"
    if any(root.glob("dev/vfio/[0-9]*")) and environment.get("TPU_ACCELERATOR_TYPE"):
        return f"TPU_ACCELERATOR_TYPE={environment['TPU_ACCELERATOR_TYPE']}"
    return None
