"""How a run ends: said in events.jsonl, and a failure of the devices' collectives put down to the process that is gone."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from jaxcoder.errors import (
    EXIT_CTRL_C,
    EXIT_SIGTERM,
    CheckpointError,
    Interrupted,
    JaxcoderError,
    LostProcessError,
)
from jaxcoder.io.os_errors import is_disk_full
from jaxcoder.record.event_log import EventLog, Spent
from jaxcoder.runtime import Peers, Terminated, Watchdog, is_out_of_memory

_SILENCE_SECONDS = 12.0  # until a process that is gone has missed its posts


@dataclass
class Ending:
    """step: the last one that is known to be done; the loop keeps it."""

    step: int = 0


@contextlib.contextmanager
def endings_told(events: EventLog, spent: Spent, peers: Peers, watchdog: Watchdog) -> Iterator[Ending]:
    """However the block ends, the event log says it, with the account of time.

    An error of JAX because another process is gone becomes a LostProcessError that names it.
    """
    ending = Ending()
    try:
        try:
            yield ending
        except Exception as error:
            lost = find_lost(error, peers, watchdog)
            if lost is None:
                raise
            raise lost from error
    except BaseException as error:
        spent.write(ending.step, now=True)
        events.say_end(ending.step, reason_of(error), str(error))
        raise
    spent.write(ending.step, now=True)
    events.say_end(ending.step, "finished")


def reason_of(error: BaseException) -> str:
    """ "SIGTERM", "Ctrl-C" or "error"."""
    if isinstance(error, Interrupted):
        return {EXIT_SIGTERM: "SIGTERM", EXIT_CTRL_C: "Ctrl-C"}.get(error.exit_code, "error")
    if isinstance(error, Terminated):
        return "SIGTERM"
    return "Ctrl-C" if isinstance(error, KeyboardInterrupt) else "error"


def find_lost(error: Exception, peers: Peers, watchdog: Watchdog) -> JaxcoderError | None:
    """The sentence that names the process whose loss explains `error`; None if it is about something else."""
    if isinstance(error, CheckpointError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # all processes save together
    is_ours = isinstance(error, JaxcoderError) or is_out_of_memory(error) or is_disk_full(error)
    if peers.count == 1 or is_ours or not isinstance(error, jax.errors.JaxRuntimeError | RuntimeError | ValueError):
        return None
    deadline = time.monotonic() + _SILENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            peers.check_failed()
        except JaxcoderError as ended:
            return ended
        except Exception:  # process 0 is gone, through which all speak
            break
        if watchdog.silent():
            break
        time.sleep(0.5)
    silent = watchdog.silent()
    if not silent:
        return None
    names = ", ".join(peers.name(index) for index in silent[:4])
    first_line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return LostProcessError(
        f"{names} {'does' if len(silent) == 1 else 'do'} not answer any more, so the run cannot go on "
        f"({first_line}): look at its log; the same command continues from the newest checkpoint."
    )
