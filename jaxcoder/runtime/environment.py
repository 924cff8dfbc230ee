"""How a process begins: the environment, JAX's global options, the compilation cache, and the command that it was."""

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


def initialize(
    *,
    compilation_cache_dir: str | None = None,
    num_cpu_devices: int | None = None,
    deterministic: bool = False,
    share_accelerator: bool = False,
    leave_accelerators: bool = False,
    debug: bool = False,
) -> None:
    """Sets JAX's process-wide options; call it before the first array is made. Calling it again is harmless.

    compilation_cache_dir: where compiled programs are kept between processes. None: JAX_COMPILATION_CACHE_DIR, else a
        directory below ~/.cache. JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    num_cpu_devices: virtual devices of the CPU backend, to try meshes without accelerators (None: leave as it is).
    deterministic: only GPU kernels that give the same bits every time; slower. CPUs and TPUs always do.
    share_accelerator: allocate GPU memory on demand, so that another library can use the GPU too.
    leave_accelerators: run on CPUs, whatever else is there, as a command does that describes absent chips.
    debug: leaves the libraries' own logs on. Otherwise what they log is silenced: an error is raised as well, and a
        logged traceback next to the error message only confuses.
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

    if leave_accelerators:
        jax.config.update("jax_platforms", "cpu")
    if compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", compilation_cache_dir)
    elif jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        directory = default_cache_dir()
        if directory is not None:
            jax.config.update("jax_compilation_cache_dir", directory)
            jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    if num_cpu_devices is not None and jax.config.jax_num_cpu_devices != num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)


CACHE_BYTES = 4 << 30
"""Most that the default compilation cache grows to; what was not used for longest goes first."""


def default_cache_dir() -> str | None:
    """The user's own cache of compiled programs, made if need be; None where it cannot be made or written.

    One for each kind of processor, since a home may be shared and a CPU's programs use its instructions. An entry that
    a killed process left incomplete is removed: JAX writes the access time next to complete entries only, and would
    neither read nor replace this one.
    """
    directory = user_cache("xla", _processor_key())
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for entry in directory.glob("*-cache"):
            in_use = time.time() - entry.stat().st_mtime < 60
            if not in_use and not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink(missing_ok=True)
    except OSError:
        return None
    return str(directory) if os.access(directory, os.W_OK) else None


def share_cache(directory: str) -> None:
    """Keeps compiled programs in `directory` from now on, which all hosts of a run see, unless the user has chosen.

    A pod's machines come and go with their own disks; without this each start of the run compiles again.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or not jax.config.jax_enable_compilation_cache:
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_compilation_cache_max_size", -1)  # counting takes a lock, which remote storage lacks
    compilation_cache.reset_cache()


def user_cache(*parts: str) -> Path:
    """jaxcoder's directory below the user's cache directory; it need not exist."""
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
    """When this process was started, in Unix seconds: imports and all."""
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
    """How this program (or `program`) was called, quoted for a shell; its bare name where that finds it."""
    program = sys.argv[0] if program is None else program
    name = os.path.basename(program)
    if name.endswith(".py"):  # python -m jaxcoder.cli.main
        return shlex.join([sys.executable, "-m", "jaxcoder.cli.main"])
    on_path = shutil.which(name)
    if on_path and os.path.exists(program) and os.path.samefile(on_path, program):
        program = name
    return shlex.quote(program)


def resume_command(argv: Sequence[str] | None = None) -> str:
    """The command line of this process (or `argv`, program first), quoted for a shell, to be typed again."""
    program, *arguments = sys.argv if argv is None else argv
    return " ".join([command_name(program), *map(shlex.quote, arguments)])
