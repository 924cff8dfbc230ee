"""The checkpoints of a training run: saved asynchronously, verified, retained or deleted.

Orbax writes and reads the arrays. `ocp.training.Checkpointer` is not used because it deletes old steps as soon as Orbax
has committed the new arrays; here a step is complete only with its manifest, and old steps are deleted after it is
written. A process killed at any moment leaves the last complete checkpoint unchanged.
All processes of a run call every method, in the same order; process 0 alone touches anything but arrays.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxcoder.checkpoint import arrays as array_files
from jaxcoder.checkpoint.discover import latest_complete, steps_in
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
    """Owns `directory` (`<run>/checkpoints`). At most one save is in progress; its failure is raised by the next call.

    tokenizer_files: name -> content (`Tokenizer.files`), saved with every checkpoint.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        config: CheckpointConfig,
        *,
        run: RunConfig,
        tokenizer_files: Mapping[str, bytes] | None = None,
    ):
        self.directory = epath.Path(directory)
        self.config, self.run = config, run
        self._small_files = {CONFIG: to_json(run).encode()}
        self._small_files |= {f"{TOKENIZER}/{name}": content for name, content in (tokenizer_files or {}).items()}
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
        """Starts to save `arrays` as `step` if that is due, or forced; returns whether it did.

        Returns when the arrays may be donated. `metadata` is plain JSON. A complete checkpoint of `step` that is not
        known to be damaged is not written again. Raises CheckpointError if this save cannot start or the previous one
        has failed; complete checkpoints stay complete.
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
        # A daemon thread: a second Ctrl-C must not wait for a disk. That save stays incomplete.
        self._saving = threading.Thread(target=self._finish, args=(path, manifest, response), daemon=True)
        self._saving.start()
        self._began, self._blocked = began, time.monotonic() - began
        return True

    def poll(self) -> None:
        """Raises CheckpointError if the save in progress has failed; cheap, to be called every step."""
        if self._saving is not None and not self._saving.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when no save is in progress; CheckpointError as in `poll`."""
        if self._saving is None:
            return
        self._saving.join()
        self._saving, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise self._failed(self._saving_step, failure) from failure
        seconds = self._done - self._began
        self._finished.append(Saved(self._saving_step, self._blocked, seconds, self._saving_bytes))

    def take_finished(self) -> list[Saved]:
        """The saves that have finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """The same as `wait`."""
        self.wait()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        if exc_type is not KeyboardInterrupt:  # the user wants to leave immediately
            self.close()

    # --- restoring ---------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps with a manifest, ascending; they may be damaged."""
        return [step for step in steps_in(self.directory) if has_manifest(self.directory / str(step))]

    def latest_step(self) -> int | None:
        """The newest complete step, verified byte by byte, or None; a warning is logged for every step that is
        skipped."""
        step = -1
        if jax.process_index() == 0:
            newest = latest_complete(self.directory)
            step = -1 if newest is None else newest
            self._bad = {bad for bad in steps_in(self.directory) if bad > step}
        step = int(_of_process_0(step))
        return None if step < 0 else step

    def restore(self, step: int, abstract_arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The arrays of `step` in the requested shapes, dtypes and shardings, whatever mesh they were saved on.

        Shardings on an abstract mesh are resolved on the mesh in scope. Raises CheckpointError for a step that is not
        complete, or whose names or shapes differ from the requested ones.
        """
        path = self.directory / str(step)
        manifest = self.manifest(step)
        check_arrays(abstract_arrays, manifest.arrays, f"the checkpoint {path}")
        return array_files.load(path, abstract_arrays)

    def manifest(self, step: int) -> Manifest:
        """The manifest of `step`; its `metadata` is what was given to `save`."""
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
        """Retains the last `keep_last` steps and the multiples of keep_every_steps; damaged and later steps are not
        counted."""
        steps = [step for step in self.steps() if step <= newest and step not in self._bad]
        every = self.config.keep_every_steps
        for step in steps[: -self.config.keep_last]:
            if every is None or step % every:
                path = self.directory / str(step)
                # The manifest first: a partly deleted checkpoint must not look complete.
                (path / MANIFEST).unlink()
                path.rmtree()

    def _remove_unfinished(self) -> None:
        """Deletes incomplete saves of a killed process."""
        for step in steps_in(self.directory):
            path = self.directory / str(step)
            names = {entry.name.partition(".")[0] for entry in path.iterdir()}
            if not has_manifest(path) and names <= {"", STATE, TOKENIZER, "config"}:
                logger.warning(f"{path} is an incomplete save of an earlier process and is removed.")
                path.rmtree()

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        complete: list[int] = []
        try:
            if jax.process_index() == 0:
                path = self.directory / str(step)
                if not has_manifest(path):
                    _remove(path)  # frees space on a full disk
            complete = self.steps()
        except OSError as again:  # Orbax may still write there, or the directory is not accessible any more
            logger.warning(f"the incomplete checkpoint of step {step} could not be removed: {again}")
        latest = f"the latest complete one is of step {complete[-1]}" if complete else "there is no complete one yet"
        reason = "the disk is full" if is_disk_full(error) else f"{type(error).__name__}: {error}"
        return CheckpointError(
            f"the checkpoint of step {step} could not be saved to {self.directory} ({reason}); {latest}. "
            f"A checkpoint needs a little more than {format_bytes(self._saving_bytes)}: free some space or make the "
            "directory writable, and run the same command again."
        )


def _mesh_of(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    for array in arrays.values():
        if isinstance(array.sharding, NamedSharding):
            return dict(array.sharding.mesh.shape)
    return {}


def _of_process_0(value: int | bool) -> Any:
    """The value of process 0, in all processes."""
    return multihost_utils.broadcast_one_to_all(np.asarray(value)) if jax.process_count() > 1 else value


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _remove(path: epath.Path) -> None:
    if path.exists():
        (path / MANIFEST).unlink(missing_ok=True)
        path.rmtree()
