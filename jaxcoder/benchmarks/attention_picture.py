"""`jaxcoder bench attention --picture FILE`: the schedule of a packed batch as an SVG, drawn from the schedule itself.

One square a sequence: queries downwards, keys to the right. Whole blocks and edge steps are those of `schedule.visits`,
the triangles of the documents over them, and the outlines of the tiles that tokamax's rule visits for this batch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxcoder.benchmarks import attention_documents, attention_tokamax
from jaxcoder.benchmarks.attention_cycles import Case

LENGTH = 8192
SIDE = 400
"""Pixels of a square."""
ROWS = 2
_SQUARE = f'width="{SIDE}" height="{SIDE}"'
_STYLE = (
    ".frame{fill:#fff;stroke:#999}.whole{fill:#74add1;stroke:#fff;stroke-width:.5}"
    ".edge{fill:#fdae61;stroke:#fff;stroke-width:.5}.tokamax{fill:none;stroke:#c00;stroke-dasharray:4 3}"
    ".document{fill:none;stroke:#222}text{font:13px sans-serif}"
)


@dataclass(frozen=True)
class Picture:
    """What `--picture` reports."""

    file: Path
    sentence: str
    exit_code: int = 0

    def text(self) -> str:
        return f"{self.sentence}\nWrote {self.file}"

    def write(self, path: Path) -> None:
        path.write_text(self.file.read_text(encoding="utf-8"), encoding="utf-8")


def run(file: Path) -> Picture:
    ids = attention_documents.packed("log-normal, median 1000, sigma 1.2", ROWS, LENGTH, seed=3)
    drawn, visited = draw(ids)
    file.write_text(drawn, encoding="utf-8")
    return Picture(file, f"{ROWS} sequences of {LENGTH}: {visited:.2f} of the causal triangle is visited.")


def draw(ids: np.ndarray) -> tuple[str, float]:
    """The SVG of sequences of segment ids (B, S), and the visited part of their causal triangles."""
    case = Case(device="v5p", contestant="ours", kernel="forward", length=ids.shape[1], heads=16, batch=len(ids))
    shapes, area = [], 0
    for row, one in enumerate(ids):
        paths: dict[str, list[str]] = {"whole": [], "edge": [], "tokamax": [], "document": []}
        for kind, top, bottom, left, right in steps(case, ids, row):
            paths[kind].append(_rectangle(top, bottom, left, right, ids.shape[1]))
            area += (bottom - top) * (right - left)
        paths["tokamax"] = [_rectangle(*tile, ids.shape[1]) for tile in tokamax_tiles(ids)]
        paths["document"] = [_triangle(first, end, ids.shape[1]) for first, end in documents(one)]
        shapes.append(f'<g transform="translate({row * (SIDE + 20)},0)"><rect class="frame" {_SQUARE}/>')
        shapes += [f'<path class="{kind}" d="{"".join(parts)}"/>' for kind, parts in paths.items()]
        shapes.append("</g>")
    width = len(ids) * (SIDE + 20) - 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 {width + 2} {SIDE + 30}"><style>{_STYLE}</style>'
        + "".join(shapes)
        + _legend()
        + "</svg>\n"
    ), area / (len(ids) * ids.shape[1] * (ids.shape[1] + 1) / 2)


def steps(case: Case, ids: np.ndarray, row: int) -> list[tuple[str, int, int, int, int]]:
    """Every step of a sequence: (whole or edge, first query, last + 1, first key, last + 1)."""
    from jaxcoder.benchmarks.attention_ours import blocks_of, visits_of

    blocks, todo = blocks_of(case), visits_of(case, ids)
    per_full, found = blocks.block_kv // blocks.edge_kv, []
    for span in range(todo.fulls.shape[1]):
        for block in range(todo.fulls.shape[2]):
            one = {name: int(getattr(todo, name)[row, span, block]) for name in todo._fields}
            queries, keys = (block * blocks.block_q, (block + 1) * blocks.block_q), span * blocks.span_kv
            for i in range(one["fulls"]):
                first = keys + (one["full"] + i) * blocks.block_kv
                found.append(("whole", *queries, first, first + blocks.block_kv))
            for i in range(one["edges"]):
                skipped = one["fulls"] * per_full if i >= one["edges_before"] else 0
                first = keys + (one["edge"] + i + skipped) * blocks.edge_kv
                found.append(("edge", *queries, first, first + blocks.edge_kv))
    return found


def tokamax_tiles(ids: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The tiles that tokamax's rule visits, the same for every sequence of the batch."""
    settings = attention_tokamax.SETTINGS["v5p"]["forward"]
    case = Case(
        device="v5p", contestant="tokamax", kernel="forward", length=ids.shape[1], heads=1,
        settings=tuple(settings.items()),
    )  # fmt: skip
    block_q, block_kv = settings["block_q"], settings["block_kv"]
    return [
        (i * block_q, (i + 1) * block_q, j * block_kv, (j + 1) * block_kv)
        for i, j in zip(*np.nonzero(attention_tokamax.visited(case, ids)), strict=True)
    ]


def documents(ids: np.ndarray) -> list[tuple[int, int]]:
    """First token and last + 1 of every document of one sequence."""
    borders = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1, append=ids[-1] + 1))
    return list(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True))


def _rectangle(top: int, bottom: int, left: int, right: int, length: int) -> str:
    x, y, width, height = (f"{SIDE * n / length:g}" for n in (left, top, right - left, bottom - top))
    return f"M{x} {y}h{width}v{height}h-{width}z"


def _triangle(first: int, end: int, length: int) -> str:
    a, b = (f"{SIDE * n / length:g}" for n in (first, end))
    return f"M{a} {a}V{b}H{b}z"


def _legend() -> str:
    said = (
        ["whole", "whole blocks: no mask"],
        ["edge", "edge steps: masked"],
        ["tokamax", "tokamax's tiles, this batch"],
    )
    found, left = [], 0
    for kind, text in said:
        found.append(f'<rect class="{kind}" x="{left}" y="{SIDE + 10}" width="14" height="14"/>')
        found.append(f'<text x="{left + 20}" y="{SIDE + 22}">{text}</text>')
        left += 40 + 8 * len(text)
    return "".join([*found, f'<text x="{left}" y="{SIDE + 22}">black: what the mask lets through</text>'])
