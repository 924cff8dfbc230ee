"""Communication between the processes of a run: small messages, agreement, and which processes have failed.

Messages go through the key-value store of JAX's coordination service, in process 0. Unlike a collective they have a
timeout, can name who is missing, and work while the devices are busy or stuck. A single process uses a local
dictionary.
"""

import contextlib
import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from jaxcoder import errors
from jaxcoder.errors import EXIT_CTRL_C, EXIT_SIGTERM, EXIT_USER_ERROR, JaxcoderError, LostProcessError

_runs = itertools.count()

_GOODBYE_SECONDS = 15.0
"""Process 0 waits so long for the others to have ended: JAX ends them roughly when it goes."""


class ProcessGroup:
    """One per run; every process creates it at the same point. As a context manager it posts an error that leaves the
    block to the other processes, so that they do not wait for this one."""

    def __init__(self, timeout: float = 600.0):
        """timeout: seconds to wait for a post of another process."""
        import jax

        from jaxcoder.compat import coordination_client

        self.index, self.count = jax.process_index(), jax.process_count()
        self.host = socket.gethostname()
        self.hosts: list[str] = [self.host]
        """Names by process; known after `meet`."""
        self._client = coordination_client() if self.count > 1 else None
        self._board: dict[str, str] = {}
        self._prefix = f"jaxcoder/{next(_runs)}"
        self._timeout = timeout

    def name(self, index: int) -> str:
        """ "process 3 (host-d)"."""
        return f"process {index} ({self.hosts[index]})" if len(self.hosts) == self.count else f"process {index}"

    # --- the board ---------------------------------------------------------------------------------------------------

    def post(self, key: str, text: str) -> None:
        """Whoever reads `key` from now on finds `text`."""
        if self._client is None:
            self._board[key] = text
        else:
            self._client.key_value_set(f"{self._prefix}/{key}", text, allow_overwrite=True)

    def post_first(self, key: str, text: str) -> None:
        """`post`, unless somebody was quicker."""
        if self._client is None:
            self._board.setdefault(key, text)
            return
        with contextlib.suppress(RuntimeError):  # the key exists already
            self._client.key_value_set(f"{self._prefix}/{key}", text)

    def read(self, key: str) -> str | None:
        """What was posted under `key`, or None."""
        if self._client is None:
            return self._board.get(key)
        try:
            return self._client.key_value_try_get(f"{self._prefix}/{key}")
        except RuntimeError:
            return None

    def posted(self, directory: str) -> dict[str, str]:
        """Everything under `directory`/, by the rest of its name."""
        if self._client is None:
            start = f"{directory}/"
            return {key.removeprefix(start): text for key, text in self._board.items() if key.startswith(start)}
        start = f"{self._prefix}/{directory}/"
        return {key.removeprefix(start): text for key, text in self._client.key_value_dir_get(start)}

    def wait_for(self, key: str, who: int) -> str:
        """What process `who` posts under `key`. LostProcessError if it has ended, or posts nothing for too long."""
        if self._client is None:
            return self._board[key]
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return self._client.blocking_key_value_get(f"{self._prefix}/{key}", 2000)
            except Exception as error:  # of a type without a public name
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise LostProcessError(f"{self.name(0)}, through which all speak, does not answer.") from error
            self.check_failed()
            if time.monotonic() > deadline:
                raise LostProcessError(
                    f"{self.name(who)} did not answer for {self._timeout:.0f} seconds ({key}): see its log."
                )

    def agree(self, topic: str, mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Every process hands in `mine` (plain JSON); process 0 decides on all of it, in order of processes.

        Returns what `decide` returns (plain JSON), or raises the JaxcoderError that it raises, in every process. Each
        topic once.
        """
        if self.count == 1:
            return decide([mine])
        self.post(f"{topic}/{self.index}", json.dumps(mine))
        if self.index == 0:
            try:
                everyone = [json.loads(self.wait_for(f"{topic}/{index}", index)) for index in range(self.count)]
                verdict = {"result": decide(everyone)}
            except JaxcoderError as error:
                verdict = {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
                self.post(f"{topic}/verdict", json.dumps(verdict))
                raise
            self.post(f"{topic}/verdict", json.dumps(verdict))
            return verdict["result"]
        verdict = json.loads(self.wait_for(f"{topic}/verdict", 0))
        if "error" in verdict:
            raise _rebuilt(**verdict)
        return verdict["result"]

    def barrier(self) -> None:
        """Learns the names of all hosts."""
        self.hosts = self.agree("hosts", self.host, list)

    # --- the end -----------------------------------------------------------------------------------------------------

    def failed(self) -> dict[int, dict[str, Any]]:
        """{process: {"message", "exit_code"}} of the others that an error has ended.

        Who has stopped on a signal is none of them: all stop after the same step, and process 0 may still be busy for
        minutes with the checkpoint that the others have done their part of.
        """
        ended = {int(index): json.loads(text) for index, text in self.posted("ended").items()}
        stopped = (EXIT_SIGTERM, EXIT_CTRL_C)
        return {i: end for i, end in sorted(ended.items()) if i != self.index and end["exit_code"] not in stopped}

    def check_failed(self) -> None:
        """LostProcessError, with its sentence, if an error has ended another process."""
        for index, end in self.failed().items():
            raise ended_error(self.name(index), end)

    def say_end(self, message: str, exit_code: int, *, absent: int = 0) -> None:
        """Tells the others that this process ends. Process 0 stays until they, but for `absent` of them, have too."""
        if self.count == 1:
            return
        try:
            self.post(f"ended/{self.index}", json.dumps({"message": message, "exit_code": exit_code}))
            deadline = time.monotonic() + _GOODBYE_SECONDS
            while self.index == 0 and len(self.posted("ended")) < self.count - absent and time.monotonic() < deadline:
                time.sleep(0.1)
        except Exception:  # process 0 is gone: there is nobody to tell
            pass

    def __enter__(self) -> "ProcessGroup":
        self.barrier()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            code = error.exit_code if isinstance(error, JaxcoderError) else 1
            self.say_end(f"{error}" if isinstance(error, JaxcoderError) else f"{kind.__name__}: {error}", code)


def _rebuilt(error: str, kind: str, exit_code: int) -> JaxcoderError:
    """An error of process 0 as it was there: by its class's name, past its constructor, which may want other things."""
    found = vars(errors).get(kind, JaxcoderError)
    rebuilt = found.__new__(found, error)
    rebuilt.exit_code = exit_code
    return rebuilt


def ended_error(name: str, end: dict[str, Any]) -> JaxcoderError:
    """What a process says that ends because another one has; a user's error stays one, so that nobody repeats it."""
    said = str(end["message"]).rstrip(".")
    error = LostProcessError(f"{name} has ended: {said}.")
    if end["exit_code"] == EXIT_USER_ERROR:
        error.exit_code = EXIT_USER_ERROR
    return error
