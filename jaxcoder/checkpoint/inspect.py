"""The contents of a checkpoint as lines of text, from its manifest only: no device and no jax."""

import math
import re
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxcoder.checkpoint.discover import CHECKPOINTS, steps_in
from jaxcoder.checkpoint.manifest import (
    CONFIG,
    TOKENIZER,
    ArrayInfo,
    Manifest,
    UnusableCheckpoint,
    has_manifest,
    read_manifest,
)
from jaxcoder.config.serialize import from_json, to_dict
from jaxcoder.errors import CheckpointError, ConfigError
from jaxcoder.formatting import format_bytes, format_table


class Row(NamedTuple):
    """Arrays of all layers that share a name, a shape and a dtype."""

    name: str
    num_arrays: int
    info: ArrayInfo


def choose(path: epath.PathLike, step: int | None = None) -> epath.Path:
    """The directory of `step`, or of the latest one with a manifest, not verified. CheckpointError if there is none."""
    path = epath.Path(path)
    if has_manifest(path) and step is None:
        return path
    steps = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    finished = [found for found in steps_in(steps) if has_manifest(steps / str(found))]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a run's directory or one step.")
    if not finished:
        hint = "; for a directory in PyTorch format read its config.json" if (path / "config.json").exists() else ""
        raise CheckpointError(f"{path} holds no finished checkpoint: give a run's directory or one step{hint}.")
    if step is not None and step not in finished:
        raise CheckpointError(f"{steps} has no finished step {step}: there are {', '.join(map(str, finished))}.")
    return steps / str(finished[-1] if step is None else step)


def describe(directory: epath.Path) -> Iterator[str]:
    """The lines of `jaxcoder checkpoint inspect`. CheckpointError if the manifest is damaged."""
    manifest = read_manifest(directory)
    yield f"checkpoint   {directory}"
    yield f"step         {manifest.step:,}{_siblings(directory)}"
    yield f"written      {_when(manifest)} by {manifest.written_by}{_mesh(manifest)}"
    yield f"parameters   {num_parameters(manifest):,}"
    size = sum(info.size for info in manifest.files.values())
    yield f"on disk      {format_bytes(size)} in {len(manifest.files)} files"
    yield f"tokenizer    {'yes' if (directory / TOKENIZER).is_dir() else 'none'}"
    for key, value in manifest.metadata.items():
        yield f"{key.replace('_', ' '):<12} {value}"
    yield from _run(directory, manifest)
    yield ""
    yield from _table(rows(manifest)).splitlines()


def num_parameters(manifest: Manifest) -> int:
    """Parameters of the model; the tied head counts once."""
    return sum(math.prod(info.shape) for name, info in manifest.arrays.items() if name.startswith("params/"))


def rows(manifest: Manifest) -> list[Row]:
    """The arrays with layers folded together: `params/h/00..39/ln_1/scale`."""
    groups: dict[tuple[str, ArrayInfo], list[str]] = {}
    for name, info in manifest.arrays.items():
        layer = re.search(r"/h/(\d+)/", name)
        pattern = name if layer is None else name.replace(layer[0], "/h/{}/", 1)
        groups.setdefault((pattern, info), []).append("" if layer is None else layer[1])
    return [
        Row(pattern.replace("{}", layers[0] if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"), len(layers), info)
        for (pattern, info), layers in groups.items()
    ]


def _siblings(directory: epath.Path) -> str:
    others = [step for step in steps_in(directory.parent) if str(step) != directory.name]
    if not directory.name.isdecimal() or not others:
        return ""
    named = [f"{step:,}" if has_manifest(directory.parent / str(step)) else f"{step:,} (unfinished)" for step in others]
    return f"   (other steps: {', '.join(named)})"


def _when(manifest: Manifest) -> str:
    return datetime.fromisoformat(manifest.written_at).strftime("%Y-%m-%d %H:%M:%S UTC")


def _mesh(manifest: Manifest) -> str:
    return f" on mesh {', '.join(f'{axis}={size}' for axis, size in manifest.mesh.items())}" if manifest.mesh else ""


def _run(directory: epath.Path, manifest: Manifest) -> Iterator[str]:
    path = directory / CONFIG
    if not path.exists():
        model = to_dict(manifest.model)
    else:
        try:
            run = from_json(path.read_text(), source=str(path))
        except ConfigError as error:
            raise UnusableCheckpoint(directory, str(error).rstrip(".")) from error
        plain = to_dict(run)
        model = plain.pop("model")
        yield f"{'run':<12} {_fields({key: value for key, value in plain.items() if not isinstance(value, dict)})}"
        yield from (f"{section:<12} {_fields(plain[section])}" for section in plain if isinstance(plain[section], dict))
    yield f"{'model':<12} {_fields(model)}"


def _fields(values: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _table(table: list[Row]) -> str:
    lines: list[tuple[str, int, str, str, str]] = []
    shown = list(table)
    for prefix in ("optimizer/mu/", "optimizer/nu/"):
        moments = _under(prefix, table)
        if moments and _relative(prefix, moments) == _relative("params/", _under("params/", table)):
            shown = [row for row in shown if row not in moments]
            number, size = sum(row.num_arrays for row in moments), sum(map(_size, moments))
            lines.append((f"{prefix}*", number, "as params/", moments[0].info.dtype, format_bytes(size)))
    for row in shown:
        shape = "x".join(map(str, row.info.shape)) or "scalar"
        lines.append((row.name, row.num_arrays, shape, row.info.dtype, format_bytes(_size(row))))
    return format_table(("arrays", "number", "shape", "dtype", "size"), lines)


def _under(prefix: str, table: list[Row]) -> list[Row]:
    return [row for row in table if row.name.startswith(prefix)]


def _relative(prefix: str, table: list[Row]) -> set[tuple[str, ArrayInfo]]:
    return {(row.name.removeprefix(prefix), row.info) for row in table}


def _size(row: Row) -> int:
    itemsize = 2 if row.info.dtype == "bfloat16" else np.dtype(row.info.dtype).itemsize
    return row.num_arrays * math.prod(row.info.shape) * itemsize
