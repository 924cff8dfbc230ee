"""The collectives of a compiled program, read from its text: for tests that count them."""

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


class Collective(NamedTuple):
    """kind; axes of the mesh along which the devices of a group differ; elements of the largest result; the loop
    that it is in, by the name of its body ("" outside)."""

    kind: str
    axes: tuple[str, ...]
    size: int
    loop: str


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """Those between several devices, in the order of the program. mesh: axis -> size."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = header[1]
        operation = re.match(rf"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if operation and (axes := _axes(line, mesh)):
            shapes = re.findall(r"\[([\d,]*)\]", operation[1])
            size = max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
            found.append(Collective(operation[2], axes, size, computation if computation in bodies else ""))
    return found


def _axes(line: str, mesh: dict[str, int]) -> tuple[str, ...]:
    coordinates = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())))
    differ = np.zeros(len(mesh), bool)
    for group in _groups(line, coordinates.shape[1]):
        differ |= (coordinates[:, group] != coordinates[:, group[:1]]).any(1)
    return tuple(axis for axis, is_used in zip(mesh, differ) if is_used)


def _groups(line: str, num_devices: int) -> list[list[int]]:
    """Three notations: mesh axes by name, a reshaped and transposed iota, and plain lists."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        used = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[2])]
        ids = np.moveaxis(np.arange(num_devices).reshape(tuple(sizes.values())), used, range(len(used)))
        return ids.reshape(math.prod(ids.shape[: len(used)]), -1).T.tolist()
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, start, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        ids = np.arange(num_devices).reshape(start)
        return (ids if order is None else ids.transpose(order)).reshape(shape).tolist()
    lists = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", lists[1])] if lists else []
