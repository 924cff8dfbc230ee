"""Flat dictionaries of arrays in and out of Orbax: at once, asynchronously, or in chunks.

Reference: Orbax v1, https://orbax.readthedocs.io
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxcoder.checkpoint.manifest import STATE, ArrayInfo
from jaxcoder.checkpoint.names import concrete

CHUNK_BYTES = 256 * 2**20
TIMEOUT_SECONDS = 7 * 24 * 3600


def save_async(directory: epath.Path, arrays: Mapping[str, jax.Array]) -> Any:
    """Starts to write `directory/state` and returns once the arrays may be donated; `.result()` waits and raises."""
    with _context():
        return ocp.save_async(_state(directory), dict(arrays))


def load(directory: epath.PathLike, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays named in `targets` in their shardings and dtypes; each process reads its own shards."""
    with _context():
        return ocp.load(_state(directory), {name: concrete(leaf) for name, leaf in targets.items()})


def load_numpy(directory: epath.PathLike, infos: Mapping[str, ArrayInfo]) -> dict[str, np.ndarray]:
    """The arrays named in `infos` as numpy arrays."""
    # Orbax looks at type, shape and dtype only; a broadcast scalar costs no memory.
    targets = {name: np.broadcast_to(np.zeros((), info.dtype), info.shape) for name, info in infos.items()}
    with _context():
        return ocp.load(_state(directory), targets)


class ArrayWriter:
    """Writes `directory/state` array by array; at most 256 MiB (or one array) are in memory."""

    def __init__(self, directory: epath.PathLike):
        self.path = _state(directory)
        self.infos: dict[str, ArrayInfo] = {}
        self._chunk: dict[str, np.ndarray] = {}
        self._chunk_bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        # Contiguous, because Orbax writes an array in the order of its memory.
        self._chunk[name] = np.ascontiguousarray(array)
        self._chunk_bytes += array.nbytes
        self.infos[name] = ArrayInfo(array.shape, array.dtype.name)
        if self._chunk_bytes >= CHUNK_BYTES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        with _context():
            ocp.partial.finalize(self.path)

    def _flush(self) -> None:
        if self._chunk:
            with _context():
                ocp.partial.save(self.path, self._chunk)
        self._chunk, self._chunk_bytes = {}, 0


def _state(directory: epath.PathLike) -> epath.Path:
    """Orbax takes absolute paths only."""
    return epath.Path(directory).resolve() / STATE


def _context() -> ocp.Context:
    context = ocp.Context()
    # Orbax compares wall-clock times with its timeout, so a clock that is set forward would fail the save. Hangs are
    # left to the run's watchdog.
    context.asynchronous.timeout_secs = TIMEOUT_SECONDS
    # Trained weights do not compress.
    context.array.saving.use_compression = False
    # Callers have compared the names with the manifest; inference leaves out the optimizer.
    context.pytree.loading.partial_load = True
    return context
