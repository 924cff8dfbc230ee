"""`jaxcoder bench attention --slots`: what limits the kernels, by how full their inner loop keeps each unit of a chip.

The compiler states, for each instruction bundle, how many slots of every unit it fills. The inner loop of a kernel is
where its bundles multiply most: of all stretches of 1000 bundles, the one with the most matrix multiplications. A unit
that is full there is the limit; how much of the matrix unit such a multiplication uses is another matter (on v6e it is
256 wide, and a head dimension of 128 fills half of it).
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxcoder.benchmarks import attention
from jaxcoder.benchmarks.attention_cycles import Case, compile_case, versions
from jaxcoder.benchmarks.measure import Report

STRETCH = 1000
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
    for kernel in [args.kernel] if args.kernel else ["forward", "backward"]:
        cases = [replace(attention.our_case(args, kernel), length=LENGTH)]
        for name in args.against:
            cases += [attention.peer_case(args, name, part) for part in attention.peer_kernels(name, kernel)]
        for case in cases:
            attention.say(f"{case.device} {case.contestant} {case.kernel}")
            shares = inner_loop(case)
            cells = {} if shares is None else {name: attention.percent(share) for name, share in shares.items()}
            rows.append({"who": f"{case.contestant} {case.kernel}"} | cells)
    return Report(
        title=f"{args.device}: slots filled in the densest {STRETCH} bundles",
        settings={},
        columns={"who": ""} | SHOWN,
        rows=rows,
        targets={},
        environment=versions("tokamax" if "tokamax" in args.against else "ours"),
    )


def inner_loop(case: Case) -> dict[str, float] | None:
    """Unit -> share of its slots that the inner loop fills; None where the compiler wrote no such table."""
    with tempfile.TemporaryDirectory() as folder:
        compile_case(case, f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true", 600.0)
        files = list(Path(folder).glob("*counted_call*final_hlo-static-per-bundle-utilization.txt"))
        return densest(files[0].read_text()) if files else None


def densest(text: str) -> dict[str, float]:
    """The same from the compiler's table: a line of unit names, one of capacities, then a line a bundle."""
    lines = text.splitlines()
    units = [name.strip() for name in lines[1].split(",")]
    capacities = np.array(lines[2].split(), float)
    used = np.array([line.split() for line in lines[4:] if line[:1].isdigit()], float) / capacities
    sums = np.vstack([np.zeros(len(units)), np.cumsum(used, axis=0)])
    stretch = min(STRETCH, len(used))
    means = (sums[stretch:] - sums[:-stretch]) / stretch
    best = means[means[:, units.index("MATMUL")].argmax()]
    return dict(zip(units, best.tolist(), strict=True))
