"""Measure, side by side, what the documentation claims; every figure of docs/performance.md comes from here.

    jaxcoder bench fim                          fill-in-the-middle from cached ids, and the way of Megatron
    jaxcoder bench fim --fim-rate 1             every piece is cut
    jaxcoder bench encode --output encode.json  text to ids: tiktoken's path and the `tokenizers` library
    jaxcoder bench loader                       store to host batches, memory, and what accelerators eat
    jaxcoder bench train                        the step of the 164M model, PyTorch's beside it, a bare matmul
    jaxcoder bench decode                       greedy decoding of one prompt and of eight, `transformers` beside it
    jaxcoder bench compile                      compiling at 164M and 15.5B; starting a run with the cache
    jaxcoder bench checkpoint                   what a save costs a run, and what a restart takes
    jaxcoder bench attention --device tpu:v5p   our attention kernels beside JAX's and tokamax's, in static cycles
    jaxcoder bench cross-entropy --device v5p   the loss and its gradients, as compiled for a mesh of TPUs
    jaxcoder bench parity HF_DIR                ten steps from these weights give PyTorch's curve

PyTorch's rows need the extra `bench`, cycles of TPUs `bench-tpu`. Times are medians of several runs in one process, in
which the contestants take turns.
Rates of `fim`, `encode` and `loader` are per second of processor time, but a machine with other work to do still slows
them down: compare rows of one table.
"""

import argparse
import importlib
from pathlib import Path

BENCHMARKS: dict[str, tuple[str, str]] = {
    "fim": ("jaxcoder.benchmarks.fim", "fill-in-the-middle on windows of token ids"),
    "encode": ("jaxcoder.benchmarks.encode", "text to token ids"),
    "loader": ("jaxcoder.benchmarks.loader", "the whole stream, from the store to host batches"),
    "train": ("jaxcoder.benchmarks.training", "the training step, beside PyTorch's and a bare matmul"),
    "decode": ("jaxcoder.benchmarks.decoding", "greedy decoding, beside transformers' `generate`"),
    "compile": ("jaxcoder.benchmarks.compiling", "compiling the step, and starting with and without the cache"),
    "checkpoint": ("jaxcoder.benchmarks.checkpointing", "a save's time and memory, and starting again"),
    "attention": ("jaxcoder.benchmarks.attention", "attention beside splash, tokamax and cuDNN; static cycles of TPUs"),
    "cross-entropy": ("jaxcoder.benchmarks.cross_entropy", "loss and gradients on a mesh, compiled for absent TPUs"),
    "parity": ("jaxcoder.benchmarks.parity", "the curve of our training beside PyTorch's (a test)"),
}
"""Name -> module with `add_arguments(parser)` and `run(args) -> Report | Reports`, and the one-line help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = parser.add_subparsers(dest="name", metavar="BENCHMARK", required=True)
    for name, (module, summary) in BENCHMARKS.items():
        one = names.add_parser(name, help=summary)
        importlib.import_module(module).add_arguments(one)
        one.add_argument("--output", type=Path, metavar="FILE", help="also write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    report = importlib.import_module(BENCHMARKS[args.name][0]).run(args)
    print(report.text())
    if args.output is not None:
        report.write(args.output)
        print(f"\nWrote {args.output}")
    return report.exit_code
