"""The process: environment, JAX's global options, distributed initialization, signals, out-of-memory errors.

Nothing else in the package uses `os.environ`, `jax.config`, `jax.distributed` or signal handlers. Importing this
package does not import JAX.
"""

from jaxcoder.runtime.accelerators import check_accelerator, find_gpu, find_tpu
from jaxcoder.runtime.distributed import initialize_distributed
from jaxcoder.runtime.environment import (
    CACHE_BYTES,
    command_name,
    default_cache_dir,
    environment_with,
    initialize,
    process_started,
    resume_command,
    share_cache,
    user_cache,
)
from jaxcoder.runtime.process_group import ProcessGroup
from jaxcoder.runtime.resources import explain_out_of_memory, is_out_of_memory, out_of_memory_explained
from jaxcoder.runtime.run_lock import acquire_run_lock
from jaxcoder.runtime.signals import (
    CoordinatedStop,
    GracefulStop,
    Terminated,
    on_signal,
    signal_of,
    stop_signals_deferred,
    stop_signals_raise,
)
from jaxcoder.runtime.watchdog import Watchdog

__all__ = [
    "CACHE_BYTES",
    "CoordinatedStop",
    "GracefulStop",
    "ProcessGroup",
    "Terminated",
    "Watchdog",
    "acquire_run_lock",
    "check_accelerator",
    "command_name",
    "default_cache_dir",
    "environment_with",
    "explain_out_of_memory",
    "find_gpu",
    "find_tpu",
    "initialize",
    "initialize_distributed",
    "is_out_of_memory",
    "on_signal",
    "out_of_memory_explained",
    "process_started",
    "resume_command",
    "share_cache",
    "signal_of",
    "stop_signals_deferred",
    "stop_signals_raise",
    "user_cache",
]
