"""Initialization of a process: the environment, JAX's global options, the compilation cache; its command line."""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def initialize(
    *,
    compilation_cache_dir: str | None = None,
    num_cpu_devices: int | None = None,
    deterministic: bool = False,
    share_accelerator: bool = False,
    debug: bool = False,
) -> None:
    """Sets JAX's global options; call it before the first array is created. It is idempotent.

    compilation_cache_dir: of compiled programs. None: JAX_COMPILATION_CACHE_DIR, else a directory below ~/.cache.
        JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
    num_cpu_devices: virtual devices of the CPU backend, for meshes without accelerators (None: unchanged).
    deterministic: only deterministic GPU kernels, which are slower. CPUs and TPUs are always deterministic.
    share_accelerator: allocate GPU memory on demand, so that another library can use the GPU too.
    debug: keep the logs of libraries. By default they are silenced, because their errors are raised too.
    """
    if not debug:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        for name in ("absl", "jax._src.xla_bridge", "orbax"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    if deterministic:
        flag = "--xla_gpu_deterministic_ops=true"
        flags = os.environ.get("XLA_FLAGS", "")
        if flag not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    if share_accelerator:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", compilation_cache_dir)
    elif _jax_option("jax_compilation_cache_dir") is None and _jax_option("jax_enable_compilation_cache"):
        directory = default_cache_dir()
        if directory is not None:
            jax.config.update("jax_compilation_cache_dir", directory)
            jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    if num_cpu_devices is not None and _jax_option("jax_num_cpu_devices") != num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)


def _jax_option(name: str) -> Any:
    """An option of `jax.config`, whose type has no such attributes."""
    import jax

    return getattr(jax.config, name)


CACHE_BYTES = 4 << 30
"""Largest size of the default compilation cache; least recently used entries are evicted."""


def default_cache_dir() -> str | None:
    """The user's compilation cache, which is created; None if it cannot be created or written."""
    # One for each kind of processor: home directories are shared, and CPU programs use the CPU's instruction set.
    directory = user_cache("xla", _processor_key())
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # JAX writes an access time next to complete entries, and neither reads nor replaces an incomplete one, which a
        # killed process leaves.
        for entry in directory.glob("*-cache"):
            in_use = time.time() - entry.stat().st_mtime < 60
            if not in_use and not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink(missing_ok=True)
    except OSError:
        return None
    return str(directory) if os.access(directory, os.W_OK) else None


def share_cache(directory: str) -> None:
    """Uses `directory`, which all hosts of a run share, as compilation cache, unless JAX_COMPILATION_CACHE_DIR is set.

    A pod is restarted on machines with empty disks; without a shared cache every start compiles again.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or not _jax_option("jax_enable_compilation_cache"):
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update(
        "jax_compilation_cache_max_size", -1
    )  # a limited size needs file locks, which remote storage lacks
    compilation_cache.reset_cache()


def user_cache(*parts: str) -> Path:
    """A path in jaxcoder's directory of the user's cache; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root, "jaxcoder", *parts)


def _processor_key() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def process_started() -> float:
    """The start of this process, before its imports, in Unix seconds."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return _imported
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


_imported = time.time()


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with some variables set, for a process that it starts."""
    return dict(os.environ) | dict(variables)


def command_name(program: str | None = None) -> str:
    """The command of this program (or `program`), quoted for a shell; its bare name if it is on PATH."""
    program = sys.argv[0] if program is None else program
    name = os.path.basename(program)
    if name.endswith(".py"):  # python -m jaxcoder
        return shlex.join([sys.executable, "-m", "jaxcoder"])
    on_path = shutil.which(name)
    if on_path and os.path.exists(program) and os.path.samefile(on_path, program):
        program = name
    return shlex.quote(program)


def resume_command(argv: Sequence[str] | None = None) -> str:
    """The command line of this process (or `argv`, program first), quoted for a shell."""
    program, *arguments = sys.argv if argv is None else argv
    return " ".join([command_name(program), *map(shlex.quote, arguments)])
