"""Atomic writes of files and directories: under a temporary name, then renamed."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxcoder.io.addresses import is_local, open_address
from jaxcoder.io.os_errors import access_errors


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the same directory, which is created if needed.

    On success the file replaces `path`; on failure it is removed. Errors are not translated.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """`atomic_path`, with OSErrors as DataErrors that name `path`."""
    with access_errors(path, "write"), atomic_path(path) as temporary:
        yield temporary


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory next to `path`; on success it replaces `path`, on failure it is removed."""
    temporary, replaced = path.with_name(f".{path.name}.writing"), path.with_name(f".{path.name}.replaced")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(path, replaced)
        os.replace(temporary, path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_left_over(name: str) -> bool:
    """Whether a file is a temporary one of `atomic_path`, left by a process killed during a write."""
    return re.search(r"(^|/)\.[^/]+\.tmp\d+$", name) is not None


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_bytes` of `text` as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` atomically to a local path or an object store. DataError, naming `path`, if that fails."""
    path = os.fspath(path)
    if "://" in path:
        fs, inside = open_address(path)
        if not is_local(fs):
            with access_errors(path, "write"):
                fs.pipe_file(inside, content)  # object stores replace objects atomically
            return
        path = inside
    with replacing(path) as temporary:
        temporary.write_bytes(content)
