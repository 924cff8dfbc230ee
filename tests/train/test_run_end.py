"""Whose fault it is that a step or a save failed: a process that is gone, or the user's disk."""

import errno
from types import SimpleNamespace

import jax
import pytest

from jaxcoder.errors import CheckpointError, LostProcessError
from jaxcoder.train.run_end import find_lost

RESET = "UNKNOWN: Gloo all-reduce failed: Connection reset by peer"


def people(*silent: int):
    group = SimpleNamespace(count=2, name=lambda index: f"process {index} (host-{index})", check_ended=lambda: None)
    return group, SimpleNamespace(silent_processes=lambda: list(silent))


def save_failed(cause: Exception) -> CheckpointError:
    error = CheckpointError("the checkpoint of step 16 could not be saved.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError(RESET), save_failed(ValueError(RESET))])
def test_a_process_that_is_gone_is_named(error):
    """In a save too: its exit code lets a scheduler start the run again, a CheckpointError's would not."""
    lost = find_lost(error, *people(1))
    assert isinstance(lost, LostProcessError) and lost.exit_code == 75
    assert "process 1 (host-1) does not respond any more" in str(lost) and "Connection reset" in str(lost)


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("no checkpoint is whole."),
        save_failed(OSError(errno.ENOSPC, "No space left on device")),
        save_failed(ValueError("RESOURCE_EXHAUSTED: No space left on device")),
        KeyError("a bug"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert find_lost(error, *people(1)) is None
