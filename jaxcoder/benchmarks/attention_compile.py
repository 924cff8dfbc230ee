"""`jaxcoder bench attention --compile-all` and `--long`: what libtpu compiles, with no TPU at hand.

--compile-all: the attention of every configured model (heads, head_dim, length, segment ids, its dropout) on every
generation of chips, forward and backward; what does not compile is a row with its reason. --long: 32K and 128K tokens
of 48 heads on one chip, the fast memory that the kernels take, and what a block costs at lengths above the fit's.
Each compilation is a process of its own with a limit of time, and compiles the real schedule.
"""

import argparse
from dataclasses import replace

from jaxcoder.benchmarks import attention
from jaxcoder.benchmarks.attention_cycles import CHIPS, Case, Estimate, Memory, estimate, versions
from jaxcoder.benchmarks.attention_fit import NoEstimate, contestant, fit
from jaxcoder.benchmarks.measure import Report, Reports

PATIENCE = 300.0
LONG = (32768, 131072)
LONG_HEADS = 48


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
            row[device] = _cell(estimate(case, patience=PATIENCE, memory=memory))
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
            found = estimate(case, patience=PATIENCE, memory=memory)
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
        rows[-1] |= _cost_at_length(args, kernel, memory)
    return Report(
        title=f"{args.device}: long sequences, {LONG_HEADS} heads",
        settings={},
        columns={
            "kernel": "kernel", "length": "length", "vmem": "MiB of fast memory", "limit": "allowed",
            "span": "keys held", "fitted": "fit's cycles", "walked": "walked at", "error": "fit / walk - 1",
        },
        rows=rows,
        targets={},
        environment=versions("ours"),
    )  # fmt: skip


def _cost_at_length(args: argparse.Namespace, kernel: str, memory: Memory) -> dict:
    """The fit against a walk of twice the longest fitted length, with few heads, fitted with as few."""
    heads, length = 4, 8192
    one = attention.our_case(args, kernel)
    case = replace(one, heads=heads, settings=tuple(sorted((dict(one.settings) | {"heads": heads}).items())))
    try:
        fitted = fit(case, memory=memory, say=attention.say)
    except NoEstimate as error:
        return {"walked": f"no fit: {error}"}
    longer = replace(case, length=length)
    found = estimate(longer, memory=memory)
    if found.cycles is None:
        return {"walked": f"not at {length}: {found.error}"}
    predicted = fitted.cycles(contestant("ours").steps(longer))
    error = attention.percent(predicted / found.cycles - 1)
    return {"fitted": predicted, "walked": f"{length}, {heads} heads: {found.cycles:,}", "error": error}
