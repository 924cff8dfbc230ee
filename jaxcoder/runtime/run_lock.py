"""One run at a time in a directory: by a lock where the file system has them, by a lease on remote storage.

Two runs that write to one directory would delete each other's checkpoints, and each would go on for hours.
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

_RENEW_SECONDS = 10.0
_EXPIRED_SECONDS = 35.0  # a lease that has not been renewed for so long belongs to nobody


@contextmanager
def acquire_run_lock(directory: str, *, lock: str = ".lock", timeout: float = 3.0) -> Iterator[None]:
    """Holds `directory` for this process inside the block; the lock ends with the process, however that ends.

    Waits `timeout` seconds for a process that is just ending, then raises JaxcoderError. A remote directory (gs://,
    s3://) is held by a file that is renewed: one that a killed process left is waited out, some 35 seconds. A file
    system without locks is not held.
    """
    if "://" in directory:
        with _leased(directory, lock):
            yield
        return
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, lock), "a+") as file:
        deadline = time.monotonic() + timeout
        while not _take(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                raise _in_use(directory, f"process {file.read().strip() or '(unknown)'}")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def _in_use(directory: str, who: str) -> JaxcoderError:
    return JaxcoderError(f"`{directory}` is in use by {who}: wait until that has ended, or give another --output-dir.")


def _take(file: int) -> bool:
    """Whether this process has the lock of the open file, or the file system knows no locks."""
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
        lease.take(directory)
    except JaxcoderError:
        raise
    except Exception as error:  # every kind of storage has errors of its own
        raise JaxcoderError(f"cannot write to `{directory}` ({error}): check the address and your rights.") from error
    stop = threading.Event()
    renewing = threading.Thread(target=lease.renew, args=(stop,), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stop.set()
        renewing.join()
        lease.give_back()


class _Lease:
    """A small file with who holds it and a number that grows while they live. No clock is compared with another's."""

    def __init__(self, address: str):
        import fsspec

        self._filesystem, self._path = fsspec.core.url_to_fs(address)
        self._mine = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8)}
        self._number = 0

    def _read(self) -> dict | None:
        try:
            self._filesystem.invalidate_cache()
            return json.loads(self._filesystem.cat_file(self._path))
        except (FileNotFoundError, ValueError):
            return None

    def _write(self) -> None:
        self._number += 1
        self._filesystem.pipe_file(self._path, json.dumps(self._mine | {"number": self._number}).encode())

    def take(self, directory: str) -> None:
        """Acquires the lease; JaxcoderError if another process renews its lease meanwhile."""
        found, deadline = self._read(), time.monotonic() + _EXPIRED_SECONDS
        while found is not None and not _is_dead(found) and time.monotonic() < deadline:
            time.sleep(1.0)
            now = self._read()
            if now is not None and now != found:
                raise _in_use(directory, f"process {now.get('process')} of {now.get('host')}")
            found = now
        self._write()
        time.sleep(0.5)  # of two that came at once, the one that wrote last stays
        found = self._read()
        if found is None or found.get("token") != self._mine["token"]:
            raise _in_use(directory, f"process {(found or {}).get('process')} of {(found or {}).get('host')}")

    def renew(self, stop: threading.Event) -> None:
        """Renews until `stop` is set. A process whose lease another has taken (it was stopped too long) ends at once,
        so that it writes nothing more."""
        while not stop.wait(_RENEW_SECONDS):
            try:
                found = self._read()
                if found is not None and found.get("token") != self._mine["token"]:
                    who = f"process {found.get('process')} of {found.get('host')}"
                    os.write(
                        2, f"\njaxcoder: error: {who} has taken over this run's directory; this one ends.\n".encode()
                    )
                    os._exit(2)
                self._write()
            except Exception:  # storage that does not answer: the next time, perhaps
                continue

    def give_back(self) -> None:
        """The next one need not wait."""
        try:
            found = self._read()
            if found is not None and found.get("token") == self._mine["token"]:
                self._filesystem.rm_file(self._path)
        except Exception:  # it expires
            pass


def _is_dead(found: dict) -> bool:
    """Whether the holder was a process of this host that is no more."""
    if found.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(found.get("process", 0)), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, TypeError):
        return False
    return False
