"""The roster of a run, gathered before `jax.distributed.initialize`, so that a missing process is named.

Process 0 listens at the coordinator's address and collects index and host of every process. When the roster is complete
it answers all of them and frees the port for JAX. One line each way: `jaxcoder INDEX COUNT HOST`; `go` or an error.
"""

import logging
import selectors
import socket
import time

from jaxcoder.errors import ConfigError, JaxcoderError, LostProcessError
from jaxcoder.runtime.processes import Processes

logger = logging.getLogger(__name__)

FIRST_LOG, LOG_INTERVAL = 5.0, 30.0  # seconds until missing processes are logged, and between logs
_MOST_NAMED = 8
_LONGEST_LINE = 400


def gather_roster(found: Processes, timeout: float) -> list[str]:
    """In process 0: waits for all processes and returns their host names.

    ConfigError if the port is in use or two processes have the same index, LostProcessError with the missing processes.
    """
    try:
        listening = socket.create_server(("", int(found.coordinator.rpartition(":")[2])), backlog=1024)
    except OSError as error:
        port = found.coordinator.rpartition(":")[2]
        raise ConfigError(
            f"process 0 cannot listen on port {port} ({error.strerror}): stop the program that uses it "
            "(`ss -ltnp` lists it), or give another coordinator."
        ) from error
    arrivals = _Arrivals(found)
    deadline, next_log = time.monotonic() + timeout, time.monotonic() + FIRST_LOG
    with listening, selectors.DefaultSelector() as ready:
        listening.setblocking(False)
        ready.register(listening, selectors.EVENT_READ)
        try:
            while arrivals.missing:
                for key, _ in ready.select(timeout=0.5):
                    if key.fileobj is listening:
                        arrivals.accept(listening, ready)
                    else:
                        arrivals.read(key.data, ready)
                now = time.monotonic()
                if now > deadline:
                    raise LostProcessError(
                        f"{arrivals.describe_missing()} did not arrive within {timeout:.0f} seconds: check that "
                        f"{'they were' if len(arrivals.missing) > 1 else 'it was'} started with the same coordinator "
                        f"({found.coordinator}) and can reach it."
                    )
                if now > next_log and arrivals.missing:
                    logger.info(f"Waiting for {arrivals.describe_missing()}.")
                    next_log = now + LOG_INTERVAL
        except JaxcoderError as error:
            arrivals.send_all(str(error))
            raise
        arrivals.send_all("go")
    return arrivals.hosts


class _Arrivals:
    """The processes that have connected; their connections stay open until the answer."""

    def __init__(self, found: Processes):
        self._found = found
        self._names: dict[int, str] = {0: socket.gethostname()}
        self._connections: dict[int, socket.socket] = {}
        self._received: dict[socket.socket, bytes] = {}

    @property
    def missing(self) -> list[int]:
        return [index for index in range(self._found.count) if index not in self._names]

    @property
    def hosts(self) -> list[str]:
        return [self._names[index] for index in range(self._found.count)]

    def describe_missing(self) -> str:
        """ "process 3 (host-d) of 16"."""
        names = self._found.hosts or ("",) * self._found.count
        shown = [f"{index}{f' ({names[index]})' if names[index] else ''}" for index in self.missing[:_MOST_NAMED]]
        more = len(self.missing) - len(shown)
        several = "es" if len(self.missing) > 1 else ""
        return f"process{several} {', '.join(shown)}{f' and {more} more' if more else ''} of {self._found.count}"

    def accept(self, listening: socket.socket, ready: selectors.BaseSelector) -> None:
        try:
            connection, _ = listening.accept()
        except OSError:  # it was closed
            return
        connection.setblocking(False)
        self._received[connection] = b""
        ready.register(connection, selectors.EVENT_READ, data=connection)

    def read(self, connection: socket.socket, ready: selectors.BaseSelector) -> None:
        """Reads a part of a line. Other lines, and connections that close before the answer, are dropped."""
        try:
            new = connection.recv(_LONGEST_LINE)
        except OSError:
            new = b""
        received = self._received[connection] = self._received[connection] + new
        if not new or len(received) > _LONGEST_LINE:
            self._forget(connection, ready)
        elif received.endswith(b"\n"):
            words = received.decode(errors="replace").split()
            if len(words) != 4 or words[0] != "jaxcoder" or not (words[1] + words[2]).isdigit():
                self._forget(connection, ready)
                return
            self._add(int(words[1]), int(words[2]), words[3], connection)

    def _add(self, index: int, count: int, host: str, connection: socket.socket) -> None:
        if count != self._found.count:
            raise ConfigError(
                f"process {index} ({host}) was started for {count} processes and process 0 ({self._names[0]}) of "
                f"{self._found.count}: start all of them with the same number."
            )
        if index in self._names and index < count:
            raise ConfigError(
                f"two processes have the index {index}, on {self._names[index]} and {host}: give each its own, 0 "
                f"to {count - 1}."
            )
        self._names[index], self._connections[index] = host, connection

    def _forget(self, connection: socket.socket, ready: selectors.BaseSelector) -> None:
        ready.unregister(connection)
        connection.close()
        del self._received[connection]
        for index in [index for index, its in self._connections.items() if its is connection]:
            del self._connections[index], self._names[index]

    def send_all(self, line: str) -> None:
        """To all connections. The other side closes first, so that no connection in TIME_WAIT blocks the port."""
        for connection in self._received:
            try:
                connection.setblocking(True)
                connection.settimeout(2.0)
                connection.sendall(line.encode() + b"\n")
                while connection.recv(1024):
                    pass
            except OSError:
                pass
            connection.close()


def report_to_roster(found: Processes, timeout: float) -> None:
    """In every other process: waits until the roster is complete.

    LostProcessError if process 0 cannot be reached, JaxcoderError with the error that it sends.
    """
    host, _, port = found.coordinator.rpartition(":")
    line = f"jaxcoder {found.index} {found.count} {socket.gethostname()}\n".encode()
    deadline, reason = time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                # Without a listener, a port of the range for outgoing connections can be connected to itself.
                if connection.getsockname() != connection.getpeername():
                    connection.sendall(line)
                    connection.settimeout(left)
                    answer = connection.makefile().readline().strip()
                    if answer == "go":
                        return
                    if answer:
                        raise JaxcoderError(f"process 0 reports: {answer}")
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.5)
    raise LostProcessError(
        f"process {found.index} of {found.count} waited {timeout:.0f} seconds for process 0 at {found.coordinator} "
        f"({reason}): check that it was started and can be reached."
    )
