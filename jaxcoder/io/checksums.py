"""Checksums of files."""

import hashlib
import os

from jaxcoder.io.addresses import open_address
from jaxcoder.io.os_errors import access_errors


def fingerprint_file(path: str | os.PathLike) -> dict:
    """Base name, size and SHA-256 of one file, local or remote. DataError if unreadable."""
    path = os.fspath(path)
    fs, inside = open_address(path)
    digest, size = hashlib.sha256(), 0
    with access_errors(path), fs.open(inside, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"name": os.path.basename(path), "bytes": size, "sha256": digest.hexdigest()}
