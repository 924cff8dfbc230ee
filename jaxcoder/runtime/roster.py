"""The roster of a run, gathered before `jax.distributed.initialize`: a process that never arrives is named.

Process 0 listens at the coordinator's address and collects index and host of every process. When all have arrived it
releases them and leaves the port to JAX. One line of text each way: `jaxcoder INDEX COUNT HOST`, and `go` or an error.
"""

import logging
import os
import selectors
import socket
import time

from jaxcoder.errors import ConfigError, JaxcoderError, LostProcessError
from jaxcoder.runtime.processes import Processes

logger = logging.getLogger(__name__)

_FIRST_WORD, _BETWEEN_WORDS = 5.0, 30.0  # seconds
_MOST_NAMED = 8
_LONGEST_LINE = 400


def gather_roster(found: Processes, timeout: float) -> list[str]:
    """In process 0: returns the hosts' names by process once all are there. They may go on when this returns.

    Raises ConfigError if the port is taken or two processes have one index, LostProcessError naming who is missing.
    """
    try:
        listening = socket.create_server(("", int(found.coordinator.rpartition(":")[2])), backlog=1024)
    except OSError as error:
        port = found.coordinator.rpartition(":")[2]
        raise ConfigError(
            f"process 0 cannot listen on port {port} ({os.strerror(error.errno)}): end what uses it (`ss -ltnp` shows "
            "it), or give another coordinator."
        ) from error
    arrivals = _Arrivals(found)
    deadline, next_word = time.monotonic() + timeout, time.monotonic() + _FIRST_WORD
    with listening, selectors.DefaultSelector() as ready:
        listening.setblocking(False)
        ready.register(listening, selectors.EVENT_READ)
        try:
            while arrivals.missing:
                for key, _ in ready.select(timeout=0.5):
                    if key.fileobj is listening:
                        arrivals.accept(listening, ready)
                    else:
                        arrivals.read(key.fileobj, ready)
                now = time.monotonic()
                if now > deadline:
                    raise LostProcessError(
                        f"{arrivals.words()} did not arrive within {timeout:.0f} seconds: see that "
                        f"{'they were' if len(arrivals.missing) > 1 else 'it was'} started with the same coordinator "
                        f"({found.coordinator}) and can reach it."
                    )
                if now > next_word and arrivals.missing:
                    logger.info(f"Waiting for {arrivals.words()}.")
                    next_word = now + _BETWEEN_WORDS
        except JaxcoderError as error:
            arrivals.send_all(str(error))
            raise
        arrivals.send_all("go")
    return arrivals.hosts


class _Arrivals:
    """The processes that have arrived, and their connections, which wait for the answer."""

    def __init__(self, found: Processes):
        self._found = found
        self._names: dict[int, str] = {0: socket.gethostname()}
        self._connections: dict[int, socket.socket] = {}
        self._heard: dict[socket.socket, bytes] = {}

    @property
    def missing(self) -> list[int]:
        return [index for index in range(self._found.count) if index not in self._names]

    @property
    def hosts(self) -> list[str]:
        return [self._names[index] for index in range(self._found.count)]

    def words(self) -> str:
        """ "process 3 of 16 (host-d)"; several, and how many more."""
        names = self._found.hosts or ("",) * self._found.count
        shown = [f"{index}{f' ({names[index]})' if names[index] else ''}" for index in self.missing[:_MOST_NAMED]]
        more = len(self.missing) - len(shown)
        several = "es" if len(self.missing) > 1 else ""
        return f"process{several} {', '.join(shown)}{f' and {more} more' if more else ''} of {self._found.count}"

    def accept(self, listening: socket.socket, ready: selectors.BaseSelector) -> None:
        try:
            connection, _ = listening.accept()
        except OSError:  # it has left again
            return
        connection.setblocking(False)
        self._heard[connection] = b""
        ready.register(connection, selectors.EVENT_READ)

    def read(self, connection: socket.socket, ready: selectors.BaseSelector) -> None:
        """Some bytes of a hello. What is none, and who leaves before the start, does not count."""
        try:
            new = connection.recv(_LONGEST_LINE)
        except OSError:
            new = b""
        heard = self._heard[connection] = self._heard[connection] + new
        if not new or len(heard) > _LONGEST_LINE:
            self._forget(connection, ready)
        elif heard.endswith(b"\n"):
            words = heard.decode(errors="replace").split()
            if len(words) != 4 or words[0] != "jaxcoder" or not (words[1] + words[2]).isdigit():
                self._forget(connection, ready)
                return
            self._welcome(int(words[1]), int(words[2]), words[3], connection)

    def _welcome(self, index: int, count: int, host: str, connection: socket.socket) -> None:
        if count != self._found.count:
            raise ConfigError(
                f"process {index} ({host}) was started for {count} processes and process 0 ({self._names[0]}) of "
                f"{self._found.count}: start all of them with the same number."
            )
        if index in self._names and index < count:
            raise ConfigError(
                f"two processes are number {index}, on {self._names[index]} and {host}: each needs one of its own, "
                f"from 0 to {count - 1}."
            )
        self._names[index], self._connections[index] = host, connection

    def _forget(self, connection: socket.socket, ready: selectors.BaseSelector) -> None:
        ready.unregister(connection)
        connection.close()
        del self._heard[connection]
        for index in [index for index, its in self._connections.items() if its is connection]:
            del self._connections[index], self._names[index]

    def send_all(self, line: str) -> None:
        """To everybody who is connected; each closes first, so that no half-closed connection holds our port."""
        for connection in self._heard:
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
    """In every other process: returns when process 0 has seen all. LostProcessError where it cannot be reached;
    JaxcoderError with what it says."""
    host, _, port = found.coordinator.rpartition(":")
    hello = f"jaxcoder {found.index} {found.count} {socket.gethostname()}\n".encode()
    deadline, reason = time.monotonic() + timeout, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                # Without a listener, a port of the range for outgoing connections can be connected to itself.
                if connection.getsockname() != connection.getpeername():
                    connection.sendall(hello)
                    connection.settimeout(left)
                    answer = connection.makefile().readline().strip()
                    if answer == "go":
                        return
                    if answer:
                        raise JaxcoderError(f"process 0 says: {answer}")
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.5)
    raise LostProcessError(
        f"process {found.index} of {found.count} waited {timeout:.0f} seconds for process 0 at {found.coordinator} "
        f"({reason}): see that it was started and can be reached."
    )
