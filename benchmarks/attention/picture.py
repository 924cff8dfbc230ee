"""Draws the attention schedule of a packed batch, from the schedule that the kernel gets.

    python -m benchmarks.attention.picture docs/attention-schedule.png

One square a sequence: queries downwards, keys to the right. Full blocks and edge steps come from `schedule.visits`;
over them the triangles of the documents and, dashed, the tiles that tokamax's rule visits for this batch.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks import command
from benchmarks.attention import documents, tokamax
from benchmarks.attention.cycles import Case
from benchmarks.attention.flash_tpu import blocks_of, visits_of
from jaxcoder.benchmarks.measure import Report

LENGTH = 8192
ROWS = 2
STYLES = {
    "full": dict(facecolor="#74add1", edgecolor="white", linewidth=0.4, label="full blocks: no mask"),
    "edge": dict(facecolor="#fdae61", edgecolor="white", linewidth=0.4, label="edge steps: masked"),
    "tokamax": dict(facecolor="none", edgecolor="#c00", linestyle="--", label="tokamax's tiles, this batch"),
    "document": dict(facecolor="none", edgecolor="black", label="the mask"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="SVG or PNG to write")


def run(args: argparse.Namespace) -> Report:
    ids = documents.packed("log-normal, median 1000, sigma 1.2", ROWS, LENGTH, seed=3)
    visited = draw(ids, args.file)
    row = {"file": str(args.file), "sequences": ROWS, "length": LENGTH, "visited": f"{visited:.2f}"}
    columns = {
        "file": "file",
        "sequences": "sequences",
        "length": "length",
        "visited": "visited of the causal triangle",
    }
    return Report(title="Schedule of a packed batch", columns=columns, rows=[row])


def draw(ids: np.ndarray, file: Path) -> float:
    """Draws sequences of segment ids (B, S); returns the visited part of their causal triangles."""
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    length, area = ids.shape[1], 0
    case = Case(device="v5p", implementation="jaxcoder", kernel="forward", length=length, heads=16, batch=len(ids))
    figure = Figure(figsize=(5 * len(ids), 5.4), layout="constrained")
    for row, axes in enumerate(figure.subplots(1, len(ids), squeeze=False)[0]):
        polygons: dict[str, list] = {name: [] for name in STYLES}
        for kind, top, bottom, left, right in steps(case, ids, row):
            polygons[kind].append(_rectangle(top, bottom, left, right))
            area += (bottom - top) * (right - left)
        polygons["tokamax"] = [_rectangle(*tile) for tile in tokamax_tiles(ids)]
        polygons["document"] = [[(a, a), (a, b), (b, b)] for a, b in document_borders(ids[row])]
        for name, shapes in polygons.items():
            axes.add_collection(PolyCollection(shapes, **STYLES[name]))
        axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xticks=[], yticks=[], xlabel="keys")
    figure.axes[0].set_ylabel("queries")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False
    )
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return area / (len(ids) * length * (length + 1) / 2)


def _rectangle(top: int, bottom: int, left: int, right: int) -> list[tuple[int, int]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def steps(case: Case, ids: np.ndarray, row: int) -> list[tuple[str, int, int, int, int]]:
    """Every step of a sequence: (full or edge, first query, last + 1, first key, last + 1)."""
    blocks, todo = blocks_of(case), visits_of(case, ids)
    per_full, found = blocks.block_kv // blocks.edge_kv, []
    for span in range(todo.fulls.shape[1]):
        for block in range(todo.fulls.shape[2]):
            one = {name: int(getattr(todo, name)[row, span, block]) for name in todo._fields}
            queries, keys = (block * blocks.block_q, (block + 1) * blocks.block_q), span * blocks.span_kv
            for i in range(one["fulls"]):
                first = keys + (one["full"] + i) * blocks.block_kv
                found.append(("full", *queries, first, first + blocks.block_kv))
            for i in range(one["edges"]):
                skipped = one["fulls"] * per_full if i >= one["edges_before"] else 0
                first = keys + (one["edge"] + i + skipped) * blocks.edge_kv
                found.append(("edge", *queries, first, first + blocks.edge_kv))
    return found


def tokamax_tiles(ids: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The tiles that tokamax's rule visits, the same for every sequence of the batch."""
    settings = tokamax.SETTINGS["v5p"]["forward"]
    case = Case(
        device="v5p", implementation="tokamax", kernel="forward", length=ids.shape[1], heads=1,
        settings=tuple(settings.items()),
    )  # fmt: skip
    block_q, block_kv = settings["block_q"], settings["block_kv"]
    return [
        (i * block_q, (i + 1) * block_q, j * block_kv, (j + 1) * block_kv)
        for i, j in zip(*np.nonzero(tokamax.visited(case, ids)), strict=True)
    ]


def document_borders(ids: np.ndarray) -> list[tuple[int, int]]:
    """First token and last + 1 of every document of one sequence."""
    borders = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1, append=ids[-1] + 1))
    return list(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
