"""Writing a file so that it is there whole or not at all, and a full disk ends in a sentence."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxcoder.errors import DataError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same directory; on success it takes the place of `path`, on failure it is removed.

    The directory is made if needed. Raises DataError, naming `path`, for any error of the file system.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    with file_system_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def is_left_over(name: str) -> bool:
    """Whether a file is the temporary one of `replacing`: what a process leaves that is killed while it writes."""
    return re.search(r"(^|/)\.[^/]+\.tmp\d+$", name) is not None


@contextlib.contextmanager
def file_system_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError raised while writing `path` into a DataError that names it."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = (
            "free some space, or choose another output directory, and run again" if full else "choose another path"
        )
        raise DataError(f"Cannot write {path} ({reason}): {way_out}.") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8 with Unix line ends, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
