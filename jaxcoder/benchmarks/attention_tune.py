"""`jaxcoder bench attention --tune`: search the block sizes of ours, or of a peer's kernels, by estimated cycles.

From the settings that are known as the best so far, one setting after the other is given all its values and keeps the
best of them, until a whole round changes nothing. Every candidate is estimated at 4096 tokens, in a process of its own;
what is known is not estimated again. Candidates are ranked by the cycles a head of one causal sequence of `--length`
tokens: cycles walked / blocks walked x blocks visited. A peer's kernel, of one head, can be walked at `--length`
itself, so the best few are, for what a tile costs besides weighs less there. The table of ratios then fits the best.
"""

import argparse
import itertools
from dataclasses import replace

from jaxcoder.benchmarks import attention
from jaxcoder.benchmarks.attention_cycles import Case, Memory, estimate, versions
from jaxcoder.benchmarks.attention_fit import contestant, told
from jaxcoder.benchmarks.measure import Report, Reports

WALKED = 4096
FINALISTS = 2


def run(args: argparse.Namespace) -> Reports:
    kernels = [args.kernel] if args.kernel else ["forward", "backward"]
    names = args.against or ["ours"]
    return Reports(
        [
            search(args, name, part)
            for name in names
            for kernel in kernels
            for part in ([kernel] if name == "ours" else attention.peer_kernels(name, kernel))
        ]
    )


def search(args: argparse.Namespace, name: str, kernel: str) -> Report:
    memory, tried = attention.memory_of(args), {}

    def cycles(case: Case) -> float:
        if case.settings not in tried:
            found = estimate(case, memory=memory)
            attention.say(f"[{len(tried) + 1}] {args.device} {name} {kernel} {_text(case)}: {told(found)}")
            tried[case.settings] = {
                "settings": _text(case), "walked": found.cycles, "cycles": extended(case, args.length, memory),
                "why": found.error if found.cycles is None else "",
            }  # fmt: skip
        return tried[case.settings]["cycles"] or float("inf")

    best = start(args, name, kernel)
    previous = None
    while best != previous:
        previous = best
        for field in contestant(name).choices(kernel):
            values = [case for case in values_of(best, field) if args.num_heads % case.heads == 0]
            best = min(values, key=cycles)
    rows = sorted(tried.items(), key=lambda item: item[1]["cycles"] or float("inf"))
    for settings, row in rows[:FINALISTS] if name != "ours" else []:
        found = estimate(replace(best, settings=settings, length=args.length), memory=memory)
        row["direct"] = found.cycles
        attention.say(f"{args.device} {name} {kernel} {row['settings']} at {args.length}: {told(found)}")
    return Report(
        title=f"{args.device} {name} {kernel}: settings, best first, cycles a head of {args.length} causal tokens",
        settings={"walked": WALKED},
        columns={
            "settings": "settings", "walked": f"cycles at {WALKED}", "cycles": "cycles a head",
            "direct": "walked whole", "why": "",
        },
        rows=sorted((row for _, row in rows), key=lambda row: row.get("direct") or row["cycles"] or float("inf")),
        targets={},
        environment=versions(name),
    )  # fmt: skip


def start(args: argparse.Namespace, name: str, kernel: str) -> Case:
    """The best settings so far, at the length that is walked, with a value for everything that can be chosen."""
    if name != "ours":
        return replace(attention.peer_case(args, name, kernel), length=WALKED)
    case = replace(attention.our_case(args, kernel), length=WALKED)
    blocks, given = contestant(name).blocks_of(case), dict(case.settings)
    table = {field: getattr(blocks, field) for field in contestant(name).choices(kernel)}
    return replace(case, settings=tuple(sorted((table | given).items())))


def values_of(case: Case, field: str) -> list[Case]:
    """The case, and after it those with another value of one setting; a case of ours has one block of heads."""
    module, settings, found = contestant(case.contestant), dict(case.settings), [case]
    for value in module.choices(case.kernel)[field]:
        other = settings | {field: value}
        if value != settings[field] and module.allows(case.kernel, other):
            heads = other.get("heads", case.heads)
            found.append(replace(case, heads=heads, settings=tuple(sorted(other.items()))))
    return found


def candidates(case: Case) -> list[Case]:
    """All cases that a search could have tried."""
    module = contestant(case.contestant)
    tried = module.choices(case.kernel)
    some = [
        dict(case.settings) | dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())
    ]
    return [replace(case, settings=tuple(sorted(s.items()))) for s in some if module.allows(case.kernel, s)]


def extended(case: Case, length: int, memory: Memory) -> float | None:
    """Cycles a head of a causal sequence of `length` tokens, by blocks visited; None where nothing was estimated."""
    found, module = memory.get(case), contestant(case.contestant)
    if found is None or found.cycles is None:
        return None
    walked = (module.full_steps if case.contestant == "tokamax" else module.steps)(case)
    asked = module.steps(replace(case, length=length))
    sizes = (1.0,)
    if case.contestant == "ours":  # whole blocks and edges, as keys
        blocks = module.blocks_of(case)
        sizes = blocks.block_kv, blocks.edge_kv
    return found.cycles * _dot(asked, sizes) / _dot(walked, sizes) / case.heads


def _dot(counts, sizes) -> float:
    return sum(count * size for count, size in zip(counts, sizes, strict=False))


def _text(case: Case) -> str:
    return " ".join(f"{name.removeprefix('block_')} {value}" for name, value in case.settings)
