"""The cost of dropout and of document masks in the attention kernels, in estimated cycles.

    python -m benchmarks.attention.costs --device v5p

Dropout: the same causal sequence with a rate of 0.1 and without. Masks: jaxcoder's kernels compare each edge step with
the interval of its query whether there are documents or not, so segment ids themselves cost nothing inside; documents
add edge steps, whose fitted cost is shown next to that of a whole block. Splash compares ids in every tile.
"""

import argparse
import sys
from dataclasses import replace

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
from benchmarks.attention.fit import NoEstimate, fit
from benchmarks.command import progress
from jaxcoder.benchmarks.measure import Report, Reports

__all__ = ["add_arguments", "run"]

LENGTH = 2048


def run(args: argparse.Namespace) -> Reports:
    cache, dropout, masks = open_cache(args), [], []
    for kernel in kernels(args):
        plain = replace(jaxcoder_case(args, kernel), length=LENGTH)
        dropout.append(_pair(f"jaxcoder {kernel}", plain, replace(plain, dropout_rate=0.1), cache))
        masks += _mask_rows(args, kernel, cache)
    return Reports(
        [
            _report(f"{args.device}: dropout of 0.1, cycles of {LENGTH} causal tokens, a block of heads", dropout),
            _report(f"{args.device}: masks, cycles without and with", masks),
        ]
    )


def _mask_rows(args: argparse.Namespace, kernel: str, cache: EstimateCache) -> list[dict]:
    case, rows = jaxcoder_case(args, kernel), []
    try:
        whole, edge, *_ = fit(case, cache=cache).costs
    except NoEstimate as error:
        return [{"name": f"jaxcoder {kernel}", "why": str(error)}]
    blocks = implementation("jaxcoder").blocks_of(case)
    masked = edge * blocks.block_kv / blocks.edge_kv
    name = f"jaxcoder {kernel}: {blocks.block_kv} keys whole, at the edges"
    rows.append({"name": name, "without": whole, "with": masked, "ratio": masked / whole})
    for part in baseline_kernels("splash", kernel) if "splash" in args.against else []:
        case = replace(baseline_case(args, "splash", part), length=2 * LENGTH, segments=False)
        rows.append(_pair(f"splash {part}: without and with ids", case, replace(case, segments=True), cache))
    return rows


def _report(title: str, rows: list[dict]) -> Report:
    columns = {"name": "", "without": "without", "with": "with", "ratio": "ratio", "why": ""}
    return Report(title=title, columns=columns, rows=rows, environment=versions("jaxcoder"))


def _pair(name: str, one: Case, other: Case, cache: EstimateCache) -> dict:
    progress(name)
    without, with_it = estimate(one, cache=cache), estimate(other, cache=cache)
    row = {"name": name, "without": without.cycles, "with": with_it.cycles, "why": without.error or with_it.error}
    return row | ({"ratio": with_it.cycles / without.cycles} if without.cycles and with_it.cycles else {})


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
