"""The checkpoints of a training run: saved in the background, verified, kept or deleted.

Orbax writes and reads the arrays. The sequence of steps is ours and not `ocp.training.Checkpointer`, because a step
counts only with our manifest: an old checkpoint may be deleted after the new manifest is there, and not as soon as
Orbax has committed its part. A process killed at any moment leaves the last complete checkpoint unchanged.
All processes of a run call every method, in the same order; process 0 alone touches anything but arrays.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxcoder.checkpoint import arrays as array_files
from jaxcoder.checkpoint.discover import newest_whole, steps_in
from jaxcoder.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    STATE,
    TOKENIZER,
    ArrayInfo,
    Manifest,
    has_manifest,
    read_manifest,
    write_manifest,
)
from jaxcoder.checkpoint.names import check_arrays
from jaxcoder.config import CheckpointConfig, RunConfig
from jaxcoder.config.serialize import from_json, to_json
from jaxcoder.errors import CheckpointError
from jaxcoder.formatting import format_bytes
from jaxcoder.io.os_errors import is_disk_full

logger = logging.getLogger(__name__)


class Saved(NamedTuple):
    """A finished save: seconds that the caller was blocked, and seconds until the checkpoint was complete."""

    step: int
    blocked: float
    seconds: float
    num_bytes: int


class Checkpointer:
    """Owns `directory` (`<run>/checkpoints`). At most one save is under way; its failure is raised by the next call.

    save_tokenizer: writes the tokenizer's files into a directory (`Tokenizer.save`); they are saved with every
    checkpoint.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        config: CheckpointConfig,
        *,
        run: RunConfig,
        save_tokenizer: Callable[[Path], None] | None = None,
    ):
        self.directory = epath.Path(directory)
        self.config, self.run = config, run
        self._small_files = _small_files(run, save_tokenizer)
        self._saving: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saving_step, self._saving_bytes = -1, 0
        self._began, self._blocked, self._done = 0.0, 0.0, 0.0
        self._finished: list[Saved] = []
        self._bad: set[int] = set()
        self._last_save_time = time.monotonic()
        if jax.process_index() == 0:
            self._remove_unfinished()

    # --- saving ------------------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether the config asks for a save after `step`."""
        if step % self.config.save_every_steps == 0:
            return True
        seconds = self.config.save_every_seconds
        return seconds is not None and bool(_of_process_0(time.monotonic() - self._last_save_time >= seconds))

    def save(
        self, step: int, arrays: Mapping[str, jax.Array], metadata: Mapping[str, Any], *, force: bool = False
    ) -> bool:
        """Starts to save `arrays` as `step` if that is due, or forced; whether it did.

        Returns when the arrays may be donated. `metadata` is plain JSON. A step that is there, finished and not found
        damaged, is left as it is: writing it again would put it at risk for nothing. Raises CheckpointError if this
        save cannot begin or the one before has failed; complete checkpoints stay complete.
        """
        if not force and not self.is_due(step):
            return False
        began = time.monotonic()
        self.wait()
        path = self.directory / str(step)
        if bool(_of_process_0(step not in self._bad and has_manifest(path))):
            return False
        manifest = Manifest(
            step=step,
            model=self.run.model,
            arrays={name: ArrayInfo(tuple(array.shape), array.dtype.name) for name, array in arrays.items()},
            metadata=metadata,
            mesh=_mesh_of(arrays),
        )
        self._saving_step = step
        self._saving_bytes = sum(array.size * array.dtype.itemsize for array in arrays.values())
        try:
            if jax.process_index() == 0:
                _remove(path)
                path.mkdir(parents=True)
            _barrier("checkpoint directory made")
            response = array_files.save_async(path, arrays)
        except Exception as error:
            raise self._failed(step, error) from error
        self._last_save_time = time.monotonic()
        # A daemon: a second Ctrl-C must not wait for a disk. The save is then unfinished, and the one before counts.
        self._saving = threading.Thread(target=self._finish, args=(path, manifest, response), daemon=True)
        self._saving.start()
        self._began, self._blocked = began, time.monotonic() - began
        return True

    def poll(self) -> None:
        """Raises CheckpointError if the save under way has failed; call it every step, it costs nothing."""
        if self._saving is not None and not self._saving.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way; CheckpointError as in `poll`."""
        if self._saving is None:
            return
        self._saving.join()
        self._saving, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise self._failed(self._saving_step, failure) from failure
        seconds = self._done - self._began
        self._finished.append(Saved(self._saving_step, self._blocked, seconds, self._saving_bytes))

    def take_finished(self) -> list[Saved]:
        """The saves that were found done since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """Waits for the last save; the same as `wait`, at the end."""
        self.wait()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        if exc_type is not KeyboardInterrupt:  # which means: at once
            self.close()

    # --- restoring ---------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps whose save was finished, ascending; they may be damaged."""
        return [step for step in steps_in(self.directory) if has_manifest(self.directory / str(step))]

    def latest_step(self) -> int | None:
        """The newest complete step, verified byte by byte, or None; a warning is logged for every step that is
        skipped."""
        step = -1
        if jax.process_index() == 0:
            newest = newest_whole(self.directory)
            step = -1 if newest is None else newest
            self._bad = {bad for bad in steps_in(self.directory) if bad > step}
        step = int(_of_process_0(step))
        return None if step < 0 else step

    def restore(self, step: int, abstract_arrays: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The arrays of `step` in the shapes, dtypes and shardings asked for, whatever mesh they were saved on.

        Shardings on an abstract mesh are taken on the mesh in scope. Raises CheckpointError for a step that is not
        whole, or whose names and shapes are not those asked for.
        """
        path = self.directory / str(step)
        manifest = self.manifest(step)
        check_arrays(abstract_arrays, manifest.arrays, f"the checkpoint {path}")
        return array_files.load(path, abstract_arrays)

    def manifest(self, step: int) -> Manifest:
        """What the checkpoint of `step` says of itself; its `metadata` is what was given to `save`."""
        return read_manifest(self.directory / str(step))

    def run_config(self, step: int) -> RunConfig:
        """The config of the run that saved `step`."""
        path = self.directory / str(step) / CONFIG
        try:
            return from_json(path.read_text(), source=str(path))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}): use another step.") from error

    # --- in the background -------------------------------------------------------------------------------------------

    def _finish(self, path: epath.Path, manifest: Manifest, response: Any) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                for name, content in self._small_files.items():
                    (path / name).parent.mkdir(exist_ok=True)
                    (path / name).write_bytes(content)
                write_manifest(path, manifest)
                self._bad.discard(manifest.step)
                self._delete_old(manifest.step)
            self._done = time.monotonic()
        except BaseException as error:  # raised in the main thread by `wait`
            self._failure = error

    def _delete_old(self, newest: int) -> None:
        """Keeps the newest steps and the multiples of keep_every_steps. Damaged ones and later ones do not count."""
        steps = [step for step in self.steps() if step <= newest and step not in self._bad]
        every = self.config.keep_every_steps
        for step in steps[: -self.config.keep_last]:
            if every is None or step % every:
                path = self.directory / str(step)
                # The manifest first: a partly deleted checkpoint must not look complete.
                (path / MANIFEST).unlink()
                path.rmtree()

    def _remove_unfinished(self) -> None:
        """What a killed process left of a save."""
        for step in steps_in(self.directory):
            path = self.directory / str(step)
            names = {entry.name.partition(".")[0] for entry in path.iterdir()}
            if not has_manifest(path) and names <= {"", STATE, TOKENIZER, "config"}:
                logger.warning(f"{path} is an unfinished save of an earlier process and is removed.")
                path.rmtree()

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        if jax.process_index() == 0:
            path = self.directory / str(step)
            if not has_manifest(path):
                _remove(path)  # gives a full disk its room back
        kept = self.steps()
        kept_words = f"the one of step {kept[-1]} is kept" if kept else "there is none yet"
        reason = "the disk is full" if is_disk_full(error) else f"{type(error).__name__}: {error}"
        return CheckpointError(
            f"the checkpoint of step {step} could not be saved to {self.directory} ({reason}); {kept_words}. "
            f"One needs {format_bytes(self._saving_bytes)} and a little more: make room there, or see to it that the "
            "directory can be written, and run the same command again."
        )


def _small_files(run: RunConfig, save_tokenizer: Callable[[Path], None] | None) -> dict[str, bytes]:
    files = {CONFIG: to_json(run).encode()}
    if save_tokenizer is not None:
        with tempfile.TemporaryDirectory() as directory:
            save_tokenizer(Path(directory))
            files |= {f"{TOKENIZER}/{path.name}": path.read_bytes() for path in sorted(Path(directory).iterdir())}
    return files


def _mesh_of(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    for array in arrays.values():
        if isinstance(array.sharding, NamedSharding):
            return dict(array.sharding.mesh.shape)
    return {}


def _of_process_0(value: int | bool) -> Any:
    """What process 0 has found, in all processes."""
    return multihost_utils.broadcast_one_to_all(np.asarray(value)) if jax.process_count() > 1 else value


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _remove(path: epath.Path) -> None:
    if path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        path.rmtree()
