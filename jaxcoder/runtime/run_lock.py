"""The run lock: one run at a time in a directory, by a file lock, or by a lease on remote storage.

Two runs in one directory would delete each other's checkpoints.
"""

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxcoder.errors import JaxcoderError

RENEW_SECONDS = 10.0
EXPIRED_SECONDS = 35.0  # a lease that was not renewed for so long has expired


@contextmanager
def acquire_run_lock(directory: str, *, lock: str = ".lock", timeout: float = 3.0) -> Iterator[None]:
    """Locks `directory` for this process inside the block; the lock ends with the process.

    JaxcoderError if another process still has it after `timeout` seconds. A remote directory (gs://, s3://) is locked
    by a file that is renewed; the one of a killed process expires after 35 seconds. On a file system without locks
    nothing is locked.
    """
    if "://" in directory:
        with _leased(directory, lock):
            yield
        return
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, lock), "a+") as file:
        deadline = time.monotonic() + timeout
        while not _lock(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                raise _in_use(directory, f"process {file.read().strip() or '(unknown)'}")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def _in_use(directory: str, who: str) -> JaxcoderError:
    return JaxcoderError(f"`{directory}` is in use by {who}: wait until it has ended, or give another --output-dir.")


def _lock(file: int) -> bool:
    """Whether this process has the lock of the open file, or the file system has no locks."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


@contextmanager
def _leased(directory: str, name: str) -> Iterator[None]:
    try:
        lease = _Lease(f"{directory.rstrip('/')}/{name}")
        lease.acquire(directory)
    except JaxcoderError:
        raise
    except Exception as error:  # storage backends raise errors of many types
        raise JaxcoderError(
            f"cannot write to `{directory}` ({error}): check the address and your permissions."
        ) from error
    stop = threading.Event()
    renewing = threading.Thread(target=lease.renew, args=(stop,), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stop.set()
        renewing.join()
        lease.release()


class _Lease:
    """A small file with its owner and a counter that the owner increases. Clocks of machines are not compared."""

    def __init__(self, address: str):
        import fsspec

        self._filesystem, self._path = fsspec.core.url_to_fs(address)
        self._owner = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8)}
        self._number = 0

    def _read(self) -> dict | None:
        try:
            self._filesystem.invalidate_cache()
            return json.loads(self._filesystem.cat_file(self._path))
        except (FileNotFoundError, ValueError):
            return None

    def _write(self) -> None:
        self._number += 1
        self._filesystem.pipe_file(self._path, json.dumps(self._owner | {"number": self._number}).encode())

    def acquire(self, directory: str) -> None:
        """Acquires the lease; JaxcoderError if another process renews its lease meanwhile."""
        found, deadline = self._read(), time.monotonic() + EXPIRED_SECONDS
        while found is not None and not _is_dead(found) and time.monotonic() < deadline:
            time.sleep(1.0)
            now = self._read()
            if now is not None and now != found:
                raise _in_use(directory, f"process {now.get('process')} of {now.get('host')}")
            found = now
        self._write()
        time.sleep(0.5)  # of two concurrent processes, the one that wrote last has the lease
        found = self._read()
        if found is None or found.get("token") != self._owner["token"]:
            raise _in_use(directory, f"process {(found or {}).get('process')} of {(found or {}).get('host')}")

    def renew(self, stop: threading.Event) -> None:
        """Renews until `stop` is set. Exits the process at once if another has the lease (after a long SIGSTOP)."""
        while not stop.wait(RENEW_SECONDS):
            try:
                found = self._read()
                if found is not None and found.get("token") != self._owner["token"]:
                    who = f"process {found.get('process')} of {found.get('host')}"
                    os.write(
                        2,
                        f"\njaxcoder: error: {who} has taken over this run's directory; this process exits.\n".encode(),
                    )
                    os._exit(2)
                self._write()
            except Exception:  # storage may answer the next time
                continue

    def release(self) -> None:
        """Removes the file, so that the next process need not wait."""
        try:
            found = self._read()
            if found is not None and found.get("token") == self._owner["token"]:
                self._filesystem.rm_file(self._path)
        except Exception:  # otherwise it expires
            pass


def _is_dead(found: dict) -> bool:
    """Whether the owner was a process of this host that has exited."""
    if found.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(found.get("process", 0)), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, TypeError):
        return False
    return False
