"""Distributed initialization: gathers the roster of processes, then calls `jax.distributed.initialize`."""

import logging
import os
import threading

from jaxcoder.errors import ConfigError, LostProcessError
from jaxcoder.formatting import plural
from jaxcoder.runtime.processes import Processes, TpuPod, find_processes
from jaxcoder.runtime.roster import gather_roster, report_to_roster

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 900
"""For the other processes: hosts of a pod fetch images and start minutes apart."""

CONNECT_SECONDS = 300
"""For JAX's own connection, once the roster is complete."""

HEARTBEAT_SECONDS = 600
"""JAX ends the run if a process sends no heartbeat for so long; compiling has blocked heartbeats for 327 seconds."""


def initialize_distributed(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> int:
    """Connects to the other processes of the run, if any, and returns the index of this one (0 for a single process).

    The processes are those of `find_processes`. Call it after `initialize` and before JAX initializes its devices.
    LostProcessError names the processes that are missing after `timeout` seconds; ConfigError for invalid flags or
    variables.
    """
    found = find_processes(os.environ, coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    if isinstance(found, TpuPod):
        found = _tpu_pod_processes(timeout)
    if found is None:
        return 0
    import jax

    if found.index == 0:
        others = plural(found.count - 1, "other process", "other processes")
        logger.info(f"Waiting at {found.coordinator} for {others} (from {found.source}).")
        hosts = gather_roster(found, timeout)
        logger.info(f"All {found.count} processes are connected: {_counted(hosts)}.")
    else:
        report_to_roster(found, timeout)
    _bypass_proxy(found.coordinator)
    failed = f"process {found.index} of {found.count} could not connect to the others at {found.coordinator}"
    # If JAX cannot connect, its C++ code aborts the process: exit with a message before that.
    deadline = threading.Timer(CONNECT_SECONDS, _exit_unconnected, (failed,))
    deadline.daemon = True
    deadline.start()
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            cluster_detection_method="deactivate",
            initialization_timeout=CONNECT_SECONDS + 10,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise LostProcessError(f"{failed}: {str(error).splitlines()[0]}") from error
    finally:
        deadline.cancel()
    return found.index


def _bypass_proxy(coordinator: str) -> None:
    """Excludes the coordinator from the proxies of the environment, which gRPC would use for it."""
    host = coordinator.rpartition(":")[0].strip("[]")
    for name in ("no_proxy", "no_grpc_proxy"):
        excluded = [entry for entry in os.environ.get(name, "").split(",") if entry]
        if name == "no_proxy" or excluded:  # gRPC reads no_proxy if no_grpc_proxy is not set
            os.environ[name] = ",".join([*excluded, host] if host not in excluded else excluded)


def _exit_unconnected(message: str) -> None:
    text = f"jaxcoder: error: {message} within {CONNECT_SECONDS} seconds: check the firewall between the hosts.\n"
    os.write(2, text.encode())
    os._exit(LostProcessError.exit_code)


def _tpu_pod_processes(timeout: float) -> Processes | None:
    """From the TPU metadata server, through JAX. ConfigError if it does not answer."""
    from jaxcoder.compat import detect_tpu_pod

    try:
        coordinator, count, index = detect_tpu_pod(int(timeout))
    except Exception as error:  # JAX raises errors of many types here
        raise ConfigError(
            f"the TPU metadata of this host are not available ({error}): give --coordinator, --num-processes and "
            "--process-id."
        ) from error
    if count == 1:
        return None
    hosts = tuple(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    return Processes(
        coordinator=coordinator,
        count=count,
        index=index,
        source="the TPU pod",
        hosts=hosts if len(hosts) == count else None,
    )


def _counted(hosts: list[str]) -> str:
    """ "host-a, host-b (2)": a host with several processes is counted."""
    names = [f"{host} ({hosts.count(host)})" if hosts.count(host) > 1 else host for host in dict.fromkeys(hosts)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
