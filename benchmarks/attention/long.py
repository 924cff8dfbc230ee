"""32K and 128K tokens of 48 heads on one chip: fast memory of the kernels, and the cost of a block of streamed keys.

    python -m benchmarks.attention.long --device v5p

The estimator does not finish on 32K tokens. Long sequences differ only in that keys come in several spans, and short
spans make a short sequence do the same. Such sequences are estimated (forward entirely, backward the call for the
first span); the cost of a whole block and of each additional grid step is fitted with all other costs fixed.
"""

import argparse
import sys
from dataclasses import replace

import numpy as np

from benchmarks import command
from benchmarks.attention.cases import add_arguments, jaxcoder_case, kernels, open_cache, percent
from benchmarks.attention.compile_all import TIMEOUT, vmem_text
from benchmarks.attention.cycles import Case, EstimateCache, estimate, implementation, versions
from benchmarks.attention.fit import NoEstimate, describe_case, describe_estimate, fit, least_squares
from benchmarks.command import progress
from jaxcoder.benchmarks.measure import Report

__all__ = ["add_arguments", "run"]

LENGTHS = (32768, 131072)
NUM_HEADS = 48
STREAMED = ((2048, 1024), (4096, 1024), (4096, 2048))
"""(tokens, keys of a span) that are estimated."""


def run(args: argparse.Namespace) -> Report:
    cache, rows = open_cache(args), []
    for kernel in kernels(args):
        for length in LENGTHS:
            case = Case(
                device=args.device, implementation="jaxcoder", kernel=kernel, length=length, heads=NUM_HEADS,
                head_dim=args.head_dim, is_estimated=False,
            )  # fmt: skip
            vmem = vmem_text(estimate(case, timeout=TIMEOUT, cache=cache))
            blocks = implementation("jaxcoder").blocks_of(case)
            progress(f"{args.device} {kernel} {length}: {vmem} MiB")
            rows.append(
                {"kernel": kernel, "length": length, "vmem": vmem, "limit": blocks.vmem_mib, "span": blocks.span_kv}
            )
        rows[-1] |= streamed_costs(args, kernel, cache)
    return Report(
        title=f"{args.device}: long sequences, {NUM_HEADS} heads",
        columns={
            "kernel": "kernel", "length": "length", "vmem": "MiB of fast memory", "limit": "allowed",
            "span": "keys in fast memory", "whole": "whole block", "streamed": "streamed", "step": "each further step",
            "residual": "residual", "why": "",
        },
        rows=rows,
        environment=versions("jaxcoder"),
    )  # fmt: skip


def streamed_costs(args: argparse.Namespace, kernel: str, cache: EstimateCache | None) -> dict:
    """Cycles of a whole block with all keys in fast memory and with streamed keys, and of each further grid step.

    Further steps are, forward, the spans of a block of queries beyond its first; backward, in each call, the blocks of
    queries, which write their part of dQ in fp32.
    """
    case, counts, cycles = jaxcoder_case(args, kernel), [], []
    try:
        resident = fit(case, cache=cache)
    except NoEstimate as error:
        return {"why": f"no fit: {error}"}
    for length, span in STREAMED:
        settings = tuple(sorted((dict(case.settings) | {"span_kv": span}).items()))
        streamed = replace(case, length=length, settings=settings)
        found = estimate(streamed, cache=cache)
        progress(f"  {describe_case(streamed)}: {describe_estimate(found)}")
        if found.cycles is None:
            return {"whole": resident.costs[0], "why": f"{length} in spans of {span}: {found.error}"}
        wholes, *others = implementation("jaxcoder").steps(streamed)
        blocks = others[1]
        counts.append((wholes, blocks * (length // span - 1) if kernel == "forward" else blocks))
        cycles.append(found.cycles - float(np.dot(resident.costs[1:], others)))
    costs, residual = least_squares(np.array(counts), np.array(cycles))
    return {"whole": resident.costs[0], "streamed": costs[0], "step": costs[1], "residual": percent(residual)}


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
