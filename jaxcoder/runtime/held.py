"""One run at a time in a directory."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxcoder.errors import JaxcoderError

@contextmanager
def held_alone(directory: str, *, lock: str = ".lock", patience: float = 3.0) -> Iterator[None]:
    """Holds `directory` for this process inside the block; the lock ends with the process, however that ends.

    Remote directories (gs://, s3://) and file systems without locks are not held. Waits `patience` seconds for a
    process that is just ending, then raises JaxcoderError.
    """
    if "://" in directory:
        yield
        return
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, lock), "a+") as file:
        deadline = time.monotonic() + patience
        while not _take(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                raise JaxcoderError(
                    f"`{directory}` is in use by process {file.read().strip() or '(unknown)'}: "
                    "wait until that has ended, or give another --output-dir."
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _take(file: int) -> bool:
    """Whether this process has the lock of the open file, or the file system knows no locks."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
