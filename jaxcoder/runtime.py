"""The process around the work: environment, JAX's global options, accelerators, signals, memory and disk running out.

Nothing else in the package touches `os.environ`, `jax.config` or signal handlers. JAX is imported only by the functions
that need it, so that the command line may import this module for its error sentences.
"""

import errno
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from jaxcoder.errors import EXIT_CTRL_C, EXIT_SIGTERM, ConfigError, JaxcoderError
from jaxcoder.processes import Processes, TpuPod, find_processes

if TYPE_CHECKING:
    from jaxcoder.config import RunConfig

# --- start -----------------------------------------------------------------------------------------------------------


def initialize(
    *,
    compilation_cache_dir: str | None = None,
    num_cpu_devices: int | None = None,
    deterministic: bool = False,
    share_accelerator: bool = False,
    debug: bool = False,
) -> None:
    """Sets JAX's process-wide options; call it before the first array is made. Calling it again is harmless.

    compilation_cache_dir: where compiled programs are kept between processes. None: JAX_COMPILATION_CACHE_DIR, else a
        directory below ~/.cache. JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    num_cpu_devices: virtual devices of the CPU backend, to try meshes without accelerators (None: leave as it is).
    deterministic: only GPU kernels that give the same bits every time; slower. CPUs and TPUs always do.
    share_accelerator: take a GPU's memory as it is needed, so that another library has room beside JAX.
    debug: leaves the libraries' own logs on. Otherwise what they log is silenced: an error is raised as well, and a
        logged traceback beside our sentence only confuses.
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
    elif jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        directory = default_cache_dir()
        if directory is not None:
            jax.config.update("jax_compilation_cache_dir", directory)
            jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    if num_cpu_devices is not None and jax.config.jax_num_cpu_devices != num_cpu_devices:
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)


HEARTBEAT_SECONDS = 600
"""A process that says nothing for so long is taken for dead. Compiling has kept processes silent for 327 seconds."""


def join(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    patience: int = 300,
    say: Callable[[str], object] = print,
) -> int:
    """Meets the other processes of the run, where there are any, and returns the index of this one (0 if alone).

    Who they are is found by `jaxcoder/processes.py`. Call it after `initialize` and before JAX sees a device. Waits
    `patience` seconds, then raises JaxcoderError; ConfigError for flags or variables that cannot be.
    """
    found = find_processes(
        os.environ, coordinator=coordinator, num_processes=num_processes, process_id=process_id
    )
    if found is None:
        return 0
    import jax

    options = {"initialization_timeout": patience, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if isinstance(found, TpuPod):
        jax.distributed.initialize(**options)
        return jax.process_index()
    if found.index == 0:
        say(f"Waiting at {found.coordinator} for {found.count - 1} other processes (as {found.source} says).")
    _check_meeting_place(found, patience)
    try:
        jax.distributed.initialize(
            found.coordinator, found.count, found.index, cluster_detection_method="deactivate", **options
        )
    except RuntimeError as error:
        raise JaxcoderError(
            f"process {found.index} of {found.count} could not join the others: {str(error).splitlines()[0]}"
        ) from error
    return found.index


def _check_meeting_place(found: Processes, patience: int) -> None:
    """JaxcoderError unless process 0 can listen there and the others reach it: JAX would just end the process."""
    host, _, port = found.coordinator.rpartition(":")
    if found.index == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen on port {port} ({os.strerror(error.errno)}): end what uses it, or give "
                "another coordinator."
            ) from error
        return
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise JaxcoderError(
                    f"process {found.index} of {found.count} waited {patience} seconds for process 0 at "
                    f"{found.coordinator} ({error.strerror or error}): see that it was started and can be reached."
                ) from error
        time.sleep(0.5)


CACHE_BYTES = 4 << 30
"""Most that the default compilation cache grows to; what was not used for longest goes first."""


def default_cache_dir() -> str | None:
    """The user's own cache of compiled programs, made if need be; None where it cannot be made or written.

    One for each kind of processor, since a home may be shared and a CPU's programs use its instructions. An entry that
    a killed process left unfinished is removed: JAX notes the time of use beside an entry once it is whole, and would
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


