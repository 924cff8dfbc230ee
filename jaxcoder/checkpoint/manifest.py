"""The directory of one checkpoint, and the manifest that makes it complete.

    <step>/state/            the arrays, written by Orbax under flat names (names.py)
    <step>/tokenizer/        the tokenizer's files, so that inference needs this directory only
    <step>/config.json       the run's resolved config (absent after a conversion)
    <step>/manifest.json     written last: the contents, with size and CRC-32 of every other file

Orbax's commit marker shows that the arrays were written, not that their bytes are unchanged: Orbax restores a flipped
bit without an error. A checkpoint is complete when its manifest exists and matches its files. Object stores cannot
rename a directory; writing one small file last works there too.
This module does not import jax, so that a checkpoint can be inspected quickly and without its devices.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from etils import epath

import jaxcoder
from jaxcoder.config import ModelConfig
from jaxcoder.config.serialize import from_json, to_json
from jaxcoder.errors import CheckpointError, ConfigError

MANIFEST, CONFIG, TOKENIZER, STATE = "manifest.json", "config.json", "tokenizer", "state"
COMMIT_MARKER = f"{STATE}/commit_success.txt"
FORMAT = "jaxcoder checkpoint"
VERSION = 1

_BLOCK = 4 * 2**20


class UnusableCheckpoint(CheckpointError):
    """A checkpoint that exists and cannot be read; `damage` is the reason."""

    def __init__(self, directory: epath.PathLike, damage: str):
        super().__init__(f"the checkpoint {directory} cannot be used: {damage}; use another one.")
        self.damage = damage


@dataclass(frozen=True)
class ArrayInfo:
    """Shape and dtype name of an array on disk."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and CRC-32 (8 hexadecimal digits) of a file."""

    size: int
    crc32: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents and origin of a checkpoint."""

    step: int
    model: ModelConfig
    arrays: Mapping[str, ArrayInfo]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON from the writer: samples consumed, tokenizer fingerprint, source of a conversion, ..."""
    mesh: Mapping[str, int] = field(default_factory=dict)
    """Axis sizes of the mesh it was saved on; empty after a conversion."""
    files: Mapping[str, FileInfo] = field(default_factory=dict)
    """Every file except the manifest, by its path relative to the directory."""
    written_at: str = ""
    written_by: str = ""


def write_manifest(directory: epath.Path, manifest: Manifest) -> None:
    """Writes the manifest with all files of `directory`; from then on the checkpoint is complete."""
    relative = [str(file.relative_to(directory)) for file in _files(directory)]
    with ThreadPoolExecutor() as pool:
        files = dict(zip(relative, pool.map(lambda name: _measure(directory / name), relative), strict=True))
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "written_by": f"jaxcoder {jaxcoder.__version__}",
        "mesh": dict(manifest.mesh),
        "model": json.loads(to_json(manifest.model)),
        "metadata": dict(manifest.metadata),
        "arrays": {name: asdict(info) for name, info in manifest.arrays.items()},
        "files": {name: asdict(info) for name, info in files.items()},
    }
    text = json.dumps(body | {"crc32": _fingerprint(body)}, indent=1)
    temporary = directory / f".{MANIFEST}.writing"
    temporary.write_text(text + "\n")
    temporary.replace(directory / MANIFEST)


def has_manifest(directory: epath.PathLike) -> bool:
    """Whether the save of this checkpoint has finished."""
    return (epath.Path(directory) / MANIFEST).exists()


def read_manifest(directory: epath.PathLike) -> Manifest:
    """The manifest of a checkpoint; UnusableCheckpoint if it is missing, damaged or of another format."""
    path = epath.Path(directory) / MANIFEST
    try:
        body = json.loads(path.read_text())
        recorded = body.pop("crc32")
        is_sound = body["format"] == FORMAT and recorded == _fingerprint(body)
    except FileNotFoundError:
        raise UnusableCheckpoint(directory, f"it has no {MANIFEST}, so its save was not finished") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise UnusableCheckpoint(directory, f"its {MANIFEST} is damaged or was not written by jaxcoder")
    if body["version"] != VERSION:
        raise UnusableCheckpoint(directory, f"it has format {body['version']} and this jaxcoder reads format {VERSION}")
    try:
        model = from_json(json.dumps(body["model"]), ModelConfig, source="its model")
    except ConfigError as error:
        raise UnusableCheckpoint(directory, str(error).rstrip(".")) from error
    return Manifest(
        step=body["step"],
        model=model,
        arrays={name: ArrayInfo(tuple(info["shape"]), info["dtype"]) for name, info in body["arrays"].items()},
        metadata=body["metadata"],
        mesh=body["mesh"],
        files={name: FileInfo(**info) for name, info in body["files"].items()},
        written_at=body["written_at"],
        written_by=body["written_by"],
    )


def find_damage(
    directory: epath.PathLike,
    manifest: Manifest,
    *,
    by_size: bool = False,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> str | None:
    """A message about the first file that is missing or altered; None if all files are as written.

    Reads every byte once (CRC-32 runs at several GB/s); with by_size it compares sizes only. `progress` is called with
    the size of each file that has been read.
    """
    directory = epath.Path(directory)
    if not (directory / COMMIT_MARKER).exists():
        return f"Orbax's commit marker {COMMIT_MARKER} is missing"
    for name, info in manifest.files.items():
        path = directory / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().length != info.size:
            return f"{name} has {path.stat().length:,} bytes and was written with {info.size:,}"
    if by_size:
        return None
    with ThreadPoolExecutor() as pool:
        measured = pool.map(lambda name: _measure(directory / name), manifest.files)
        for (name, info), found in zip(manifest.files.items(), measured, strict=True):
            if found != info:
                return f"{name} was altered: its checksum is {found.crc32} and was {info.crc32}"
            progress(info.size)
    return None


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _files(path)
        elif path.parent != directory or MANIFEST not in path.name:
            yield path


def _measure(path: epath.Path) -> FileInfo:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return FileInfo(size, f"{crc:08x}")


def _fingerprint(body: Mapping[str, Any]) -> str:
    """CRC-32 of the manifest's own content."""
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
