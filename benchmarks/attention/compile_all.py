"""Compiles the attention of every configured model for every TPU generation, with no TPU present.

    python -m benchmarks.attention.compile_all

Forward and backward with segment ids and the model's dropout. A cell is the fast memory (VMEM, MiB) of the larger
kernel, or the reason why it does not compile. Each compilation runs in its own process under a timeout.
"""

import argparse
import sys

from benchmarks import command
from benchmarks.attention.cases import add_cache_argument, open_cache
from benchmarks.attention.cycles import DEVICES, Case, Estimate, estimate, versions
from benchmarks.command import progress
from jaxcoder.benchmarks.measure import Report

TIMEOUT = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cache_argument(parser)


def run(args: argparse.Namespace) -> Report:
    cache, rows, configured = open_cache(args), [], shapes()
    for number, ((heads, groups, head_dim, length, rate), names) in enumerate(configured.items(), 1):
        shape = f"{heads} : {groups} x {head_dim}"
        row = {"runs": ", ".join(names), "shape": shape, "length": length, "dropout": rate}
        for device in DEVICES:
            case = Case(
                device=device, implementation="jaxcoder", kernel="both", length=length, heads=heads, groups=groups,
                head_dim=head_dim, dropout_rate=rate, is_estimated=False,
            )  # fmt: skip
            row[device] = vmem_text(estimate(case, timeout=TIMEOUT, cache=cache))
            progress(f"[{number}/{len(configured)}] {device} {shape} {length}: {row[device]}")
        rows.append(row)
    return Report(
        title="Forward and backward compiled by libtpu, segment ids: MiB of fast memory of the larger kernel",
        columns={"runs": "runs", "shape": "heads", "length": "length", "dropout": "dropout"} | {d: d for d in DEVICES},
        rows=rows,
        environment=versions("jaxcoder"),
    )


def shapes() -> dict[tuple[int, int, int, int, float], list[str]]:
    """(heads, key/value heads, head_dim, length, dropout rate) -> the configured runs that have it."""
    from jaxcoder.config.load import available_runs, load_run

    found: dict[tuple, list[str]] = {}
    for name in available_runs():
        model = load_run(name).model
        shape = (model.num_heads, model.num_kv_heads, model.head_dim, model.max_seq_len, model.attention_dropout)
        found.setdefault(shape, []).append(name)
    return found


def vmem_text(found: Estimate) -> str:
    return f"{found.vmem / 2**20:.1f}" if found.compiles else f"no: {found.error}"


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
