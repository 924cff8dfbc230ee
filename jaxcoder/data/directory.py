"""A directory of files, local or on an object store, behind one small interface.

Files go through fsspec; arrays go through tensorstore, which is told where by `kvstore`. Writing a file replaces it
whole or not at all (object stores do so by themselves). Names are relative, with forward slashes.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxcoder.errors import DataError
from jaxcoder.tokenizer.atomic import file_system_errors, write_bytes

_BLOCK = 1 << 20


class Directory:
    """The directory `path` (local, gs://, s3://, ...), which need not exist yet. DataError for an unusable address."""

    def __init__(self, path: str | os.PathLike):
        import fsspec

        self.path = os.fspath(path)
        try:
            self._fs, root = fsspec.url_to_fs(self.path)
        except (ImportError, ValueError) as error:
            raise DataError(f"Cannot use the directory {self.path} ({error}): check its address.") from error
        self._root = root.rstrip("/")
        self.is_local = "file" in ((self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol)

    def __truediv__(self, name: str) -> str:
        """The full path of a file, for messages and for fsspec."""
        return f"{self.path.rstrip('/')}/{name}"

    def kvstore(self, name: str) -> dict | str:
        """The subdirectory `name` as a tensorstore key-value store."""
        if self.is_local:
            return {"driver": "file", "path": f"{os.path.abspath(self._root)}/{name}/"}
        return self / f"{name}/"

    def sizes(self) -> dict[str, int]:
        """Bytes of every file in the directory and below, by name; empty if the directory does not exist."""
        with self._reading():
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return {}
            if self._fs.isfile(self._root):
                raise DataError(f"{self.path} is a file, not a directory: give a directory.")
            found = self._fs.find(self._root, detail=True)
            return {name[len(self._root) + 1 :]: info["size"] for name, info in sorted(found.items())}

    def read(self, name: str) -> bytes:
        """The content of a file. DataError if it cannot be read."""
        with self.opened(name) as file, self._reading():
            return file.read()

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator:
        """The file `name`, open to read bytes."""
        with self._reading():
            file = self._fs.open(f"{self._root}/{name}", "rb")
        with file:
            yield file

    def local_file(self, name: str) -> Path | None:
        """The file's path where it can be memory-mapped, None on an object store."""
        return Path(self._root, name) if self.is_local else None

    def sha256(self, name: str) -> str:
        """Hash of a file's content, hexadecimal."""
        return fingerprint_file(self._fs.unstrip_protocol(f"{self._root}/{name}"))["sha256"]

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, whole or not at all. DataError if that fails."""
        if self.is_local:
            write_bytes(Path(self._root, name), content)
        else:
            with file_system_errors(self / name):
                self._fs.pipe_file(f"{self._root}/{name}", content)

    def remove(self, name: str) -> None:
        """Remove a file, or a directory and all in it, if it is there."""
        with file_system_errors(self / name):
            if self._fs.exists(f"{self._root}/{name}"):
                self._fs.rm(f"{self._root}/{name}", recursive=True)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"Cannot read {self.path} ({error}): check that it is complete and readable.") from error


def fingerprint_file(path: str) -> dict:
    """Name, size and hash of one file; the directory it lies in does not matter. DataError if it cannot be read."""
    import fsspec

    digest, size = hashlib.sha256(), 0
    try:
        with fsspec.open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise DataError(f"Cannot read {path} ({error}): check that it is there and readable.") from error
    return {"name": os.path.basename(path), "bytes": size, "sha256": digest.hexdigest()}
