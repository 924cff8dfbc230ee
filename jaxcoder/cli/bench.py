"""Measure fill-in-the-middle, encoding, loading, training, decoding, attention and checkpoints on this machine.

    jaxcoder bench fim                          fill-in-the-middle from cached ids
    jaxcoder bench fim --fim-rate 1             every document is transformed
    jaxcoder bench encode --output encode.json  text to ids: tiktoken and the `tokenizers` library
    jaxcoder bench loader                       token store to host batches
    jaxcoder bench train                        the training step of the 164M model, PyTorch's, and a bare matmul
    jaxcoder bench decode                       greedy decoding of one prompt and of eight, and `transformers`
    jaxcoder bench attention                    the attention backends of this machine
    jaxcoder bench checkpoint                   what a save costs a run, and how long a restart takes

PyTorch's rows need the extra `bench`. Times are medians of several runs in which all candidates take turns. Rates of
`fim`, `encode` and `loader` are per second of processor time; other load on the machine still slows them down, so
compare rows of one table. Measurements of absent hardware are in `benchmarks/` of a checkout.
"""

import argparse
import importlib

BENCHMARKS: dict[str, str] = {
    "fim": "fill-in-the-middle on windows of token ids",
    "encode": "text to token ids",
    "loader": "the sample stream, from the token store to host batches",
    "train": "the training step, next to PyTorch's and a bare matmul",
    "decode": "greedy decoding, next to transformers' `generate`",
    "attention": "attention backends on this machine's CPU or GPU",
    "checkpoint": "time and memory of a save, and time of a restart",
}
"""Name -> one-line help. jaxcoder/benchmarks/NAME.py has `add_arguments(parser)` and `run(args) -> Report`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from jaxcoder.benchmarks.measure import add_output_argument

    names = parser.add_subparsers(dest="name", metavar="BENCHMARK", required=True)
    for name, summary in BENCHMARKS.items():
        benchmark = names.add_parser(name, help=summary)
        importlib.import_module(f"jaxcoder.benchmarks.{name}").add_arguments(benchmark)
        add_output_argument(benchmark)


def run(args: argparse.Namespace) -> int:
    from jaxcoder.benchmarks.measure import publish

    return publish(importlib.import_module(f"jaxcoder.benchmarks.{args.name}").run(args), args.output)
