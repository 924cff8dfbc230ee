"""Several processes become one run: they find each other, wait for the last one, and tell JAX."""

import logging
import os

from jaxcoder.errors import ConfigError, LostProcessError
from jaxcoder.formatting import plural
from jaxcoder.runtime.processes import Processes, TpuPod, find_processes
from jaxcoder.runtime.roster import gather_roster, report_to_roster

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 900
"""So long a process waits for the others: hosts of a pod fetch images and start minutes apart."""

HEARTBEAT_SECONDS = 600
"""A process that says nothing for so long is taken for dead. Compiling has kept processes silent for 327 seconds."""


def join(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> int:
    """Meets the other processes of the run, where there are any, and returns the index of this one (0 if alone).

    Who they are is found by `processes.py`. Call it after `initialize` and before JAX sees a device. Process 0 says
    whom it waits for. After `timeout` seconds LostProcessError names who is missing; ConfigError for flags or variables
    that cannot be.
    """
    found = find_processes(os.environ, coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    if isinstance(found, TpuPod):
        found = _in_tpu_pod(timeout)
    if found is None:
        return 0
    import jax

    if found.index == 0:
        others = plural(found.count - 1, "other process", "other processes")
        logger.info(f"Waiting at {found.coordinator} for {others} (as {found.source} says).")
        hosts = gather_roster(found, timeout)
        logger.info(f"All {found.count} processes are here: {_counted(hosts)}.")
    else:
        report_to_roster(found, timeout)
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            cluster_detection_method="deactivate",
            initialization_timeout=300,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise LostProcessError(
            f"process {found.index} of {found.count} could not join the others: {str(error).splitlines()[0]}"
        ) from error
    return found.index


def _in_tpu_pod(timeout: float) -> Processes | None:
    """Asks the machines' own metadata, through JAX. ConfigError where that does not answer."""
    from jaxcoder.compat import detect_tpu_pod

    try:
        coordinator, count, index = detect_tpu_pod(int(timeout))
    except Exception as error:  # whatever a metadata server does
        raise ConfigError(
            f"this host does not say which one of its TPU pod it is ({error}): give --coordinator, --num-processes and "
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
    """ "host-a, host-b"; one machine's processes are counted."""
    names = [f"{host} ({hosts.count(host)})" if hosts.count(host) > 1 else host for host in dict.fromkeys(hosts)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
