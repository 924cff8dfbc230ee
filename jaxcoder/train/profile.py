"""Profiles of a few steps, for XProf, TensorBoard or Perfetto: of chosen steps, or of the next steps after SIGUSR1."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax

from jaxcoder.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProfileSteps:
    """Steps `first` to `last`, both included; 1 is the run's first."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "ProfileSteps":
        """From "10:13", or "10" for one step. ConfigError for anything else."""
        first, colon, last = text.partition(":")
        try:
            steps = cls(first=int(first), last=int(last if colon else first))
        except ValueError:
            steps = None
        if steps is None or not 1 <= steps.first <= steps.last:
            raise ConfigError(f"--profile-steps is {text!r}: give the first and the last step, as in 10:13.")
        return steps


_REQUESTED_STEPS = 3  # after a signal


class Profiler:
    """Writes traces of some steps into `directory`. A context manager around the loop.

    Each process traces itself; a request affects only the process that receives it.
    """

    def __init__(
        self,
        steps: ProfileSteps | None,
        directory: str,
        on_end: Callable[[int, int], object] = lambda first, last: None,
    ):
        """on_end: called with the first and the last step of each profile."""
        self._steps, self._directory, self._on_end = steps, directory, on_end
        self._is_requested = False
        self._running: ProfileSteps | None = None

    def request(self) -> None:
        """Traces the next steps; safe to call from a signal handler."""
        self._is_requested = True

    def before(self, step: int) -> None:
        """To be called before `step` is dispatched."""
        if self._running is not None:
            return
        if self._steps is not None and step == self._steps.first:
            self._running = self._steps
        elif self._is_requested:
            self._running = ProfileSteps(first=step, last=step + _REQUESTED_STEPS - 1)
        if self._running is not None:
            self._is_requested = False
            jax.profiler.start_trace(self._directory)

    def after(self, step: int, wait: Callable[[], object]) -> None:
        """To be called after `step` was dispatched; `wait` blocks until it is computed."""
        if self._running is not None and step >= self._running.last:
            wait()
            self._stop(self._running.first, step)

    def _stop(self, first: int, step: int) -> None:
        self._running = None
        jax.profiler.stop_trace()
        logger.info(
            f"Profile of steps {first} to {step}: {self._directory} "
            "(open it with `xprof`, or `tensorboard` and its profile plugin)"
        )
        self._on_end(first, step)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            self._stop(self._running.first, self._running.last)
