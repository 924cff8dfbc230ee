"""Cycles at any length, from a linear fit over lengths that the estimator can process.

    cycles = sum over counted steps (blocks visited, blocks of queries, calls) of count x cost

The costs are the least squares solution over all estimated cases, weighted so that every case counts by its relative
error; the largest relative error is kept as the residual. Every implementation is fitted alike, over its own blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.attention.cycles import Case, Estimate, EstimateCache, estimate, implementation
from benchmarks.command import progress

ESTIMATED_LENGTHS = {"jaxcoder": (1024, 2048, 4096), "splash": (2048, 4096, 8192), "tokamax": (2048, 4096, 8192)}
"""Lengths that a fit uses; a jaxcoder case has all heads of a block, a baseline case one head."""
ESTIMATED_DOCUMENTS = (256, 1024)
"""For jaxcoder's kernels, at 2048 tokens: they separate the cost of an edge step from that of a block of queries."""
HELD_OUT = ((4096, 2048), (4096, 512))
"""(length, tokens of a document) for jaxcoder's kernels: not fitted, only predicted."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """costs: cycles of one of each counted step. residual: largest relative error over the fitted cases."""

    case: Case
    counted: tuple[str, ...]
    costs: tuple[float, ...]
    residual: float
    fitted: tuple[Case, ...]
    failures: tuple[str, ...] = ()

    def cycles(self, counts: Sequence[float]) -> float:
        return float(np.dot(self.costs, counts))


class NoEstimate(Exception):
    """Too few estimates for a fit; the message has the reasons."""


def estimated_cases(case: Case) -> list[Case]:
    """The cases that a fit of `case` uses, shortest first."""
    longest_block = max([value for name, value in case.settings if name.startswith("block")], default=0)
    lengths = [length for length in ESTIMATED_LENGTHS[case.implementation] if length >= longest_block]
    cases = [replace(case, length=length) for length in lengths]
    if case.implementation == "jaxcoder":
        cases += [replace(case, length=2048, document=document) for document in ESTIMATED_DOCUMENTS]
    return cases


def fit(case: Case, *, cache: EstimateCache | None = None) -> Fit:
    """Costs for the kernel and settings of `case`, whatever its length. Raises NoEstimate."""
    module, cases, rows, cycles, failures = implementation(case.implementation), [], [], [], []
    for one in estimated_cases(case):
        found = estimate(one, cache=cache)
        progress(f"  {describe_case(one)}: {describe_estimate(found)}")
        if found.cycles is None:
            failures.append(f"{one.length}: {found.error}")
            continue
        cases.append(one)
        rows.append(estimated_steps(one))
        cycles.append(found.cycles)
    if len(cases) < len(module.COUNTED):
        raise NoEstimate("; ".join(failures))
    costs, residual = least_squares(np.array(rows), np.array(cycles))
    return Fit(
        case=case, counted=module.COUNTED, costs=tuple(costs), residual=residual, fitted=tuple(cases),
        failures=tuple(failures),
    )  # fmt: skip


def estimated_steps(case: Case) -> tuple[float, ...]:
    """Counts of the program that the estimator sees: tokamax's visits every tile there."""
    module = implementation(case.implementation)
    return module.full_steps(case) if case.implementation == "tokamax" else module.steps(case)


def least_squares(counts: np.ndarray, cycles: np.ndarray) -> tuple[np.ndarray, float]:
    """Costs (n,) for counts (cases, n) and cycles (cases,), by relative error; and the largest relative error."""
    costs = np.linalg.lstsq(counts / cycles[:, None], np.ones(len(cycles)), rcond=None)[0]
    return costs, float(abs(counts @ costs / cycles - 1).max())


def held_out(of: Fit, *, cache: EstimateCache | None = None) -> list[tuple[Case, int, float]]:
    """Predictions for cases outside the fit: (case, cycles estimated, relative error of the prediction)."""
    found = []
    for length, document in HELD_OUT:
        case = replace(of.case, length=length, document=document)
        estimated = estimate(case, cache=cache)
        progress(f"  {describe_case(case)}: {describe_estimate(estimated)}")
        if estimated.cycles is not None:
            predicted = of.cycles(implementation(case.implementation).steps(case))
            found.append((case, estimated.cycles, predicted / estimated.cycles - 1))
    return found


def describe_case(case: Case) -> str:
    blocks = " ".join(f"{name} {value}" for name, value in case.settings)
    documents = "" if case.document is None else f", documents of {case.document}"
    return f"{case.device} {case.implementation} {case.kernel} {case.length}{documents} {blocks}".rstrip()


def describe_estimate(found: Estimate) -> str:
    if found.cycles is not None:
        return f"{found.cycles:,} cycles"
    return f"{'compiles, not estimated' if found.compiles else 'does not compile'}: {found.error}"
