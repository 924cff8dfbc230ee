"""Static cycles of jaxcoder's TPU attention kernels next to JAX's splash and tokamax's; no TPU is needed.

    python -m benchmarks.attention.ratios --device v6e
    python -m benchmarks.attention.ratios --device v5p --kernel forward --against splash

Cycles are libtpu's own static estimate (cycles.py), extended to longer sequences by a fit whose residual is reported
(fit.py). The ratio of two kernels on one chip is meaningful; absolute seconds are not.
"""

import argparse
import sys

from benchmarks import command
from benchmarks.attention import cases, matmul
from benchmarks.attention.cases import add_arguments, baseline_case, jaxcoder_case, percent, useful_share
from benchmarks.attention.cycles import Case, EstimateCache, estimate, implementation, of_peak, versions
from benchmarks.attention.fit import Fit, NoEstimate, fit, held_out
from benchmarks.command import progress
from jaxcoder.benchmarks.measure import Report, Reports
from jaxcoder.errors import ConfigError

__all__ = ["add_arguments", "run"]

TARGETS = {
    "forward": {"v5e": (0.84, 1.2), "v5p": (0.84, 1.2), "v6e": (0.41, 1.55)},
    "backward": {"v5e": (0.80, 1.4), "v5p": (0.80, 1.4), "v6e": (0.38, None)},
}
"""Kernel -> device -> useful share of peak, and speed-up over splash; at 8192 tokens and head dimension 128."""


def run(args: argparse.Namespace) -> Reports:
    return Reports([check_estimator(args), *(compare(args, kernel) for kernel in cases.kernels(args))])


def check_estimator(args: argparse.Namespace) -> Report:
    """The estimator itself, on matmuls whose time on a v5e is known."""
    rows, cache = [], cases.open_cache(args)
    progress(f"{args.device}: matmuls, to check the estimator")
    for check in matmul.CHECKS:
        case = matmul.case(args.device, check)
        found = estimate(case, cache=cache)
        row = {"size": check.size, "blocks": "/".join(map(str, check.blocks)), "cycles": found.cycles}
        if found.cycles:
            row["peak"] = percent(of_peak(case, 2 * check.size**3, found.cycles))
            if args.device == "v5e":
                row["estimated"] = 1e3 * found.cycles / matmul.V5E_HERTZ
                row["measured"] = check.measured and 1e3 * check.measured
        rows.append(row | {"why": found.error if found.cycles is None else ""})
    on_v5e = {"estimated": "ms at 1.5 GHz", "measured": "ms measured"} if args.device == "v5e" else {}
    columns = {"size": "N", "blocks": "blocks", "cycles": "cycles", "peak": "of peak"} | on_v5e | {"why": ""}
    return Report(
        title=f"{args.device}: the estimator on Pallas matmuls (bad blocks must look bad)",
        columns=columns, rows=rows, environment=versions("matmul"),
    )  # fmt: skip


def compare(args: argparse.Namespace, kernel: str) -> Report:
    """Cycles a head of jaxcoder's kernel and of the baselines', one causal document of `--length` tokens."""
    rows, totals, cache = [], {}, cases.open_cache(args)
    for name in ("jaxcoder", *args.against):
        parts = [kernel] if name == "jaxcoder" else cases.baseline_kernels(name, kernel)
        cycles = []
        for part in parts:
            case = jaxcoder_case(args, part) if name == "jaxcoder" else baseline_case(args, name, part)
            row, found = fitted_row(case, cache)
            if name == "jaxcoder" and found is not None:
                errors = [abs(error) for _, _, error in held_out(found, cache=cache)]
                row["documents"] = percent(max(errors)) if errors else None
            rows.append(row)
            cycles.append(row.get("cycles"))
        if all(cycles):
            totals[name] = sum(cycles)
            rows[-1] |= {"total": totals[name], "useful": _useful_text(args, kernel, totals[name])}
            if "jaxcoder" in totals and name != "jaxcoder":
                rows[-1]["ratio"] = totals[name] / totals["jaxcoder"]
        if (name, kernel) == ("splash", "forward"):
            # The lower bound of splash: no segment ids, and no log-sum-exp, which training needs.
            row, _ = fitted_row(baseline_case(args, "splash", "inference"), cache)
            if "cycles" in row:
                row["useful"] = _useful_text(args, "forward", row["cycles"])
                row |= {"ratio": row["cycles"] / totals["jaxcoder"]} if "jaxcoder" in totals else {}
            rows.append(row)
    return Report(
        title=f"{args.device} {kernel}: cycles a head, {args.length} causal tokens, head_dim {args.head_dim}",
        settings={"heads of a jaxcoder block": jaxcoder_case(args, kernel).heads, "heads of a baseline": 1},
        columns={
            "name": "", "settings": "blocks", "costs": "cycles of each", "residual": "residual",
            "documents": "documents", "cycles": "cycles", "total": "together",
            "useful": "useful", "ratio": "x jaxcoder", "why": "",
        },
        rows=rows,
        targets=_targets(args, kernel, totals),
        environment=versions("tokamax" if "tokamax" in args.against else "jaxcoder"),
    )  # fmt: skip


def fitted_row(case: Case, cache: EstimateCache) -> tuple[dict, Fit | None]:
    """A row of a kernel, cycles per head at the case's length, and the fit they come from."""
    row = {"name": f"{case.implementation} {case.kernel}", "settings": cases.blocks_text(case)}
    progress(f"{case.device} {case.implementation} {case.kernel}")
    try:
        found = fit(case, cache=cache)
    except (NoEstimate, ConfigError) as error:
        return row | {"why": f"no cycles: {error}"}, None
    costs = ", ".join(f"{name} {cost:,.0f}" for name, cost in zip(found.counted, found.costs, strict=True))
    row |= {"costs": costs, "residual": percent(found.residual), "why": "; ".join(found.failures)}
    return row | {"cycles": found.cycles(implementation(case.implementation).steps(case)) / case.heads}, found


def _useful_text(args: argparse.Namespace, kernel: str, cycles: float) -> str:
    share = useful_share(args, kernel, cycles)
    return "artefact" if share > 1 else percent(share)


def _targets(args: argparse.Namespace, kernel: str, totals: dict[str, float]) -> dict[str, bool]:
    if (args.length, args.head_dim) != (8192, 128) or args.device not in TARGETS[kernel] or "jaxcoder" not in totals:
        return {}
    least, speedup = TARGETS[kernel][args.device]
    share = useful_share(args, kernel, totals["jaxcoder"])
    met = {f"at least {percent(least)} of peak (measured {percent(share)})": least <= share <= 1}
    if speedup and "splash" in totals:
        ratio = totals["splash"] / totals["jaxcoder"]
        met[f"{speedup} times fewer cycles than splash (measured {ratio:.2f})"] = ratio >= speedup
    if "tokamax" in totals:
        ratio = totals["tokamax"] / totals["jaxcoder"]
        met[f"fewer cycles than tokamax's lower bound (measured {ratio:.2f})"] = ratio >= 1
    return met


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
