"""Cycles of any length from cycles of the lengths that the estimator can walk: so much a visited block, and the rest.

    cycles = sum over what is counted (blocks visited, blocks of queries) of count x cost

The costs are the least squares solution over all walked cases, weighted so that every case counts by its relative
error; the largest relative error stays with them. Every contestant is fitted alike, over its own blocks.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from jaxcoder.benchmarks.attention_cycles import CONTESTANTS, Case, Estimate, Memory, estimate

WALKED = {"ours": (1024, 2048, 4096), "splash": (2048, 4096, 8192), "tokamax": (2048, 4096, 8192)}
"""Lengths that a fit rests on: ours has all heads of a block in one case, the peers have one head."""
WALKED_DOCUMENTS = (256, 1024)
"""Of our kernels, at 2048 tokens: they tell the cost of an edge from that of a block of queries and of the call."""
HELD_OUT = ((4096, 2048), (4096, 512))
"""(length, tokens of a document) of our kernels that the fit does not rest on but must predict."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """costs: cycles of one of each that is counted. residual: largest relative error of the walked cases."""

    case: Case
    counted: tuple[str, ...]
    costs: tuple[float, ...]
    residual: float
    walked: tuple[Case, ...]
    failures: tuple[str, ...] = ()

    def cycles(self, counts: Sequence[float]) -> float:
        return float(np.dot(self.costs, counts))


class NoEstimate(Exception):
    """A contestant that gave too few estimates to be fitted; the message says why."""


def contestant(name: str) -> ModuleType:
    return importlib.import_module(CONTESTANTS[name])


def walked_cases(case: Case) -> list[Case]:
    """The cases that a fit of `case` rests on, shortest first."""
    longest_block = max([value for name, value in case.settings if name.startswith("block")], default=0)
    lengths = [length for length in WALKED[case.contestant] if length >= longest_block]
    cases = [replace(case, length=length) for length in lengths]
    if case.contestant == "ours":
        cases += [replace(case, length=2048, document=document) for document in WALKED_DOCUMENTS]
    return cases


def fit(case: Case, *, memory: Memory | None = None, say=print) -> Fit:
    """Costs for the kernel and settings of `case`, whatever its length. Raises NoEstimate."""
    module, cases, rows, cycles, failures = contestant(case.contestant), [], [], [], []
    count = module.full_steps if case.contestant == "tokamax" else module.steps
    for walked in walked_cases(case):
        found = estimate(walked, memory=memory)
        say(f"  {described(walked)}: {told(found)}")
        if found.cycles is None:
            failures.append(f"{walked.length}: {found.error}")
            continue
        cases.append(walked)
        rows.append(count(walked))
        cycles.append(found.cycles)
    if len(cases) < len(module.COUNTED):
        raise NoEstimate("; ".join(failures))
    costs, residual = least_squares(np.array(rows), np.array(cycles))
    return Fit(
        case=case, counted=module.COUNTED, costs=tuple(costs), residual=residual, walked=tuple(cases),
        failures=tuple(failures),
    )  # fmt: skip


def least_squares(counts: np.ndarray, cycles: np.ndarray) -> tuple[np.ndarray, float]:
    """Costs (n,) for counts (cases, n) and cycles (cases,), by relative error; and the largest relative error."""
    costs = np.linalg.lstsq(counts / cycles[:, None], np.ones(len(cycles)), rcond=None)[0]
    return costs, float(abs(counts @ costs / cycles - 1).max())


def held_out(of: Fit, *, memory: Memory | None = None, say=print) -> list[tuple[Case, int, float]]:
    """Cases of documents that our fit does not rest on: (case, cycles estimated, relative error of the fit)."""
    found = []
    for length, document in HELD_OUT:
        case = replace(of.case, length=length, document=document)
        estimated = estimate(case, memory=memory)
        say(f"  {described(case)}: {told(estimated)}")
        if estimated.cycles is not None:
            predicted = of.cycles(contestant(case.contestant).steps(case))
            found.append((case, estimated.cycles, predicted / estimated.cycles - 1))
    return found


def described(case: Case) -> str:
    blocks = " ".join(f"{name} {value}" for name, value in case.settings)
    documents = "" if case.document is None else f", documents of {case.document}"
    return f"{case.device} {case.contestant} {case.kernel} {case.length}{documents} {blocks}".rstrip()


def told(found: Estimate) -> str:
    if found.cycles is not None:
        return f"{found.cycles:,} cycles"
    return f"{'compiles, not estimated' if found.compiles else 'does not compile'}: {found.error}"