def user_cache(*parts: str) -> Path:
    """A directory of ours below the user's cache directory; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root, "jaxcoder", *parts)


def _processor_key() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


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


# --- accelerators that JAX cannot see --------------------------------------------------------------------------------

# PCI device ids of TPUs (vendor 0x1ae0, Google, which also makes network cards).
TPU_PCI_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}


def check_accelerator(
    *,
    platforms: set[str] | None = None,
    root: Path = Path("/"),
    environment: dict[str, str] | None = None,
) -> str | None:
    """A sentence when this machine has a GPU or TPU but JAX has only CPU devices, else None.

    Someone who set JAX_PLATFORMS or an empty CUDA_VISIBLE_DEVICES has chosen and is not told. `platforms` (of JAX's
    devices; asking for them starts JAX), `root` and `environment` stand in for the machine's own in tests.
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
        return _unseen("GPU", gpu, "cuda", plugin, "look at the driver with `nvidia-smi`")
    tpu = find_tpu(root, environment)
    if tpu is not None:
        plugin = "libtpu" if find_spec("libtpu") else None
        return _unseen("TPU", tpu, "tpu", plugin, "see that no other process holds the TPU")
    return None


def _unseen(kind: str, evidence: str, extra: str, plugin: str | None, advice: str) -> str:
    start = f"This machine has a {kind} ({evidence}), but JAX sees only CPUs"
    silence = "or set JAX_PLATFORMS=cpu to run on CPUs without this note."
    if plugin is None:
        return f"{start}: run `pip install 'jaxcoder[{extra}]'` to use it, {silence}"
    return (
        f"{start} although {plugin} is installed: {advice}, "
        f"ask JAX for the reason with `JAX_PLATFORMS={extra} python -c 'import jax; jax.devices()'`, {silence}"
    )


def find_gpu(root: Path, search_path: str) -> str | None:
    """What shows that an NVIDIA GPU is present, or None."""
    device = next(iter(sorted(root.glob("dev/nvidia[0-9]*"))), None)
    if device is not None:
        return f"/{device.relative_to(root)}"
    if any(root.glob("proc/driver/nvidia/gpus/*")):
        return "/proc/driver/nvidia/gpus"
    nvidia_smi = shutil.which("nvidia-smi", path=search_path)
    if nvidia_smi is None:
        return None
    try:  # an image may carry the program without a GPU
        listed = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "listed by nvidia-smi" if listed.returncode == 0 and "GPU 0" in listed.stdout else None


def find_tpu(root: Path, environment: dict[str, str]) -> str | None:
    """What shows that a TPU is attached, or None."""
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


# --- stopping --------------------------------------------------------------------------------------------------------


class GracefulStop:
    """SIGTERM or Ctrl-C asks for a stop that the work polls for; a second Ctrl-C stops at once.

        with GracefulStop() as stop:
            for step in ...:
                ...
                if stop.requested is not None:
                    save(); raise Interrupted(..., exit_code=stop.exit_code)

    Only the main thread can take signals: elsewhere `requested` stays None and nothing is installed. The handlers found
    are put back at the end.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, notice: str = "finishing this step and saving; Ctrl-C again stops at once"):
        self.notice = notice
        self.requested: int | None = None
        """Number of the first signal that came, or None."""
        self._previous: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after Ctrl-C, 0 without a request."""
        return {None: 0, signal.SIGTERM: EXIT_SIGTERM, signal.SIGINT: EXIT_CTRL_C}[self.requested]

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # os.write and not print: a handler may interrupt a print that holds the stream's lock.
        try:
            os.write(2, f"\njaxcoder: {name}: {self.notice}\n".encode())
        except OSError:
            pass


class CommonStop:
    """A stop that all processes of a run make after the same step, whichever of them was asked, and when.

    The one that is asked tells the others, through JAX's coordination service, a step that none of them can have begun:
    a process waits for the metrics of a step, which all compute together, before it begins the step after the next.
    """

    LEAD = 3
    _KEY = "jaxcoder/stop_after_step"

    def __init__(self, stop: GracefulStop):
        self._stop = stop
        self._after: int | None = None

    @property
    def exit_code(self) -> int:
        """Of this process's own signal; 143 where another process was asked."""
        return self._stop.exit_code or EXIT_SIGTERM

    def is_now(self, step: int) -> bool:
        """Whether to stop after `step`; asked after every step, in every process."""
        import jax

        if jax.process_count() == 1:
            return self._stop.requested is not None
        from jax._src import distributed  # no public way to the service

        client = distributed.global_state.client
        if self._after is None and self._stop.requested is not None:
            try:
                client.key_value_set(self._KEY, str(step + self.LEAD))
            except RuntimeError:  # another process was asked too
                pass
        if self._after is None:
            try:
                self._after = int(client.key_value_try_get(self._KEY))
            except RuntimeError:  # nobody was
                return False
        return step >= self._after


