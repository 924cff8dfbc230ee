"""The saving from document masks in cycles: jaxcoder's kernels next to tokamax's and splash's on packed documents.

    python -m benchmarks.attention.packed --device v6e

Visited blocks are counted on drawn windows (documents.py), each implementation by its own rule: jaxcoder's by its
schedule, one sequence at a time; tokamax's by the intervals of ids of its tiles, one schedule for the batch; splash's
by the causal mask alone. Counts times fitted costs are the cycles. A baseline gets the settings, of all that tune.py
has estimated, that are best for these documents.
"""

import argparse
import itertools
import sys
from dataclasses import replace

import numpy as np

from benchmarks import command
from benchmarks.attention import documents
from benchmarks.attention.cases import (
    add_arguments,
    baseline_case,
    baseline_kernels,
    blocks_text,
    jaxcoder_case,
    kernels,
    open_cache,
    percent,
)
from benchmarks.attention.cycles import Case, EstimateCache, estimate, implementation, versions
from benchmarks.attention.fit import Fit, NoEstimate, estimated_steps, fit
from benchmarks.attention.tune import ESTIMATED_LENGTH, candidates
from benchmarks.command import progress
from jaxcoder.benchmarks.measure import Report, Reports

__all__ = ["add_arguments", "run"]

WINDOWS = 64
BATCHES = (1, 4, 16)
TARGETS = {1: 1.4, 16: 2.0}
"""Batch -> the speed-up over tokamax that is aimed at."""


def run(args: argparse.Namespace) -> Reports:
    drawn = {kind: documents.packed(kind, WINDOWS, args.length) for kind in documents.KINDS}
    return Reports([_table(args, kernel, drawn) for kernel in kernels(args)])


def _table(args: argparse.Namespace, kernel: str, drawn: dict[str, np.ndarray]) -> Report:
    cache, rows, targets = open_cache(args), [], {}
    fitted = fit(jaxcoder_case(args, kernel), cache=cache)
    for kind, ids in drawn.items():
        for batch in BATCHES:
            groups = ids.reshape(-1, batch, args.length)
            own = _cycles(fitted, groups)
            row = {"documents": kind, "batch": batch, "needed": percent(needed(ids)), "jaxcoder": own}
            for name in args.against:
                found = [_best(args, name, part, groups, cache) for part in baseline_kernels(name, kernel)]
                if all(found):
                    row[name] = sum(cycles for cycles, _ in found)
                    row[f"{name} blocks"] = ", ".join(blocks for _, blocks in found)
                    row[f"{name} ratio"] = row[name] / own
            rows.append(row)
            if batch in TARGETS and "tokamax ratio" in row:
                ratio = row["tokamax ratio"]
                targets[f"{kind}, batch {batch}: {TARGETS[batch]} times (measured {ratio:.2f})"] = (
                    ratio >= TARGETS[batch]
                )
    columns = {"documents": "documents", "batch": "batch", "needed": "needed of the triangle", "jaxcoder": "jaxcoder"}
    for name in args.against:
        columns |= {name: name, f"{name} blocks": "its blocks", f"{name} ratio": "x jaxcoder"}
    return Report(
        title=f"{args.device} {kernel}: packed documents, {args.length} tokens, cycles a head and sequence",
        settings={"windows": WINDOWS, "residual of the jaxcoder fit": percent(fitted.residual)},
        columns=columns,
        rows=rows,
        targets=targets,
        environment=versions("tokamax" if "tokamax" in args.against else "jaxcoder"),
    )


def needed(ids: np.ndarray) -> float:
    """Entries of the mask that are seen, (N, S) ids, over those of the causal triangle."""
    length = ids.shape[1]
    sizes = np.concatenate([np.bincount(row) for row in ids])
    return float((sizes * (sizes + 1)).sum() / (len(ids) * length * (length + 1)))


def _cycles(of: Fit, groups: np.ndarray) -> float:
    """Cycles a head and sequence, over batches (N, B, S) of ids."""
    module = implementation(of.case.implementation)
    case = replace(of.case, length=groups.shape[2])
    total = sum(of.cycles(module.steps(replace(case, batch=groups.shape[1]), ids)) for ids in groups)
    return total / of.case.heads / (groups.shape[0] * groups.shape[1])


def _best(args, name: str, kernel: str, groups: np.ndarray, cache: EstimateCache) -> tuple[float, str] | None:
    """Cycles and block sizes of a baseline's kernel at its best settings for these batches."""
    costs = {case: cost * _tiles(case, groups) for case, cost in _costs(args, name, kernel, cache).items()}
    # By the cost of a tile alone; the two cheapest are then fitted, and of these the better one is taken.
    fitted = []
    for case in sorted(costs, key=costs.get)[:2]:
        try:
            of = fit(case, cache=cache)
        except NoEstimate as error:
            progress(f"  {name} {kernel}: {error}")
            continue
        fitted.append((_cycles(of, groups), blocks_text(case)))
    return min(fitted, default=None)


def _costs(args, name: str, kernel: str, cache: EstimateCache) -> dict[Case, float]:
    """Cycles a tile of all settings that have been estimated; small tiles, good for documents, are estimated here."""
    best = baseline_case(args, name, kernel)
    estimate(replace(best, length=ESTIMATED_LENGTH), cache=cache)
    if name == "tokamax":
        for block_q, block_kv in itertools.product((512, 1024), repeat=2):
            compute = min(best.option("block_kv_compute"), block_kv)
            changes = {"block_q": block_q, "block_kv": block_kv, "block_kv_compute": compute}
            settings = tuple(sorted((dict(best.settings) | changes).items()))
            estimate(replace(best, settings=settings, length=ESTIMATED_LENGTH), cache=cache)
    found = {}
    for case in {best, *candidates(best)}:
        known = cache.get(replace(case, length=ESTIMATED_LENGTH))
        if known is not None and known.cycles is not None:
            found[case] = known.cycles / estimated_steps(replace(case, length=ESTIMATED_LENGTH))[0]
    return found


def _tiles(case: Case, groups: np.ndarray) -> float:
    module = implementation(case.implementation)
    return sum(module.steps(replace(case, length=groups.shape[2], batch=groups.shape[1]), ids)[0] for ids in groups)


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
