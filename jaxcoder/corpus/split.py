"""Chooses the held-out documents: complete top-level packages, so that training has no file of them.

Packages that share a file (for example vendored copies) are linked, and linked packages are on the same side. If all
packages are linked, single packages are held out, and a text on both sides is used for training only, so that held-out
loss is measured on unseen text.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KeptFile:
    """A file that passed the filters. `digest` identifies its text, `size` is in bytes."""

    file: str
    repo_name: str
    """Source and package, the unit that is held out."""
    path: str
    lang: str
    digest: bytes
    size: int


def packages_of(sizes: Mapping[str, int], *, is_package_root: bool) -> dict[str, str]:
    """The top-level package of every path of a source (path -> bytes): a directory, or a module without its suffix.

    In a package root it is the first component. A user's tree may have its packages in a subdirectory
    (`src/project/...`): there the entries of a directory with over 90 % of all bytes count as the packages.
    """
    packages: dict[str, str] = {}
    limit = 0.9 * sum(sizes.values())

    def assign(paths: Iterable[str], prefix: str) -> None:
        entries = defaultdict(list)
        for path in paths:
            entries[path.removeprefix(prefix).partition("/")[0]].append(path)
        for entry, inside in entries.items():
            if inside == [prefix + entry]:
                packages[inside[0]] = prefix + (entry.partition(".")[0] or entry)
            elif not is_package_root and sum(sizes[path] for path in inside) > limit:
                assign(inside, f"{prefix}{entry}/")
            else:
                packages.update(dict.fromkeys(inside, prefix + entry))

    assign(sizes, "")
    return packages


def choose_held_out(files: Sequence[KeptFile], fraction: float, seed: int) -> frozenset[str]:
    """repo_names to hold out: at most `fraction` of the bytes if possible, at least one, never all.

    Packages are tried in the order of a hash of (seed, name), so that a new package changes little. Empty if `fraction`
    is 0, or for a single package.
    """
    if fraction <= 0:
        return frozenset()
    groups = linked_packages(files)
    if len(groups) == 1 and len(groups[0]) > 1:
        files = _in_one_package_only(files)
        groups = [(name,) for name in sorted({file.repo_name for file in files})]
    elif len(groups) < 2:
        return frozenset()
    weight = dict.fromkeys(groups, 0)
    group_of = {name: group for group in groups for name in group}
    for file in files:
        weight[group_of[file.repo_name]] += file.size
    budget = fraction * sum(weight.values())
    held_out: list[str] = []
    for group in sorted(groups, key=lambda group: keyed_hash(seed, group[0])):
        if weight[group] <= budget:
            budget -= weight[group]
            held_out += group
    if not held_out and groups:
        lightest = min(groups, key=lambda group: weight[group])
        held_out += lightest
    return frozenset(held_out)


def _in_one_package_only(files: Sequence[KeptFile]) -> list[KeptFile]:
    packages = defaultdict(set)
    for file in files:
        packages[file.digest].add(file.repo_name)
    return [file for file in files if len(packages[file.digest]) == 1]


def linked_packages(files: Sequence[KeptFile]) -> list[tuple[str, ...]]:
    """Groups of repo_names such that no text is in two groups; names are sorted, groups by their first name."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    owner: dict[bytes, str] = {}
    for file in files:
        leader.setdefault(file.repo_name, file.repo_name)
        first, second = sorted((find(file.repo_name), find(owner.setdefault(file.digest, file.repo_name))))
        leader[second] = first
    groups = defaultdict(list)
    for name in sorted(leader):
        groups[find(name)].append(name)
    return sorted(tuple(group) for group in groups.values())


def without_copies(files: Sequence[KeptFile], held_out: frozenset[str]) -> list[KeptFile]:
    """One file per text, sorted by (repo_name, path); a text on both sides is used for training."""
    chosen: dict[bytes, KeptFile] = {}
    for file in sorted(files, key=lambda file: (file.repo_name in held_out, file.repo_name, file.path)):
        chosen.setdefault(file.digest, file)
    return sorted(chosen.values(), key=lambda file: (file.repo_name, file.path))


def keyed_hash(seed: int, name: str) -> bytes:
    """A hash for a random order of names that is the same on every machine."""
    return hashlib.blake2b(f"{seed} {name}".encode(errors="surrogateescape"), digest_size=16).digest()
