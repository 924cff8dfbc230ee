"""`jaxcoder bench attention --packed`: what documents save, in cycles, ours beside tokamax's and splash's.

Which blocks are visited is counted on drawn windows (attention_documents.py), each contestant by its own rule: ours by
its schedule, a sequence at a time; tokamax's by the intervals of ids of its tiles, one schedule for the batch; splash's
by the causal mask alone. The counts times the fitted costs are the cycles. A peer takes the settings, of all that
`--tune` has estimated, that suit these documents best.
"""

import argparse
import itertools
from dataclasses import replace

import numpy as np

from jaxcoder.benchmarks import attention, attention_documents
from jaxcoder.benchmarks.attention_cycles import Case, Memory, estimate, versions
from jaxcoder.benchmarks.attention_fit import Fit, NoEstimate, contestant, fit
from jaxcoder.benchmarks.attention_tune import WALKED, candidates
from jaxcoder.benchmarks.measure import Report, Reports

WINDOWS = 64
BATCHES = (1, 4, 16)
TARGETS = {1: 1.4, 16: 2.0}
"""Batch -> how many times our cycles tokamax's should be."""


def run(args: argparse.Namespace) -> Reports:
    drawn = {kind: attention_documents.packed(kind, WINDOWS, args.length) for kind in attention_documents.KINDS}
    return Reports(
        [_table(args, kernel, drawn) for kernel in ([args.kernel] if args.kernel else ["forward", "backward"])]
    )


def _table(args: argparse.Namespace, kernel: str, drawn: dict[str, np.ndarray]) -> Report:
    memory, rows, targets = attention.memory_of(args), [], {}
    ours = fit(attention.our_case(args, kernel), memory=memory, say=attention.say)
    for kind, ids in drawn.items():
        for batch in BATCHES:
            groups = ids.reshape(-1, batch, args.length)
            mine = _cycles(ours, groups)
            row = {"documents": kind, "batch": batch, "needed": attention.percent(needed(ids)), "ours": mine}
            for name in args.against:
                found = [_best(args, name, part, groups, memory) for part in attention.peer_kernels(name, kernel)]
                if all(found):
                    row[name] = sum(cycles for cycles, _ in found)
                    row[f"{name} blocks"] = ", ".join(blocks for _, blocks in found)
                    row[f"{name} ratio"] = row[name] / mine
            rows.append(row)
            if batch in TARGETS and "tokamax ratio" in row:
                ratio = row["tokamax ratio"]
                targets[f"{kind}, batch {batch}: {TARGETS[batch]} times (it is {ratio:.2f})"] = ratio >= TARGETS[batch]
    columns = {"documents": "documents", "batch": "batch", "needed": "needed of the triangle", "ours": "ours"}
    for name in args.against:
        columns |= {name: name, f"{name} blocks": "its blocks", f"{name} ratio": "x ours"}
    return Report(
        title=f"{args.device} {kernel}: packed documents, {args.length} tokens, cycles a head and sequence",
        settings={"windows": WINDOWS, "ours fitted with residual": attention.percent(ours.residual)},
        columns=columns,
        rows=rows,
        targets=targets,
        environment=versions("tokamax" if "tokamax" in args.against else "ours"),
    )


def needed(ids: np.ndarray) -> float:
    """Entries of the mask that are seen, (N, S) ids, over those of the causal triangle."""
    length = ids.shape[1]
    sizes = np.concatenate([np.bincount(row) for row in ids])
    return float((sizes * (sizes + 1)).sum() / (len(ids) * length * (length + 1)))


def _cycles(of: Fit, groups: np.ndarray) -> float:
    """Cycles a head and sequence, over batches (N, B, S) of ids."""
    module = contestant(of.case.contestant)
    case = replace(of.case, length=groups.shape[2])
    total = sum(of.cycles(module.steps(replace(case, batch=groups.shape[1]), ids)) for ids in groups)
    return total / of.case.heads / (groups.shape[0] * groups.shape[1])


def _best(args, name: str, kernel: str, groups: np.ndarray, memory: Memory) -> tuple[float, str] | None:
    """Cycles and block sizes of a peer's kernel at the settings that suit these batches best."""
    costs = {case: cost * _tiles(case, groups) for case, cost in _costs(args, name, kernel, memory).items()}
    # By the cost of a tile alone; the two cheapest are then fitted, and of these the better one is taken.
    fitted = []
    for case in sorted(costs, key=costs.get)[:2]:
        try:
            of = fit(case, memory=memory, say=attention.say)
        except NoEstimate as error:
            attention.say(f"  {name} {kernel}: {error}")
            continue
        fitted.append((_cycles(of, groups), attention.blocks_text(case)))
    return min(fitted, default=None)


def _costs(args, name: str, kernel: str, memory: Memory) -> dict[Case, float]:
    """Cycles a tile of all settings that have been estimated; small tiles, which suit documents, are seen to here."""
    module, best = contestant(name), attention.peer_case(args, name, kernel)
    count = module.full_steps if name == "tokamax" else module.steps
    estimate(replace(best, length=WALKED), memory=memory)
    if name == "tokamax":
        for block_q, block_kv in itertools.product((512, 1024), repeat=2):
            compute = min(best.option("block_kv_compute"), block_kv)
            changes = {"block_q": block_q, "block_kv": block_kv, "block_kv_compute": compute}
            settings = tuple(sorted((dict(best.settings) | changes).items()))
            estimate(replace(best, settings=settings, length=WALKED), memory=memory)
    found = {}
    for case in {best, *candidates(best)}:
        known = memory.get(replace(case, length=WALKED))
        if known is not None and known.cycles is not None:
            found[case] = known.cycles / count(replace(case, length=WALKED))[0]
    return found


def _tiles(case: Case, groups: np.ndarray) -> float:
    module = contestant(case.contestant)
    return sum(module.steps(replace(case, length=groups.shape[2], batch=groups.shape[1]), ids)[0] for ids in groups)
