"""Errors of the operating system and of object stores, as sentences that name the path and the way out."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from jaxcoder.errors import DataError, JaxcoderError

# Top-level packages whose exceptions mean that an object store refused the access or could not be reached.
_CLIENTS = {"aiobotocore", "aiohttp", "asyncio", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3"}
# The statuses with which tensorstore's errors begin when the storage, and not the data, is the cause.
_STORAGE_STATUS = re.compile("NOT_FOUND|UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|DEADLINE_EXCEEDED|ABORTED")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_WORDS = re.compile("No space left on device|Disk quota exceeded|File too large")

GOOGLE_CREDENTIALS = "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS"
AMAZON_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
_CREDENTIALS = {
    "gs": GOOGLE_CREDENTIALS, "gcs": GOOGLE_CREDENTIALS, "s3": AMAZON_CREDENTIALS, "s3a": AMAZON_CREDENTIALS,
}  # fmt: skip


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space: a full disk, a quota, or a limit on the size of files.

    tensorstore, pyarrow and Orbax raise other types than OSError, but quote the operating system's words.
    """
    return getattr(error, "errno", None) in _NO_SPACE or _NO_SPACE_WORDS.search(str(error)) is not None


def is_access_error(error: BaseException) -> bool:
    """Whether an error, or one that caused it, came from the operating system, tensorstore's storage or a client of
    object stores."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) or type(cause).__module__.split(".")[0] in _CLIENTS:
            return True
        if isinstance(cause, ValueError) and _STORAGE_STATUS.match(str(cause)):
            return True
        cause = cause.__cause__
    return False


def explain_os_error(error: BaseException, resume_command: str = "") -> str | None:
    """A sentence for an error that names its path or means a full disk; None for any other.

    resume_command: what continues the work once there is space.
    """
    name = getattr(error, "filename", None) if isinstance(error, OSError) else None
    if is_disk_full(error):
        quoted = re.search(r'"((?:/|\w+://)[^"]+)"', str(error))
        name = name or (quoted and quoted[1])
        where = f" at {os.fsdecode(name)!r}" if name else ""
        again = f": {resume_command}" if resume_command else ""
        return (
            f"the disk is full{where} ({_reason(error)}): everything finished before this write is kept; "
            f"{_free_space(error)} and run the same command again{again}"
        )
    if name is None:
        return None
    return f"{_reason(error)}: {os.fsdecode(name)!r}. Check the path and its permissions."


@contextlib.contextmanager
def access_errors(
    path: str | os.PathLike, action: str = "read", kind: type[JaxcoderError] = DataError
) -> Iterator[None]:
    """Raises an error of `kind` that names `path` for an error of the operating system or of a client of object
    stores."""
    try:
        yield
    except JaxcoderError:
        raise
    except Exception as error:
        if not is_access_error(error):
            raise
        raise kind(describe_os_error(error, path, action)) from error


def describe_os_error(error: Exception, path: str | os.PathLike, action: str) -> str:
    """The sentence of `access_errors`."""
    path = os.fspath(path)
    return f"Cannot {action} {path} ({_reason(error)}): {_way_out(error, path, action)}."


def _reason(error: BaseException) -> str:
    if words := _NO_SPACE_WORDS.search(str(error)):
        return words[0]
    return getattr(error, "strerror", None) or str(error).split("\n", 1)[0] or type(error).__name__


def _free_space(error: BaseException) -> str:
    if "File too large" in _reason(error):
        return "raise the limit on the size of files (`ulimit -f unlimited`)"
    return "free some space"


def _way_out(error: Exception, path: str, action: str) -> str:
    protocol = path.split("://", 1)[0] if "://" in path else ""
    words = f"{type(error).__name__} {error}".lower()
    if is_disk_full(error):
        return f"{_free_space(error)}, or choose another output directory, and run again"
    is_refused = isinstance(error, PermissionError) or getattr(error, "code", None) in (401, 403)
    if protocol and (
        is_refused or any(word in words for word in ("credential", "auth", "denied", "forbidden", "token"))
    ):
        return f"give credentials that may use the bucket ({_CREDENTIALS.get(protocol, 'see its client')})"
    if "bucket" in words and "connect" not in words:
        return "create the bucket, or correct its name"
    if protocol:
        return "check the address, the network and the access to it"
    if getattr(error, "errno", None) == errno.EROFS:
        return "it is on a read-only file system; choose another path"
    return "check that it exists and is readable" if action == "read" else "choose another path, or make it writable"
