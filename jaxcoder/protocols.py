"""The few interfaces between rooms that must not import each other."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class Progress(Protocol):
    """Long work reports here; the command line shows a live line, a library user passes `SILENT`."""

    def start(self, what: str, total: float | None, unit: str) -> None:
        """Begin a stage of `total` units (None where unknown)."""

    def advance(self, amount: float, note: str = "") -> None:
        """`amount` more units are done; `note` replaces the text behind the bar."""

    def finish(self, summary: str = "") -> None:
        """The stage is over; `summary` stays on the screen."""


class _Silent:
    def start(self, what: str, total: float | None, unit: str) -> None: ...

    def advance(self, amount: float, note: str = "") -> None: ...

    def finish(self, summary: str = "") -> None: ...


SILENT: Progress = _Silent()


class MetricWriter(Protocol):
    """Where the training loop puts its numbers."""

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Record the metrics of one completed step."""

    def close(self) -> None:
        """Flush and release; writing after this is an error."""


class Generator(Protocol):
    """Something that continues prompts: what evaluation during training is handed."""

    def complete(self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy continuations of the prompts, without the prompts."""

    def infill(self, gaps: Sequence[tuple[str, str]], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy middles for (prefix, suffix) pairs."""
