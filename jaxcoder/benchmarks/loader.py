"""`jaxcoder bench loader`: the whole stream, store to host batch, beside what it is made of and the original's way.

The store is real code in a store of ten billion tokens (`large_store.py`), read at random as in training: no chunk is
met twice soon enough to be in a cache. The original's way is a PyTorch DataLoader (installed by you, or left out) over a
memory map of the same tokens, whose windows are decoded, cut and encoded as in BigCode's Megatron fork.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from jaxcoder.benchmarks.measure import Report, Reports, environment, side_by_side, stdlib_sources

_SEED = 1
_APART = 10_000  # batches between the first ones of two contestants
_MODELS = ("tiny_starcoder_py", "starcoderbase_1b", "starcoderbase_3b", "starcoderbase_7b", "starcoderbase")
_CHIPS = {"TPU v5p": (459e12, 4), "H100 or H200": (989e12, 8)}
"""Dense bf16 FLOP/s of one and how many share a host."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", help="token store to take the content from; by default one is built of Python's code"
    )
    parser.add_argument("--code-megabytes", type=float, default=40.0, help="code to read (default %(default)s)")
    parser.add_argument(
        "--store-tokens", type=float, default=10e9, help="size it is made to look (default %(default).0e)"
    )
    parser.add_argument("--seq-len", type=int, default=8192, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a batch (default %(default)s)")
    parser.add_argument("--batches", type=int, default=48, help="batches of one count (default %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="the median of so many counts (default %(default)s)")
    parser.add_argument(
        "--memory-tokens", type=float, default=1e9, help="tokens streamed to watch memory (default %(default).0e)"
    )


def run(args: argparse.Namespace) -> Reports:
    from jaxcoder.benchmarks.large_store import make_large_store
    from jaxcoder.data.store import TokenStore

    with tempfile.TemporaryDirectory() as temporary:
        small = TokenStore.open(args.store) if args.store else _build(Path(temporary), args.code_megabytes)
        store = make_large_store(small, Path(temporary) / "large", int(args.store_tokens))
        rates = _speed(store, small, args)
        memory = _memory(store, args)
    ours = next(row["mtok"] for row in rates.rows if row["way"] == _OURS) * 1e6
    return Reports([rates, _appetite(ours), memory])


def _build(directory: Path, code_megabytes: float):
    from jaxcoder.data.build import build_store
    from jaxcoder.io.document import Document
    from jaxcoder.io.document_files import write_documents
    from jaxcoder.tokenizer.train import train_tokenizer

    texts = stdlib_sources(most_bytes=int(code_megabytes * 1e6))
    write_documents([Document.from_text(text, lang="python") for text in texts], directory / "code.parquet")
    return build_store(directory / "code.parquet", train_tokenizer(texts, 49152), directory / "store", seed=_SEED)


# --- speed -----------------------------------------------------------------------------------------------------------

_OURS = "host batches, with FIM"


def _speed(store, small, args: argparse.Namespace) -> Report:
    from jaxcoder.config.schema import DataConfig
    from jaxcoder.data.stream import SampleStream

    tokenizer, seq_len, size = store.tokenizer(), args.seq_len, args.batch_size
    with_fim = DataConfig()
    rules = {"raw": replace(with_fim, fim_rate=0.0), "fim": with_fim, "mask": replace(with_fim, document_mask=True)}
    streams = {name: SampleStream(store, tokenizer, rule, seq_len=seq_len, seed=_SEED) for name, rule in rules.items()}
    content = small.read(0, small.num_tokens).astype(small.manifest["settings"]["dtype"])
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        content.tofile(file.name)
        contestants = {
            "a copy of a window (memcpy)": _copies(content, seq_len, size),
            "raw windows, from a memory map": _mapped(file.name, content.dtype, seq_len, size),
            "raw windows, from the store": _windows(streams["raw"], size),
            "windows with FIM": _windows(streams["fim"], size),
            "host batches, without FIM": _batches(streams["raw"], size),
            _OURS: _batches(streams["fim"], size),
            "the same, with document_mask": _batches(streams["mask"], size),
        }
        # Each reads samples of its own: none finds in a cache what another has read.
        calls = {
            name: _Repeat(make, args.batches, first=number * _APART)
            for number, (name, make) in enumerate(contestants.items())
        }
        slow, why_not = _torch_loader(file.name, content.dtype, tokenizer, with_fim, seq_len, size)
        if slow is not None:
            calls["PyTorch DataLoader, the original's way"] = _Repeat(slow, 1, first=0)
        seconds = side_by_side(calls, runs=args.runs, least_seconds=0.0)
    tokens = {name: seq_len * size * call.times for name, call in calls.items()}
    rates = {name: tokens[name] / taken for name, taken in seconds.items()}
    rows = [
        {"way": name, "ns": 1e9 / rate, "mtok": rate / 1e6, "times": rate / rates[_OURS]}
        for name, rate in rates.items()
    ]
    if why_not:
        rows.append({"way": f"PyTorch DataLoader: {why_not}"})
    return Report(
        title=f"Store to host batches of {size} windows of {seq_len} tokens",
        settings={
            "store tokens": store.num_tokens,
            "documents": store.num_documents,
            "vocabulary": tokenizer.vocab_size,
            "batches": args.batches,
            "runs": args.runs,
        },
        columns={"way": "way", "ns": "ns/token", "mtok": "Mtoken/s/core", "times": "x ours"},
        rows=rows,
        targets={"15 Mtoken/s/core with FIM": rates[_OURS] >= 15e6},
        environment=environment(["numpy", "tensorstore", "grain", "tiktoken", "tokenizers"]),
    )


class _Repeat:
    """One count: `make(start)` iterates batches from a batch on; each count goes on where the one before ended."""

    def __init__(self, make: Callable[[int], Iterator], times: int, *, first: int):
        self._make, self.times, self._start = make, times, first

    def __call__(self) -> None:
        source = self._make(self._start)
        for _ in range(self.times):
            next(source)
        source.close()
        self._start += self.times


def _windows(stream, size: int) -> Callable[[int], Iterator]:
    def make(start: int) -> Iterator:
        while True:
            yield stream.samples(start * size, (start + 1) * size)
            start += 1

    return make


def _batches(stream, size: int) -> Callable[[int], Iterator]:
    from jaxcoder.data.loader import batches

    def make(start: int) -> Iterator:
        with batches(stream, global_batch_size=size, first_sample=start * size) as source:
            yield from source

    return make


def _copies(content, seq_len: int, size: int) -> Callable[[int], Iterator]:
    import numpy as np

    def make(start: int) -> Iterator:
        windows = content[: size * seq_len].reshape(size, seq_len)
        while True:
            yield [np.copy(window) for window in windows]

    return make


def _mapped(path: str, dtype, seq_len: int, size: int) -> Callable[[int], Iterator]:
    import numpy as np

    tokens = np.memmap(path, dtype, mode="r")
    starts = np.random.default_rng(_SEED).integers(0, len(tokens) - seq_len - 1, (1024, size))

    def make(start: int) -> Iterator:
        while True:
            yield [tokens[s : s + seq_len + 1].astype(np.int32) for s in starts[start % 1024]]
            start += 1

    return make


def _torch_loader(path: str, dtype, tokenizer, rules, seq_len: int, size: int):
    """(batches of a PyTorch DataLoader in this process, None), or (None, why there are none)."""
    try:
        data = importlib.import_module("torch.utils.data")  # by name: the package does not depend on torch
    except ImportError as error:
        return None, f"left out, {error}"
    import numpy as np

    from jaxcoder.benchmarks.fim import megatron_way

    tokens = np.memmap(path, dtype, mode="r")
    order = np.random.default_rng(_SEED).permutation((len(tokens) - 1) // seq_len)
    permute = megatron_way(tokenizer, rules.fim_rate, rules.fim_spm_rate)

    class Windows(data.Dataset):
        def __len__(self):
            return 1 << 40

        def __getitem__(self, index):
            start = int(order[index % len(order)]) * seq_len
            window = tokens[start : start + seq_len + 1].astype(np.int64)
            return {"text": permute(window, seed=_SEED, sample=index).astype(np.int64)}

    def make(start: int) -> Iterator:
        sampler = range(start * size, 1 << 40)
        return (batch for batch in data.DataLoader(Windows(), batch_size=size, sampler=sampler, num_workers=0))

    return make, None


# --- what accelerators eat -------------------------------------------------------------------------------------------


def _appetite(ours: float) -> Report:
    from jaxcoder.config.load import load_run
    from jaxcoder.models.flops import num_parameters, training_flops_per_token

    rows = []
    for name in _MODELS:
        model = load_run(name).model
        flops = training_flops_per_token(model, model.max_seq_len)
        row = {"model": name, "parameters": f"{num_parameters(model) / 1e9:.2f}e9", "flops": flops / 1e9}
        for chip, (peak, count) in _CHIPS.items():
            eats = 0.5 * peak / flops
            row |= {f"{chip} chip": eats / 1e6, f"{chip} host": eats * count / 1e6, f"{chip} core": eats * count / ours}
        rows.append(row)
    columns = {"model": "model", "parameters": "parameters", "flops": "GFLOP/token"}
    for chip, (_, count) in _CHIPS.items():
        columns |= {
            f"{chip} chip": f"{chip}: Mtoken/s",
            f"{chip} host": f"x {count}",
            f"{chip} core": "share of a core",
        }
    return Report(
        title="What accelerators eat at 50 % of their peak, windows of 8192, and the share of one core that feeds a host",
        settings={"our Mtoken/s/core": round(ours / 1e6, 1)},
        columns=columns,
        rows=rows,
        targets={},
        environment={f"peak of a {chip}": f"{peak / 1e12:.0f} TFLOP/s bf16" for chip, (peak, _) in _CHIPS.items()},
    )


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory(store, args: argparse.Namespace) -> Report:
    command = [sys.executable, "-m", "jaxcoder.benchmarks.loader_memory", store.path]
    done = subprocess.run(
        [*command, str(int(args.memory_tokens)), str(args.seq_len)], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)
    settled, last = figures[len(figures) // 2]["megabytes"], figures[-1]["megabytes"]
    return Report(
        title=f"Resident memory of a process that streams from a store of {store.num_tokens:,} tokens",
        settings={"growth in the second half, MB": round(last - settled, 1)},
        columns={"mtok": "Mtoken streamed", "megabytes": "MB"},
        rows=[{"mtok": f"{row['tokens'] / 1e6:,.0f}", "megabytes": row["megabytes"]} for row in figures],
        targets={"flat: less than 5 % more in the second half": last < 1.05 * settled},
        environment={},
    )
