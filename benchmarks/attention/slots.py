"""Utilization of each unit of a TPU core in the inner loop of the attention kernels: what limits them.

    python -m benchmarks.attention.slots --device v6e

The compiler reports, for each instruction bundle, how many slots of every unit are filled. The inner loop is taken as
the 1000 consecutive bundles with the most matrix multiplications. A unit that is full there is the limit. How much of
the matrix unit one multiplication uses is a separate question: on v6e it is 256 wide, and a head dimension of 128 fills
half of it.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import command
from benchmarks.attention.cases import (
    add_arguments,
    baseline_case,
    baseline_kernels,
    jaxcoder_case,
    kernels,
    percent,
)
from benchmarks.attention.cycles import COUNTED_CALL, Case, compile_case, versions
from benchmarks.command import progress
from jaxcoder.benchmarks.measure import Report

__all__ = ["add_arguments", "run"]

BUNDLES = 1000
LENGTH = 2048
SHOWN = {
    "MATMUL": "multiply",
    "MATPUSH": "load weights",
    "VPOP": "results",
    "VALU": "vector",
    "EUP": "exp2",
    "XLU": "transpose",
    "VLOAD": "load",
    "VLOAD:FILL": "of it fills",
    "VSTORE": "store",
    "VSTORE:SPILL": "of it spills",
}


def run(args: argparse.Namespace) -> Report:
    rows = []
    for kernel in kernels(args):
        cases = [replace(jaxcoder_case(args, kernel), length=LENGTH)]
        for name in args.against:
            cases += [baseline_case(args, name, part) for part in baseline_kernels(name, kernel)]
        for case in cases:
            progress(f"{case.device} {case.implementation} {case.kernel}")
            row = {"name": f"{case.implementation} {case.kernel}"}
            rows.append(row | {unit: percent(share) for unit, share in inner_loop(case).items()})
    return Report(
        title=f"{args.device}: slots filled in the densest {BUNDLES} bundles",
        columns={"name": ""} | SHOWN,
        rows=rows,
        environment=versions("tokamax" if "tokamax" in args.against else "jaxcoder"),
    )


def inner_loop(case: Case) -> dict[str, float]:
    """Unit -> share of its slots that the inner loop fills; empty where the compiler wrote no such table."""
    with tempfile.TemporaryDirectory() as folder:
        compile_case(case, f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true", 600.0)
        files = list(Path(folder).glob(f"*{COUNTED_CALL}*final_hlo-static-per-bundle-utilization.txt"))
        return densest(files[0].read_text()) if files else {}


def densest(text: str) -> dict[str, float]:
    """Utilization by unit, from the compiler's table: unit names, capacities, then a line a bundle."""
    lines = text.splitlines()
    units = [name.strip() for name in lines[1].split(",")]
    capacities = np.array(lines[2].split(), float)
    used = np.array([line.split() for line in lines[4:] if line[:1].isdigit()], float) / capacities
    sums = np.vstack([np.zeros(len(units)), np.cumsum(used, axis=0)])
    count = min(BUNDLES, len(used))
    means = (sums[count:] - sums[:-count]) / count
    best = means[means[:, units.index("MATMUL")].argmax()]
    return dict(zip(units, best.tolist(), strict=True))


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
