"""`jaxcoder bench attention --costs`: what dropout and the masks of documents cost our kernels, in estimated cycles.

Dropout: the same causal sequence with a rate of 0.1 and without. Masks: our kernels compare every edge step with the
interval of its query, whether documents are there or not, so segment ids by themselves cost nothing inside; documents
add edge steps, whose cost beside a whole block's is in the fit. Splash compares ids in every tile: with and without.
"""

import argparse
from dataclasses import replace

from jaxcoder.benchmarks import attention
from jaxcoder.benchmarks.attention_cycles import Case, Memory, estimate, versions
from jaxcoder.benchmarks.attention_fit import NoEstimate, fit
from jaxcoder.benchmarks.measure import Report, Reports

WALKED = 2048


def run(args: argparse.Namespace) -> Reports:
    memory = attention.memory_of(args)
    kernels = [args.kernel] if args.kernel else ["forward", "backward"]
    return Reports([_dropout(args, kernels, memory), _masks(args, kernels, memory)])


def _dropout(args: argparse.Namespace, kernels: list[str], memory: Memory) -> Report:
    rows = []
    for kernel in kernels:
        plain = replace(attention.our_case(args, kernel), length=WALKED)
        rows.append(_pair(f"ours {kernel}", plain, replace(plain, dropout_rate=0.1), memory))
    return _report(f"{args.device}: dropout of 0.1, cycles of {WALKED} causal tokens, a block of heads", rows)


def _masks(args: argparse.Namespace, kernels: list[str], memory: Memory) -> Report:
    rows = []
    for kernel in kernels:
        try:
            whole, edge, *_ = fit(attention.our_case(args, kernel), memory=memory, say=attention.say).costs
        except NoEstimate as error:
            rows.append({"who": f"ours {kernel}", "why": str(error)})
            continue
        from jaxcoder.benchmarks.attention_ours import blocks_of

        blocks = blocks_of(attention.our_case(args, kernel))
        row = {"who": f"ours {kernel}: {blocks.block_kv} keys whole, at the edges", "without": whole}
        row |= {"with": edge * blocks.block_kv / blocks.edge_kv}
        rows.append(row | {"times": row["with"] / row["without"]})
        for part in attention.peer_kernels("splash", kernel) if "splash" in args.against else []:
            case = replace(attention.peer_case(args, "splash", part), length=2 * WALKED, segments=False)
            rows.append(_pair(f"splash {part}: without and with ids", case, replace(case, segments=True), memory))
    return _report(f"{args.device}: masks, cycles without and with", rows)


def _report(title: str, rows: list[dict]) -> Report:
    return Report(
        title=title,
        settings={},
        columns={"who": "", "without": "without", "with": "with", "times": "times", "why": ""},
        rows=rows,
        targets={},
        environment=versions("ours"),
    )


def _pair(who: str, one: Case, other: Case, memory: Memory) -> dict:
    attention.say(who)
    without, with_it = estimate(one, memory=memory), estimate(other, memory=memory)
    row = {"who": who, "without": without.cycles, "with": with_it.cycles, "why": without.error or with_it.error}
    if without.cycles and with_it.cycles:
        row["times"] = with_it.cycles / without.cycles
    return row
