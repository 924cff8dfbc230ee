"""Several processes become one run: they meet, and JAX is told."""

import os
import socket
import time
from collections.abc import Callable

from jaxcoder.errors import ConfigError, JaxcoderError
from jaxcoder.runtime.processes import Processes, TpuPod, find_processes

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

    Who they are is found by `processes.py`. Call it after `initialize` and before JAX sees a device. Waits
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
