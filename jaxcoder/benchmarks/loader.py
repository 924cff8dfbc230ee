"""`jaxcoder bench loader`: the sample stream on one core, from the token store to host batches.

Windows are read at random, as in training. A store smaller than the caches of the machine reads too fast: give a large
one with --store.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

from jaxcoder.benchmarks.measure import Report, add_runs_argument, environment, stdlib_sources, time_in_turns

SEED = 1
BATCHES_APART = 10_000
"""Between the first batches of two candidates: none finds in a cache what another has read."""
HOST_BATCHES = "host batches, with FIM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", help="token store to read; by default one is built from Python's library")
    parser.add_argument("--code-megabytes", type=float, default=40.0, help="code to read (default %(default)s)")
    parser.add_argument("--seq-len", type=int, default=8192, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a batch (default %(default)s)")
    parser.add_argument("--batches", type=int, default=48, help="batches of one run (default %(default)s)")
    add_runs_argument(parser)


def run(args: argparse.Namespace) -> Report:
    from jaxcoder.data.store import TokenStore

    with tempfile.TemporaryDirectory() as temporary:
        store = TokenStore.open(args.store) if args.store else build(Path(temporary), args.code_megabytes)
        return report(store, args, {})


def build(directory: Path, code_megabytes: float):
    from jaxcoder.data.build import build_store
    from jaxcoder.io.document import Document
    from jaxcoder.io.document_files import write_documents
    from jaxcoder.tokenizer.train import train_tokenizer

    texts = stdlib_sources(max_bytes=int(code_megabytes * 1e6))
    write_documents([Document.from_text(text, lang="python") for text in texts], directory / "code.parquet")
    return build_store(directory / "code.parquet", train_tokenizer(texts, 49152), directory / "store", seed=SEED)


def report(store, args: argparse.Namespace, others: dict[str, Callable[[int], Generator]]) -> Report:
    """Times the stages of the stream of `store`, and `others`: name -> (first batch -> iterator of batches)."""
    from jaxcoder.config.schema import DataConfig
    from jaxcoder.data.stream import SampleStream

    tokenizer, seq_len, size = store.tokenizer(), args.seq_len, args.batch_size
    rules = {"raw": DataConfig(fim_rate=0.0), "fim": DataConfig(), "mask": DataConfig(document_mask=True)}
    streams = {name: SampleStream(store, tokenizer, rule, seq_len=seq_len, seed=SEED) for name, rule in rules.items()}
    sources = others | {
        "raw windows, from the store": _windows(streams["raw"], size),
        "windows with FIM": _windows(streams["fim"], size),
        "host batches, without FIM": _batches(streams["raw"], size),
        HOST_BATCHES: _batches(streams["fim"], size),
        "the same, with document_mask": _batches(streams["mask"], size),
    }
    calls = {
        name: _Batches(source, args.batches, first=number * BATCHES_APART)
        for number, (name, source) in enumerate(sources.items())
    }
    seconds = time_in_turns(calls, runs=args.runs)
    rates = {name: seq_len * size * args.batches / taken for name, taken in seconds.items()}
    rows = [
        {"name": name, "ns": 1e9 / rate, "mtok": rate / 1e6, "ratio": rate / rates[HOST_BATCHES]}
        for name, rate in rates.items()
    ]
    return Report(
        title=f"Store to host batches of {size} windows of {seq_len} tokens, one core",
        settings={
            "store tokens": store.num_tokens, "documents": store.num_documents, "vocabulary": tokenizer.vocab_size,
            "batches": args.batches, "runs": args.runs,
        },
        columns={"name": "", "ns": "ns/token", "mtok": "Mtoken/s/core", "ratio": "x host batches"},
        rows=rows,
        targets={"15 Mtoken/s/core with FIM": rates[HOST_BATCHES] >= 15e6},
        environment=environment(["numpy", "tensorstore", "grain", "tiktoken", "tokenizers"]),
    )  # fmt: skip


class _Batches:
    """A call reads `count` batches from `source(first batch)`; the next call continues where it ended."""

    def __init__(self, source: Callable[[int], Generator], count: int, *, first: int):
        self._source, self._count, self._start = source, count, first

    def __call__(self) -> None:
        with contextlib.closing(self._source(self._start)) as batches:
            for _ in range(self._count):
                next(batches)
        self._start += self._count


def _windows(stream, size: int) -> Callable[[int], Generator]:
    def make(start: int) -> Generator:
        while True:
            yield stream.samples(start * size, (start + 1) * size)
            start += 1

    return make


def _batches(stream, size: int) -> Callable[[int], Generator]:
    from jaxcoder.data.loader import batches

    def make(start: int) -> Generator:
        with batches(stream, global_batch_size=size, first_sample=start * size) as source:
            yield from source

    return make
