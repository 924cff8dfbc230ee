"""A profile of a few steps of a run, for XProf, TensorBoard or Perfetto."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from jaxcoder.errors import ConfigError


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


class Profiler:
    """Records what host and devices do during some steps into `directory`. A context manager around the loop."""

    def __init__(self, steps: ProfileSteps | None, directory: str, say: Callable[[str], None]):
        self._steps, self._directory, self._say = steps, directory, say
        self._is_running = False

    def before(self, step: int) -> None:
        """The step that will be number `step` is about to be dispatched."""
        if self._steps is not None and step == self._steps.first:
            jax.profiler.start_trace(self._directory)
            self._is_running = True

    def after(self, step: int, wait: Callable[[], object]) -> None:
        """It was dispatched; `wait` returns when it is done."""
        if self._is_running and step >= self._steps.last:
            wait()
            self._stop()

    def _stop(self) -> None:
        self._is_running = False
        jax.profiler.stop_trace()
        self._say(
            f"Profile of steps {self._steps.first} to {self._steps.last}: {self._directory} "
            "(look at it with `xprof`, or `tensorboard` and its profile plugin)"
        )

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_running:
            self._stop()
