"""Sources of raw code: directory trees, walked in sorted order, without following links to directories.

The default source is the running interpreter: its standard library and installed packages.
"""

import os
import site
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxcoder.errors import DataError
from jaxcoder.formatting import format_bytes

LARGEST_FILE = 4 << 20
"""Bytes. Larger files, mostly tables and generated code, are skipped to bound memory; not a filter of the original."""

SKIPPED_DIRECTORIES = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
"""Skipped, like hidden directories and package metadata. Installed packages in a tree are a separate source."""


@dataclass(frozen=True)
class Source:
    """A directory tree. label: the first part of its documents' repo_name.

    is_package_root: its entries are importable packages (False for a user's tree, whose levels are unknown).
    """

    root: Path
    label: str
    is_package_root: bool = False


@dataclass(frozen=True)
class SourceFile:
    """A file and its path relative to the source, with `/`."""

    file: str
    source: Source
    path: str


def interpreter_sources() -> list[Source]:
    """The standard library and the directories of installed packages of the running interpreter."""
    paths = sysconfig.get_paths()
    installed = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    sources = [Source(Path(paths["stdlib"]), "stdlib", is_package_root=True)]
    seen = {os.path.realpath(paths["stdlib"])}
    for directory in installed:
        if os.path.isdir(directory) and os.path.realpath(directory) not in seen:
            seen.add(os.path.realpath(directory))
            label = "site-packages" if len(sources) == 1 else f"site-packages-{len(sources)}"
            sources.append(Source(Path(directory), label, is_package_root=True))
    return sources


def directory_sources(directories: Sequence[str | Path]) -> list[Source]:
    """Sources for a user's directories. Raises DataError if one does not exist or is not a directory."""
    sources: list[Source] = []
    for directory in map(Path, directories):
        if not directory.exists():
            raise DataError(f"The source directory {directory} does not exist: check the spelling.")
        if not directory.is_dir():
            raise DataError(f"The source {directory} is a file: give the directory that contains the code.")
        root = directory.resolve()
        if any(root == other.root or other.root in root.parents for other in sources):
            continue  # part of an earlier source
        label = root.name or "root"
        if any(other.label == label for other in sources):
            label = f"{label}-{len(sources) + 1}"
        sources.append(Source(root, label))
    return sources


def walk(source: Source, skipped: Counter[str]) -> Iterator[SourceFile]:
    """Every regular file of a source, in sorted order. Entries that cannot be read or followed are counted in
    `skipped`."""
    pending = [source.root]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(directory) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            skipped["unreadable directory"] += 1
            continue
        below = []
        for entry in entries:
            kind = _kind(entry)
            if kind == "directory":
                if not _is_skipped(entry.name):
                    below.append(Path(entry.path))
            elif kind == "file":
                yield SourceFile(entry.path, source, os.path.relpath(entry.path, source.root).replace(os.sep, "/"))
            else:
                skipped[kind] += 1
        pending += reversed(below)


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name in SKIPPED_DIRECTORIES or name.endswith((".dist-info", ".egg-info"))


def _kind(entry: os.DirEntry) -> str:
    """ "file", "directory", or the reason to skip the entry."""
    try:
        if entry.is_dir(follow_symlinks=False):
            return "directory"
        mode = entry.stat().st_mode
    except OSError:
        return "broken link"
    if stat.S_ISDIR(mode):
        return "link to a directory"  # following it could loop, or leave the tree
    return "file" if stat.S_ISREG(mode) else "not a regular file"


def read_source(file: str) -> tuple[str, str | None]:
    """The text of a file with unchanged line ends, or ("", reason) if it is not readable text."""
    try:
        with open(file, "rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except OSError:
        return "", "unreadable file"
    if len(content) > LARGEST_FILE:
        return "", f"larger than {format_bytes(LARGEST_FILE)}"
    if b"\0" in content:
        return "", "binary"
    try:
        return content.decode("utf-8"), None
    except UnicodeDecodeError:
        return "", "not UTF-8"
