"""Addresses of files: local paths, gs:// and s3://, opened through fsspec (gcsfs and s3fs are extras)."""

import logging
import os

from jaxcoder.errors import DataError, MissingExtraError
from jaxcoder.io.os_errors import GOOGLE_CREDENTIALS, access_errors

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def open_address(path: str | os.PathLike):
    """(fsspec file system, path inside it).

    MissingExtraError without the client; DataError for an unknown protocol, or gs:// without credentials.
    """
    import fsspec

    path = os.fspath(path)
    extra = _EXTRAS.get(path.split("://", 1)[0])
    try:
        with access_errors(path):
            fs, inside = fsspec.url_to_fs(path)
            if extra == "gcs":
                _check_credentials(fs, path)
            return fs, inside
    except (ImportError, ValueError) as error:
        if isinstance(error, ImportError) and extra:
            raise MissingExtraError(f"Using {path}", extra) from error
        raise DataError(f"Cannot use the address {path} ({error}): check it.") from error


def is_local(fs) -> bool:
    """Whether an fsspec file system is the local one."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _check_credentials(fs, path: str) -> None:
    """DataError if gcsfs found no credentials: it would continue anonymously, and offline retry for a minute."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its log messages are raised as errors too
    is_anonymous = fs.credentials.method == "anon" and fs.credentials.token is None
    if is_anonymous and fs.base.startswith("https://storage.googleapis.com/"):  # not an emulator
        raise DataError(
            f"There are no credentials for {path}: give some that may use the bucket ({GOOGLE_CREDENTIALS}), or set "
            "FSSPEC_GCS_TOKEN=anon if it is public."
        )
