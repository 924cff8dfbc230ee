"""Searches the block sizes of jaxcoder's attention kernels, or of a baseline's, by estimated cycles.

    python -m benchmarks.attention.tune --device v6e --against            jaxcoder's kernels
    python -m benchmarks.attention.tune --device v6e --against splash

Coordinate descent from the best settings known: one setting after the other is tried at all its values and keeps the
best, until a round changes nothing. Every candidate is estimated at 4096 tokens in its own process; known estimates are
reused. Candidates are ranked by the cycles a head of one causal sequence of `--length` tokens: cycles estimated /
blocks visited x blocks visited at `--length`. A baseline's kernel, of one head, can be estimated at `--length` itself;
the best few are, because the overhead of a tile weighs less there.
"""

import argparse
import itertools
import sys
from dataclasses import replace

import numpy as np

from benchmarks import command
from benchmarks.attention.cases import (
    add_arguments,
    baseline_case,
    baseline_kernels,
    jaxcoder_case,
    kernels,
    open_cache,
)
from benchmarks.attention.cycles import Case, EstimateCache, estimate, implementation, versions
from benchmarks.attention.fit import describe_estimate, estimated_steps
from benchmarks.command import progress
from jaxcoder.benchmarks.measure import Report, Reports

__all__ = ["add_arguments", "run"]

ESTIMATED_LENGTH = 4096
FINALISTS = 2


def run(args: argparse.Namespace) -> Reports:
    return Reports(
        [
            search(args, name, part)
            for name in args.against or ["jaxcoder"]
            for kernel in kernels(args)
            for part in ([kernel] if name == "jaxcoder" else baseline_kernels(name, kernel))
        ]
    )


def search(args: argparse.Namespace, name: str, kernel: str) -> Report:
    cache, tried = open_cache(args), {}

    def cycles(case: Case) -> float:
        if case.settings not in tried:
            found = estimate(case, cache=cache)
            progress(f"[{len(tried) + 1}] {args.device} {name} {kernel} {_text(case)}: {describe_estimate(found)}")
            tried[case.settings] = {
                "settings": _text(case), "estimated": found.cycles, "cycles": extended(case, args.length, cache),
                "why": found.error if found.cycles is None else "",
            }  # fmt: skip
        return tried[case.settings]["cycles"] or float("inf")

    best = start(args, name, kernel)
    previous = None
    while best != previous:
        previous = best
        for field in implementation(name).choices(kernel):
            values = [case for case in values_of(best, field) if args.num_heads % case.heads == 0]
            best = min(values, key=cycles)
    rows = sorted(tried.items(), key=lambda item: item[1]["cycles"] or float("inf"))
    for settings, row in rows[:FINALISTS] if name != "jaxcoder" else []:
        found = estimate(replace(best, settings=settings, length=args.length), cache=cache)
        row["direct"] = found.cycles
        progress(f"{args.device} {name} {kernel} {row['settings']} at {args.length}: {describe_estimate(found)}")
    return Report(
        title=f"{args.device} {name} {kernel}: settings, best first, cycles a head of {args.length} causal tokens",
        columns={
            "settings": "settings", "estimated": f"cycles at {ESTIMATED_LENGTH}", "cycles": "cycles a head",
            "direct": "estimated at full length", "why": "",
        },
        rows=sorted((row for _, row in rows), key=lambda row: row.get("direct") or row["cycles"] or float("inf")),
        environment=versions(name),
    )  # fmt: skip


def start(args: argparse.Namespace, name: str, kernel: str) -> Case:
    """The best settings so far, at the estimated length, with a value for everything that can be chosen."""
    if name != "jaxcoder":
        return replace(baseline_case(args, name, kernel), length=ESTIMATED_LENGTH)
    case = replace(jaxcoder_case(args, kernel), length=ESTIMATED_LENGTH)
    blocks, given = implementation(name).blocks_of(case), dict(case.settings)
    table = {field: getattr(blocks, field) for field in implementation(name).choices(kernel)}
    return replace(case, settings=tuple(sorted((table | given).items())))


def values_of(case: Case, field: str) -> list[Case]:
    """The case, and after it those with another value of one setting; a jaxcoder case has one block of heads."""
    module, settings, found = implementation(case.implementation), dict(case.settings), [case]
    for value in module.choices(case.kernel)[field]:
        other = settings | {field: value}
        if value != settings[field] and module.allows(case.kernel, other):
            heads = other.get("heads", case.heads)
            found.append(replace(case, heads=heads, settings=tuple(sorted(other.items()))))
    return found


def candidates(case: Case) -> list[Case]:
    """All cases that a search could have tried."""
    module = implementation(case.implementation)
    tried = module.choices(case.kernel)
    some = [
        dict(case.settings) | dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())
    ]
    return [replace(case, settings=tuple(sorted(s.items()))) for s in some if module.allows(case.kernel, s)]


def extended(case: Case, length: int, cache: EstimateCache) -> float | None:
    """Cycles a head of a causal sequence of `length` tokens, by blocks visited; None where nothing was estimated."""
    found, module = cache.get(case), implementation(case.implementation)
    if found is None or found.cycles is None:
        return None
    sizes = (1.0,)
    if case.implementation == "jaxcoder":  # whole blocks and edge steps, in keys
        blocks = module.blocks_of(case)
        sizes = blocks.block_kv, blocks.edge_kv
    at_length = np.dot(module.steps(replace(case, length=length))[: len(sizes)], sizes)
    return found.cycles * at_length / np.dot(estimated_steps(case)[: len(sizes)], sizes) / case.heads


def _text(case: Case) -> str:
    return " ".join(f"{name.removeprefix('block_')} {value}" for name, value in case.settings)


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