class Terminated(KeyboardInterrupt):
    """SIGTERM outside a `GracefulStop`; treated like Ctrl-C by everything that cleans up after Ctrl-C."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM inside the block raises `Terminated`, so that files are closed and temporary ones removed.

    Neither it nor Ctrl-C is lost: Python drops an exception that a handler raises inside a callback that cannot fail
    (JAX has one on every garbage collection), and the signal is then sent once more.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            previous_hook(unraisable)
            return
        number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))  # by then the callback is over
        again.daemon = True
        again.start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, previous_hook = signal.signal(signal.SIGTERM, handle), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


# --- memory ----------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host's memory or a device's ran out."""
    if isinstance(error, MemoryError):
        return True
    # By name, so that JAX need not be imported to ask.
    if type(error).__name__ not in ("XlaRuntimeError", "JaxRuntimeError") or is_disk_full(error):
        return False
    return re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE) is not None


def explain_out_of_memory(error: BaseException, config: "RunConfig | None") -> JaxcoderError:
    """One message that names the settings that help, with their present values when `config` is given."""
    asked = re.search(r"([\d.]+ ?[KMGT]i?B|\d{4,} bytes)", str(error))
    what = "the host's memory" if isinstance(error, MemoryError) else "the devices' memory"
    start = f"{what} does not suffice{f' (a piece of {_readable(asked[1])} was asked for)' if asked else ''}"
    if config is None:
        return JaxcoderError(f"{start}. Lower the batch or the length, or use a smaller model or a larger machine.")
    whole = "None, the whole global batch at once" if config.microbatch_size is None else config.microbatch_size
    remat = {"none": '"minimal" or "block" keep less', "block": "the least already"}
    remat |= dict.fromkeys(("minimal", "offload"), '"block" keeps less')
    knobs = [
        f"microbatch_size (now {whole}): a smaller divisor of global_batch_size; the result stays the same",
        f'compute.remat (now "{config.compute.remat}"): {remat[config.compute.remat]}; the result stays the same',
        f"mesh.fsdp (now {config.mesh.fsdp}) and mesh.tensor (now {config.mesh.tensor}): "
        "more devices, so that each holds less; the result stays the same",
        f"global_batch_size (now {config.global_batch_size}): smaller",
        f"model.max_seq_len (now {config.model.max_seq_len}): shorter",
    ]
    return JaxcoderError(start + ". What helps, the cheapest first:" + "".join(f"\n  - {knob}" for knob in knobs))


@contextmanager
def out_of_memory_explained(config: "RunConfig") -> Iterator[None]:
    """Turns running out of memory inside the block into the message of `explain_out_of_memory`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(error, config) from error


def _readable(amount: str) -> str:
    if not amount.endswith(" bytes"):
        return amount
    size = int(amount.removesuffix(" bytes"))
    unit = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**unit:.1f} {['bytes', 'KiB', 'MiB', 'GiB', 'TiB'][unit]}"


# --- one process at a time -------------------------------------------------------------------------------------------


@contextmanager
def held_alone(directory: str, *, lock: str = ".lock", patience: float = 3.0) -> Iterator[None]:
    """Holds `directory` for this process inside the block; the lock ends with the process, however that ends.

    Remote directories (gs://, s3://) and file systems without locks are not held. Waits `patience` seconds for a
    process that is just ending, then raises JaxcoderError.
    """
    if "://" in directory:
        yield
        return
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, lock), "a+") as file:
        deadline = time.monotonic() + patience
        while not _take(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                raise JaxcoderError(
                    f"`{directory}` is in use by process {file.read().strip() or '(unknown)'}: "
                    "wait until that has ended, or give another --output-dir."
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _take(file: int) -> bool:
    """Whether this process has the lock of the open file, or the file system knows no locks."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


# --- disk ------------------------------------------------------------------------------------------------------------


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space: libraries say so in several types, but always in the same words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return re.search("No space left on device|Disk quota exceeded|File too large", str(error)) is not None


def explain_disk_full(error: BaseException) -> JaxcoderError:
    """One sentence that names the file (where the error tells) and says what is kept."""
    name = error.filename if isinstance(error, OSError) and error.filename else None
    if name is None:
        quoted = re.search(r'"((?:/|\w+://)[^"]+)"', str(error))
        name = quoted[1] if quoted else None
    where = f" at {os.fsdecode(name)!r}" if name else ""
    return JaxcoderError(
        f"the disk is full{where}: everything finished before this write is kept; "
        f"free some space and run the same command again: {resume_command()}"
    )
