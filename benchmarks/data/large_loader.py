"""The loader on a store of ten billion tokens, next to a memory map and the original's PyTorch DataLoader.

    python -m benchmarks.data.large_loader
    python -m benchmarks.data.large_loader --memory-tokens 1e9

The store (large_store.py) is too large for any cache to help. The original's DataLoader reads a memory map of the same
tokens and decodes, cuts and encodes each window as BigCode's Megatron fork does; it needs torch. Two more tables show
the tokens that accelerators consume, and the resident memory of a process that streams.
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import command
from benchmarks.data.large_store import make_large_store
from benchmarks.data.megatron_fim import megatron_fim
from jaxcoder.benchmarks import loader
from jaxcoder.benchmarks.measure import Report, Reports

MODELS = ("tiny_starcoder_py", "starcoderbase_1b", "starcoderbase_3b", "starcoderbase_7b", "starcoderbase")
CHIPS = {"TPU v5p": (459e12, 4), "H100 or H200": (989e12, 8)}
"""Dense bf16 FLOP/s of one chip, and chips of a host."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    loader.add_arguments(parser)
    parser.add_argument("--store-tokens", type=float, default=10e9, help="size of the store (default %(default).0e)")
    parser.add_argument(
        "--memory-tokens", type=float, default=1e9, help="tokens streamed to watch memory (default %(default).0e)"
    )


def run(args: argparse.Namespace) -> Reports:
    from jaxcoder.data.store import TokenStore

    with tempfile.TemporaryDirectory() as temporary:
        small = TokenStore.open(args.store) if args.store else loader.build(Path(temporary), args.code_megabytes)
        store = make_large_store(small, Path(temporary) / "large", int(args.store_tokens))
        rates = loader.report(store, args, _others(small, Path(temporary) / "tokens.bin", args))
        memory = _memory(store, args)
    own = next(row["mtok"] for row in rates.rows if row["name"] == loader.HOST_BATCHES) * 1e6
    return Reports([rates, _consumption(own), memory])


def _others(small, path: Path, args: argparse.Namespace) -> dict[str, Callable[[int], Iterator]]:
    import numpy as np

    content = small.read(0, small.num_tokens).astype(small.manifest["settings"]["dtype"])
    content.tofile(path)
    tokens, size, seq_len = np.memmap(path, content.dtype, mode="r"), args.batch_size, args.seq_len
    others = {
        "a copy of a window (memcpy)": _copies(content, seq_len, size),
        "raw windows, from a memory map": _mapped(tokens, seq_len, size),
    }
    try:
        others["PyTorch DataLoader, Megatron's FIM"] = _torch_loader(tokens, small.tokenizer(), seq_len, size)
    except ImportError:
        command.progress("torch is not installed: the original's DataLoader is left out")
    return others


def _copies(content, seq_len: int, size: int) -> Callable[[int], Iterator]:
    import numpy as np

    def make(start: int) -> Iterator:
        windows = content[: size * seq_len].reshape(size, seq_len)
        while True:
            yield [np.copy(window) for window in windows]

    return make


def _mapped(tokens, seq_len: int, size: int) -> Callable[[int], Iterator]:
    import numpy as np

    starts = np.random.default_rng(loader.SEED).integers(0, len(tokens) - seq_len - 1, (1024, size))

    def make(start: int) -> Iterator:
        while True:
            yield [tokens[s : s + seq_len + 1].astype(np.int32) for s in starts[start % 1024]]
            start += 1

    return make


def _torch_loader(tokens, tokenizer, seq_len: int, size: int) -> Callable[[int], Iterator]:
    """Batches of a PyTorch DataLoader in this process. Raises ImportError without torch."""
    data = importlib.import_module("torch.utils.data")
    import numpy as np

    from jaxcoder.config.schema import DataConfig

    permutation = np.random.default_rng(loader.SEED).permutation((len(tokens) - 1) // seq_len)
    rules = DataConfig()
    transform = megatron_fim(tokenizer, rules.fim_rate, rules.fim_spm_rate)

    class Windows(data.Dataset):
        def __len__(self):
            return 1 << 40

        def __getitem__(self, index):
            start = int(permutation[index % len(permutation)]) * seq_len
            window = tokens[start : start + seq_len + 1].astype(np.int64)
            return {"text": transform(window, seed=loader.SEED, sample=index).astype(np.int64)}

    def make(start: int) -> Iterator:
        sampler = range(start * size, 1 << 40)
        yield from data.DataLoader(Windows(), batch_size=size, sampler=sampler, num_workers=0)

    return make


def _consumption(own: float) -> Report:
    from jaxcoder.config.load import load_run
    from jaxcoder.models.flops import num_parameters, training_flops_per_token

    rows = []
    for name in MODELS:
        model = load_run(name).model
        flops = training_flops_per_token(model, model.max_seq_len)
        row = {"model": name, "parameters": f"{num_parameters(model) / 1e9:.2f}e9", "flops": flops / 1e9}
        for chip, (peak, count) in CHIPS.items():
            consumed = 0.5 * peak / flops
            row |= {
                f"{chip} chip": consumed / 1e6,
                f"{chip} host": consumed * count / 1e6,
                f"{chip} core": consumed * count / own,
            }
        rows.append(row)
    columns = {"model": "model", "parameters": "parameters", "flops": "GFLOP/token"}
    for chip, (_, count) in CHIPS.items():
        columns |= {
            f"{chip} chip": f"{chip}: Mtoken/s",
            f"{chip} host": f"x {count}",
            f"{chip} core": "share of a core",
        }
    return Report(
        title="Tokens consumed at 50 % of peak, windows of 8192, and the share of one core that feeds a host",
        settings={"Mtoken/s/core of the loader": round(own / 1e6, 1)},
        columns=columns,
        rows=rows,
        environment={f"peak of a {chip}": f"{peak / 1e12:.0f} TFLOP/s bf16" for chip, (peak, _) in CHIPS.items()},
    )


def _memory(store, args: argparse.Namespace) -> Report:
    tokens, seq_len = str(int(args.memory_tokens)), str(args.seq_len)
    done = command.run_module("benchmarks.data.loader_memory", store.path, tokens, seq_len)
    done.check_returncode()
    figures = json.loads(done.stdout)
    settled, last = figures[len(figures) // 2]["megabytes"], figures[-1]["megabytes"]
    return Report(
        title=f"Resident memory of a process that streams from a store of {store.num_tokens:,} tokens",
        settings={"growth in the second half, MB": round(last - settled, 1)},
        columns={"mtok": "Mtoken streamed", "megabytes": "MB"},
        rows=[{"mtok": f"{row['tokens'] / 1e6:,.0f}", "megabytes": row["megabytes"]} for row in figures],
        targets={"flat: less than 5 % more in the second half": last < 1.05 * settled},
    )


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
