"""A directory of files, local or on an object store.

Files are accessed by fsspec, arrays by tensorstore at the address `kvstore`. Files are written atomically. Names are
relative, with forward slashes.
"""

import contextlib
import os
from collections.abc import Iterator

from jaxcoder.errors import DataError
from jaxcoder.io.addresses import is_local, open_address
from jaxcoder.io.atomic import write_bytes
from jaxcoder.io.checksums import fingerprint_file
from jaxcoder.io.os_errors import access_errors


class Directory:
    """The directory `path` (local, gs://, s3://, ...), which need not exist yet. DataError for an unusable address."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._fs, root = open_address(self.path)
        self._root = root.rstrip("/")
        self.is_local = is_local(self._fs)

    def __truediv__(self, name: str) -> str:
        """The full path of a file, for messages and for fsspec."""
        return f"{self.path.rstrip('/')}/{name}"

    def kvstore(self, name: str) -> dict | str:
        """The subdirectory `name` as a tensorstore key-value store."""
        if self.is_local:
            return {"driver": "file", "path": f"{os.path.abspath(self._root)}/{name}/"}
        client = getattr(self._fs, "s3", None)
        if client is None:
            return self / f"{name}/"
        bucket, _, inside = f"{self._root}/{name}/".partition("/")
        store = {"driver": "s3", "bucket": bucket, "path": inside}
        if not client.meta.endpoint_url.endswith(".amazonaws.com"):  # an S3-compatible server, configured in fsspec
            store |= {"endpoint": client.meta.endpoint_url, "aws_region": client.meta.region_name or "us-east-1"}
        return store

    def sizes(self) -> dict[str, int]:
        """Bytes of every file in the directory and below, by name; empty if the directory does not exist."""
        with access_errors(self.path):
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return {}
            if self._fs.isfile(self._root):
                raise DataError(f"{self.path} is a file, not a directory: give a directory.")
            found = self._fs.find(self._root, detail=True)
            return {name[len(self._root) + 1 :]: info["size"] for name, info in sorted(found.items())}

    def read(self, name: str) -> bytes:
        """The content of a file. DataError if it cannot be read."""
        with self.opened(name) as file, access_errors(self / name):
            return file.read()

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator:
        """The file `name`, open to read bytes."""
        with access_errors(self / name):
            file = self._fs.open(f"{self._root}/{name}", "rb")
        with file:
            yield file

    def version(self, name: str) -> list:
        """Size and modification time or ETag of a file."""
        with access_errors(self / name):
            info = self._fs.info(f"{self._root}/{name}")
        return [info["size"], str(next((info[key] for key in ("ETag", "etag", "mtime", "created") if key in info), ""))]

    def sha256(self, name: str) -> str:
        """Hash of a file's content, hexadecimal."""
        return fingerprint_file(self / name)["sha256"]

    def write(self, name: str, content: bytes) -> None:
        """Writes a file atomically. DataError if that fails."""
        write_bytes(self / name, content)

    def remove(self, name: str) -> None:
        """Removes a file or a directory tree, if it exists."""
        with access_errors(self / name, "remove"):
            if self._fs.exists(f"{self._root}/{name}"):
                self._fs.rm(f"{self._root}/{name}", recursive=True)
