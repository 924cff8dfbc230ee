"""Flat dictionaries of arrays in and out of Orbax: at once, in the background, or piece by piece.

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

_PIECE_BYTES = 256 * 2**20


def save_async(directory: epath.Path, arrays: Mapping[str, jax.Array]) -> Any:
    """Starts to write `directory/state` and returns once the arrays may be donated; `.result()` waits and raises."""
    with _context():
        return ocp.save_async(_state(directory), dict(arrays))


def load(directory: epath.PathLike, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays named in `targets`, each straight into its sharding and dtype; each process reads what it holds."""
    with _context():
        return ocp.load(_state(directory), {name: concrete(leaf) for name, leaf in targets.items()})


def load_numpy(directory: epath.PathLike, infos: Mapping[str, ArrayInfo]) -> dict[str, np.ndarray]:
    """The arrays named in `infos` on the host: for conversions, a few at a time."""
    # Orbax looks at type, shape and dtype only; a broadcast scalar costs no memory.
    targets = {name: np.broadcast_to(np.zeros((), info.dtype), info.shape) for name, info in infos.items()}
    with _context():
        return ocp.load(_state(directory), targets)


class PieceWriter:
    """Writes `directory/state` array by array; no more than one piece of 256 MiB (or one array) is in memory."""

    def __init__(self, directory: epath.PathLike):
        self.path = _state(directory)
        self.infos: dict[str, ArrayInfo] = {}
        self._piece: dict[str, np.ndarray] = {}
        self._piece_bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        # Contiguous, because Orbax writes an array in the order of its memory.
        self._piece[name] = np.ascontiguousarray(array)
        self._piece_bytes += array.nbytes
        self.infos[name] = ArrayInfo(array.shape, array.dtype.name)
        if self._piece_bytes >= _PIECE_BYTES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        with _context():
            ocp.partial.finalize(self.path)

    def _flush(self) -> None:
        if self._piece:
            with _context():
                ocp.partial.save(self.path, self._piece)
        self._piece, self._piece_bytes = {}, 0


def _state(directory: epath.PathLike) -> epath.Path:
    """Orbax takes absolute paths only."""
    return epath.Path(directory).resolve() / STATE


def _context() -> ocp.Context:
    context = ocp.Context()
    # Trained weights do not compress; zstd would cost time and save nothing.
    context.array.saving.use_compression = False
    # What may be left out (the optimizer, for inference) is decided before, against the manifest.
    context.pytree.loading.partial_load = True
    return context
