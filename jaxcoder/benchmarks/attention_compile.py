"""`jaxcoder bench attention --compile-all` and `--long`: what libtpu compiles, with no TPU at hand.

--compile-all: the attention of every configured model (heads, head_dim, length, segment ids, its dropout) on every
generation of chips, forward and backward; what does not compile is a row with its reason. --long: 32K and 128K tokens
of 48 heads on one chip, the fast memory that the kernels take, and what a whole block costs where keys are streamed.
Each compilation is a process of its own with a limit of time, and compiles the real schedule.

No estimator walks 32K tokens. But what differs there is only that keys come in spans, and short spans make a short
sequence do the same: such sequences are walked (forward whole, backward the call for the first span), and what a whole
block costs in them, and each step that a longer sequence has more, is fitted with all other costs as they were.
"""

import argparse
from dataclasses import replace

import numpy as np

from jaxcoder.benchmarks import attention
from jaxcoder.benchmarks.attention_cycles import CHIPS, Case, Estimate, Memory, estimate, versions
from jaxcoder.benchmarks.attention_fit import NoEstimate, contestant, described, fit, least_squares, told
from jaxcoder.benchmarks.measure import Report, Reports

PATIENCE = 300.0
LONG = (32768, 131072)
LONG_HEADS = 48
STREAMED = ((2048, 1024), (4096, 1024), (4096, 2048))
"""(tokens, keys of a span) that are walked."""


def run(args: argparse.Namespace) -> Report | Reports:
    return _long(args) if args.long else _all(args)


def shapes() -> dict[tuple[int, int, int, int, float], list[str]]:
    """(heads, key/value heads, head_dim, length, dropout rate) -> the configured runs that have it."""
    from jaxcoder.config.load import available_runs, load_run

    found: dict[tuple, list[str]] = {}
    for name in available_runs():
        model = load_run(name).model
        shape = (model.num_heads, model.num_kv_heads, model.head_dim, model.max_seq_len, model.attention_dropout)
        found.setdefault(shape, []).append(name)
    return found


def _all(args: argparse.Namespace) -> Report:
    memory, rows, configured = attention.memory_of(args), [], shapes()
    for number, ((heads, groups, head_dim, length, rate), names) in enumerate(configured.items(), 1):
        shape = f"{heads} : {groups} x {head_dim}"
        row = {"runs": ", ".join(names), "shape": shape, "length": length, "dropout": rate}
        for device in CHIPS:
            case = Case(
                device=device, contestant="ours", kernel="both", length=length, heads=heads, groups=groups,
                head_dim=head_dim, dropout_rate=rate, is_walked=False,
            )  # fmt: skip
            row[device] = _cell(estimate(case, timeout=PATIENCE, memory=memory))
            attention.say(f"[{number}/{len(configured)}] {device} {shape} {length}: {row[device]}")
        rows.append(row)
    return Report(
        title="Forward and backward compiled by libtpu, segment ids: MiB of fast memory of the larger kernel",
        settings={},
        columns={"runs": "runs", "shape": "heads", "length": "length", "dropout": "dropout"} | {d: d for d in CHIPS},
        rows=rows,
        targets={},
        environment=versions("ours"),
    )


def _cell(found: Estimate) -> str:
    return f"{found.vmem / 2**20:.1f}" if found.compiles else f"no: {found.error}"


def _long(args: argparse.Namespace) -> Report:
    memory, rows = attention.memory_of(args), []
    for kernel in [args.kernel] if args.kernel else ["forward", "backward"]:
        for length in LONG:
            case = Case(
                device=args.device, contestant="ours", kernel=kernel, length=length, heads=LONG_HEADS,
                head_dim=args.head_dim, is_walked=False,
            )  # fmt: skip
            found = estimate(case, timeout=PATIENCE, memory=memory)
            blocks = contestant("ours").blocks_of(case)
            attention.say(f"{args.device} {kernel} {length}: {_cell(found)} MiB")
            rows.append(
                {
                    "kernel": kernel,
                    "length": length,
                    "vmem": _cell(found),
                    "limit": blocks.vmem_mib,
                    "span": blocks.span_kv,
                }
            )
        rows[-1] |= streamed_costs(args, kernel, memory)
    return Report(
        title=f"{args.device}: long sequences, {LONG_HEADS} heads",
        settings={},
        columns={
            "kernel": "kernel", "length": "length", "vmem": "MiB of fast memory", "limit": "allowed",
            "span": "keys held", "whole": "whole block", "streamed": "streamed", "step": "a step more",
            "residual": "residual", "why": "",
        },
        rows=rows,
        targets={},
        environment=versions("ours"),
    )  # fmt: skip


def streamed_costs(args: argparse.Namespace, kernel: str, memory: Memory) -> dict:
    """Cycles of a whole block, keys held whole and streamed, and of what a step of the grid costs besides.

    Such steps are, forward, the spans of a block of queries beyond its first; backward, in each call, the blocks of
    queries, which write their share of dQ in fp32.
    """
    case, counts, cycles = attention.our_case(args, kernel), [], []
    try:
        held = fit(case, memory=memory, say=attention.say)
    except NoEstimate as error:
        return {"why": f"no fit: {error}"}
    for length, span in STREAMED:
        settings = tuple(sorted((dict(case.settings) | {"span_kv": span}).items()))
        streamed = replace(case, length=length, settings=settings)
        found = estimate(streamed, memory=memory)
        attention.say(f"  {described(streamed)}: {told(found)}")
        if found.cycles is None:
            return {"whole": held.costs[0], "why": f"{length} in spans of {span}: {found.error}"}
        wholes, *others = contestant("ours").steps(streamed)
        blocks = others[1]
        counts.append((wholes, blocks * (length // span - 1) if kernel == "forward" else blocks))
        cycles.append(found.cycles - float(np.dot(held.costs[1:], others)))
    costs, residual = least_squares(np.array(counts), np.array(cycles))
    return {
        "whole": held.costs[0], "streamed": costs[0], "step": costs[1], "residual": attention.percent(residual),
    }  # fmt: skip
