"""Messages, agreement and failure reports between the processes of a run.

They use the key-value store of JAX's coordination service in process 0. Unlike collectives they have a timeout, name
the missing process, and work while devices are busy or stuck. A single process uses a local dictionary.
"""

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from jaxcoder import errors
from jaxcoder.errors import EXIT_CTRL_C, EXIT_SIGHUP, EXIT_SIGTERM, EXIT_USER_ERROR, JaxcoderError, LostProcessError

_runs = itertools.count()

_END_SECONDS = 15.0
"""Timeout of process 0 for the other processes to end: JAX aborts them when process 0 exits."""


class ProcessGroup:
    """One per run, created by every process at the same point. As a context manager it posts an error that leaves the
    block to the other processes, so that they do not wait for this one."""

    def __init__(self, timeout: float = 600.0):
        """timeout: seconds for a message of another process."""
        import jax

        from jaxcoder.compat import coordination_client

        self.index, self.count = jax.process_index(), jax.process_count()
        self.host = socket.gethostname()
        self.hosts: list[str] = [self.host]
        """Host names by process; complete after `exchange_hosts`."""
        self._client = coordination_client() if self.count > 1 else None
        self._local: dict[str, str] = {}
        self._prefix = f"jaxcoder/{next(_runs)}"
        self._timeout = timeout

    def name(self, index: int) -> str:
        """ "process 3 (host-d)"."""
        return f"process {index} ({self.hosts[index]})" if len(self.hosts) == self.count else f"process {index}"

    # --- messages ----------------------------------------------------------------------------------------------------

    def post(self, key: str, text: str) -> None:
        """Sets `key` to `text`."""
        if self._client is None:
            self._local[key] = text
        else:
            self._client.key_value_set(f"{self._prefix}/{key}", text, allow_overwrite=True)

    def post_first(self, key: str, text: str) -> None:
        """`post`, unless the key exists."""
        if self._client is None:
            self._local.setdefault(key, text)
            return
        with contextlib.suppress(RuntimeError):  # the key exists
            self._client.key_value_set(f"{self._prefix}/{key}", text)

    def read(self, key: str) -> str | None:
        """The text of `key`, or None."""
        if self._client is None:
            return self._local.get(key)
        try:
            return self._client.key_value_try_get(f"{self._prefix}/{key}")
        except RuntimeError:
            return None

    def posted(self, directory: str) -> dict[str, str]:
        """The texts of all keys `directory`/NAME, by NAME."""
        if self._client is None:
            start = f"{directory}/"
            return {key.removeprefix(start): text for key, text in self._local.items() if key.startswith(start)}
        start = f"{self._prefix}/{directory}/"
        return {key.removeprefix(start): text for key, text in self._client.key_value_dir_get(start)}

    def wait_for(self, key: str, sender: int) -> str:
        """The text that process `sender` posts as `key`. LostProcessError if a process has ended, or at the timeout."""
        if self._client is None:
            return self._local[key]
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return self._client.blocking_key_value_get(f"{self._prefix}/{key}", 2000)
            except Exception as error:  # of a type without a public name
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise LostProcessError(f"{self.name(0)}, the coordinator, does not answer.") from error
            self.check_failed()
            if time.monotonic() > deadline:
                raise LostProcessError(
                    f"{self.name(sender)} did not answer for {self._timeout:.0f} seconds ({key}): see its log."
                )

    def agree(self, topic: str, mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Process 0 calls `decide` with the values `mine` of all processes, in order.

        Returns its result, or raises its JaxcoderError, in every process. Values and result are plain JSON. A topic can
        be used once.
        """
        if self.count == 1:
            return decide([mine])
        self.post(f"{topic}/{self.index}", json.dumps(mine))
        if self.index == 0:
            try:
                values = [json.loads(self.wait_for(f"{topic}/{index}", index)) for index in range(self.count)]
                verdict = {"result": decide(values)}
            except JaxcoderError as error:
                verdict = {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
                self.post(f"{topic}/verdict", json.dumps(verdict))
                raise
            self.post(f"{topic}/verdict", json.dumps(verdict))
            return verdict["result"]
        verdict = json.loads(self.wait_for(f"{topic}/verdict", 0))
        if "error" in verdict:
            raise rebuild_error(**verdict)
        return verdict["result"]

    def exchange_hosts(self) -> None:
        """Collects the host names of all processes."""
        self.hosts = self.agree("hosts", self.host, list)

    # --- the end -----------------------------------------------------------------------------------------------------

    def failed(self) -> dict[int, dict[str, Any]]:
        """{process: {"message", "exit_code"}} of the other processes that an error has ended."""
        # A stop by a signal is no failure: all stop after the same step, and process 0 may need minutes more to commit
        # the checkpoint.
        ended = {int(index): json.loads(text) for index, text in self.posted("ended").items()}
        stopped = (EXIT_SIGTERM, EXIT_SIGHUP, EXIT_CTRL_C)
        return {i: end for i, end in sorted(ended.items()) if i != self.index and end["exit_code"] not in stopped}

    def check_failed(self) -> None:
        """LostProcessError, with its message, if an error has ended another process."""
        for index, end in self.failed().items():
            raise process_ended_error(self.name(index), end)

    def post_end(self, message: str, exit_code: int, *, absent: int = 0) -> None:
        """Posts the end of this process. Process 0 waits for the ends of the others, except `absent` of them."""
        if self.count == 1:
            return
        try:
            self.post(f"ended/{self.index}", json.dumps({"message": message, "exit_code": exit_code}))
            deadline = time.monotonic() + _END_SECONDS
            while self.index == 0 and len(self.posted("ended")) < self.count - absent and time.monotonic() < deadline:
                time.sleep(0.1)
        except Exception:  # process 0 has exited
            pass

    def __enter__(self) -> "ProcessGroup":
        self.exchange_hosts()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, JaxcoderError):
            self.post_end(str(error), error.exit_code)
        elif error is not None:
            self.post_end(f"{type(error).__name__}: {error}", 1)


def rebuild_error(error: str, kind: str, exit_code: int) -> JaxcoderError:
    """An error of process 0 from its message and the name of its class."""
    # Without the constructor, whose arguments are not known here.
    found = vars(errors).get(kind, JaxcoderError)
    rebuilt = found.__new__(found, error)
    rebuilt.exit_code = exit_code
    return rebuilt


def process_ended_error(name: str, end: dict[str, Any]) -> JaxcoderError:
    """The error of a process that ends because another has. A user error keeps its exit code: a restart cannot help."""
    error = LostProcessError(f"{name} has ended: {str(end['message']).rstrip('.')}.")
    if end["exit_code"] == EXIT_USER_ERROR:
        error.exit_code = EXIT_USER_ERROR
    return error
