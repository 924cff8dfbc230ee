"""Files behind addresses: local paths, gs:// and s3:// through fsspec, with errors that end in one sentence.

The cloud clients (gcsfs, s3fs) are extras, and raise errors of a dozen libraries: missing credentials, a bucket that is
not there, a server that does not answer. All of them become a DataError here.
"""

import contextlib
import logging
import os
from collections.abc import Iterator

from jaxcoder.errors import DataError, JaxcoderError, MissingExtraError

# Top-level packages whose exceptions mean that the store could not be reached, or refused.
_CLIENTS = {"aiobotocore", "aiohttp", "asyncio", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3"}
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_MEANS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
    "gcs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
}


def open_address(path: str | os.PathLike):
    """(fsspec file system, path inside it).

    MissingExtraError without the client; DataError for an unknown protocol, or a bucket at Google without credentials.
    """
    import fsspec

    path = os.fspath(path)
    protocol = path.split("://", 1)[0]
    try:
        with access_errors(path):
            fs, inside = fsspec.url_to_fs(path)
            if _EXTRAS.get(protocol) == "gcs":
                _check_credentials(fs, path)
            return fs, inside
    except ImportError as error:
        if protocol in _EXTRAS:
            raise MissingExtraError(f"{protocol}:// ({path})", _EXTRAS[protocol]) from error
        raise DataError(f"Cannot use the address {path} ({error}): check it.") from error
    except ValueError as error:
        raise DataError(f"Cannot use the address {path} ({error}): check it.") from error


def _check_credentials(fs, path: str) -> None:
    """DataError if gcsfs found no credentials: it would go on as nobody, and without a network ask for a minute."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs is raised as well
    unasked = fs.credentials.method == "anon" and fs.credentials.token is None
    if unasked and fs.base.startswith("https://storage.googleapis.com/"):  # and no emulator
        raise DataError(
            f"There are no credentials for {path}: give some that may use the bucket ({_MEANS['gcs']}), or set "
            "FSSPEC_GCS_TOKEN=anon if it is public."
        )


@contextlib.contextmanager
def access_errors(path: str | os.PathLike, action: str = "read") -> Iterator[None]:
    """Turn what fails inside, a local or a remote error of access, into a DataError that names `path`."""
    try:
        yield
    except JaxcoderError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS):
            raise
        reason = getattr(error, "strerror", None) or str(error).split("\n", 1)[0] or type(error).__name__
        raise DataError(f"Cannot {action} {os.fspath(path)} ({reason}): {_way_out(error, os.fspath(path))}.") from error


def _way_out(error: Exception, path: str) -> str:
    protocol = path.split("://", 1)[0] if "://" in path else ""
    words = f"{type(error).__name__} {error}".lower()
    unnamed = isinstance(error, PermissionError) or getattr(error, "code", None) in (401, 403)
    if protocol and (unnamed or any(word in words for word in ("credential", "auth", "denied", "forbidden", "token"))):
        how = _MEANS.get(_EXTRAS.get(protocol, ""), "as its client says")
        return f"give credentials that may use the bucket ({how})"
    if "bucket" in words and "connect" not in words:
        return "create the bucket, or correct its name"
    if protocol:
        return "check the address, the network and the access to it"
    return "check that it is there and readable"
