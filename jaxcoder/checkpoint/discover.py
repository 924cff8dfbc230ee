"""Discovers complete checkpoints under a path: of a run, of its `checkpoints`, or a single step."""

import logging

from etils import epath

from jaxcoder.checkpoint.manifest import Manifest, UnusableCheckpoint, find_damage, has_manifest, read_manifest
from jaxcoder.errors import CheckpointError

CHECKPOINTS = "checkpoints"
"""Where a run keeps its steps."""

logger = logging.getLogger(__name__)


def steps_in(directory: epath.PathLike) -> list[int]:
    """Steps that have a directory here, ascending, complete or not."""
    directory = epath.Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if _is_step(path.name) and path.is_dir())


def _is_step(name: str) -> bool:
    """Whether `name` is a step as the checkpointer writes it: "4", not "0004" or "٤"."""
    return name.isdecimal() and name == str(int(name))


def is_checkpoint(path: epath.PathLike) -> bool:
    """Whether `path` looks like a jaxcoder run, its checkpoints or one of them, complete or not."""
    path = epath.Path(path)
    return has_manifest(path) or (path / CHECKPOINTS).is_dir() or bool(steps_in(path))


def latest_complete(directory: epath.PathLike) -> int | None:
    """The latest step of a checkpoints directory whose manifest and checksums match; logs every step it skips."""
    for step in reversed(steps_in(directory)):
        path = epath.Path(directory) / str(step)
        damage = damage_of(path)
        if damage is None:
            return step
        logger.warning(f"checkpoint {path} is skipped: {damage}. The previous one is used if there is one.")
    return None


def damage_of(path: epath.PathLike, *, by_size: bool = False) -> str | None:
    """The reason why the checkpoint at `path` cannot be used, or None; by_size: without reading its arrays."""
    try:
        return find_damage(path, read_manifest(path), by_size=by_size)
    except UnusableCheckpoint as error:
        return error.damage


def discover_checkpoint(path: epath.PathLike, *, step: int | None = None) -> epath.Path:
    """The directory of a complete checkpoint under `path`: of `step`, or of the latest.

    Raises CheckpointError if there is none, or if `step` is damaged.
    """
    path = epath.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a run's directory, its {CHECKPOINTS}, or one checkpoint.")
    if has_manifest(path) and step is None:
        return _verified(path)
    steps = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if step is not None:
        if step not in steps_in(steps):
            there = ", ".join(map(str, steps_in(steps))) or "none"
            raise CheckpointError(f"{steps} has no step {step}: there are {there}.")
        return _verified(steps / str(step))
    if not steps_in(steps):
        raise CheckpointError(f"{path} holds no checkpoint: give a run's directory, its {CHECKPOINTS}, or one step.")
    newest = latest_complete(steps)
    if newest is None:
        raise CheckpointError(
            f"no checkpoint in {steps} is complete: the warnings above give the reason for each step."
        )
    return steps / str(newest)


def open_checkpoint(path: epath.PathLike, *, step: int | None = None) -> tuple[epath.Path, Manifest]:
    """`discover_checkpoint` with its manifest."""
    directory = discover_checkpoint(path, step=step)
    return directory, read_manifest(directory)


def _verified(path: epath.Path) -> epath.Path:
    damage = damage_of(path)
    if damage is not None:
        raise UnusableCheckpoint(path, damage)
    return path
