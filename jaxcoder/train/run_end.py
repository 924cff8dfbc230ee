"""The end of a run: its exit reason in events.jsonl, and failed collectives attributed to the process that has
ended."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

from jaxcoder.errors import (
    CheckpointError,
    Interrupted,
    JaxcoderError,
    LostProcessError,
    TransientError,
)
from jaxcoder.io.os_errors import is_disk_full
from jaxcoder.record.event_log import CategoryTimer, EventLog
from jaxcoder.runtime import ProcessGroup, Watchdog, is_out_of_memory, signal_of
from jaxcoder.runtime.signals import STOP_SIGNALS

_SILENCE_SECONDS = 12.0  # until a process that has ended has missed its heartbeats


@contextlib.contextmanager
def record_run_end(
    events: EventLog, timer: CategoryTimer, group: ProcessGroup, watchdog: Watchdog, step: Callable[[], int]
) -> Iterator[None]:
    """Records the exit reason and the account of time in events.jsonl, however the block ends. step: the last one.

    An error of JAX that another process has caused by ending becomes a LostProcessError that names the process.
    """
    reason, message = "finished", ""
    try:
        yield
    except Exception as error:
        lost = find_lost(error, group, watchdog)
        reason, message = exit_reason(lost or error), str(lost or error)
        if lost is None:
            raise
        raise lost from error
    except BaseException as error:
        reason, message = exit_reason(error), str(error)
        raise
    finally:
        timer.write(step(), now=True)
        events.write_end(step(), reason, message)


def exit_reason(error: BaseException) -> str:
    """ "SIGTERM", "SIGHUP", "Ctrl-C" or "error"."""
    if isinstance(error, Interrupted):
        return {code: name for name, code in STOP_SIGNALS.values()}.get(error.exit_code, "error")
    return signal_of(error)[0] if isinstance(error, KeyboardInterrupt) else "error"


def find_lost(error: Exception, group: ProcessGroup, watchdog: Watchdog) -> JaxcoderError | None:
    """The error that names the process whose end explains `error`; None if the cause is another one."""
    while isinstance(error, TransientError | CheckpointError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # all processes save together
    is_explained = isinstance(error, JaxcoderError) or is_out_of_memory(error) or is_disk_full(error)
    if (
        group.count == 1
        or is_explained
        or not isinstance(error, jax.errors.JaxRuntimeError | RuntimeError | ValueError)
    ):
        return None
    deadline = time.monotonic() + _SILENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            group.check_failed()
        except JaxcoderError as failed:
            return failed
        except Exception:  # process 0, which runs the coordination service, has ended
            break
        if watchdog.silent_processes():
            break
        time.sleep(0.5)
    silent = watchdog.silent_processes()
    if not silent:
        return None
    names = ", ".join(group.name(index) for index in silent[:4])
    first_line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return LostProcessError(
        f"{names} {'does' if len(silent) == 1 else 'do'} not respond any more, so the run cannot continue "
        f"({first_line}): see its log; the same command continues from the newest checkpoint."
    )
