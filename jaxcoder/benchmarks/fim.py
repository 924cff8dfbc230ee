"""`jaxcoder bench fim`: fill-in-the-middle on windows of cached token ids, on one core.

The windows are real code, tokenized and packed as in a token store. Nothing is read and nothing is batched: this is the
transform alone (`jaxcoder bench loader` measures the stream).
"""

import argparse
import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from jaxcoder.benchmarks.measure import Report, add_runs_argument, environment, stdlib_sources, time_in_turns

SEED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_corpus_arguments(parser)
    parser.add_argument("--windows", type=int, default=64, help="windows to transform (default %(default)s)")
    parser.add_argument("--seq-len", type=int, default=8192, help="a window has one token more (default %(default)s)")
    parser.add_argument("--fim-rate", type=float, default=0.5, help="of pieces (default %(default)s; try 1)")
    add_runs_argument(parser)


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", help="directory or tokenizer.json; by default one is trained on the code")
    parser.add_argument("--code-megabytes", type=float, default=40.0, help="code to read (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=49152, help="of the one trained here (default %(default)s)")


def corpus(args: argparse.Namespace):
    """Texts of Python's library, and the tokenizer that the arguments name or one trained on the texts."""
    from jaxcoder.tokenizer.tokenizer import Tokenizer
    from jaxcoder.tokenizer.train import train_tokenizer

    texts = stdlib_sources(int(args.code_megabytes * 1e6))
    return texts, Tokenizer.load(args.tokenizer) if args.tokenizer else train_tokenizer(texts, args.vocab_size)


def run(args: argparse.Namespace) -> Report:
    from jaxcoder.config.schema import DataConfig
    from jaxcoder.data.fim import Fim
    from jaxcoder.data.fim_text import TextCutter

    texts, tokenizer = corpus(args)
    windows, num_pieces = make_windows(texts, tokenizer, args.windows, args.seq_len)
    rules = DataConfig(fim_rate=args.fim_rate)
    from_ids, re_encoded = Fim(tokenizer, rules), Fim(tokenizer, rules, cut=TextCutter(tokenizer))
    check_equal(windows, from_ids, re_encoded)
    transforms = {
        "no piece is transformed": Fim(tokenizer, replace(rules, fim_rate=1e-18)),
        "from cached ids": from_ids,
        "decode, cut and encode again": re_encoded,
    }
    return report(args, windows, num_pieces, tokenizer, transforms, baseline="decode, cut and encode again")


def report(args, windows, num_pieces: int, tokenizer, transforms: Mapping[str, Callable], *, baseline: str) -> Report:
    """Times the transforms, and a copy of the windows as the lower bound."""
    import numpy as np

    def loop(transform):
        return lambda: [transform(window, seed=SEED, sample=i) for i, window in enumerate(windows)]

    calls = {name: loop(transform) for name, transform in transforms.items()}
    calls["a copy of the windows"] = lambda: [np.copy(window) for window in windows]
    seconds = time_in_turns(calls, runs=args.runs, min_seconds=0.3)
    num_tokens = sum(map(len, windows))
    rates = {name: num_tokens / taken for name, taken in seconds.items()}
    rows = [
        {"name": name, "ns": 1e9 / rate, "mtok": rate / 1e6, "ratio": rate / rates[baseline]}
        for name, rate in rates.items()
    ]
    return Report(
        title=f"FIM on windows of {args.seq_len} + 1 tokens, rate {args.fim_rate}: the transform alone, one core",
        settings={
            "tokens": num_tokens, "pieces": num_pieces, "vocabulary": tokenizer.vocab_size,
            "encoder": tokenizer.encoder_name, "runs": args.runs,
        },
        columns={"name": "", "ns": "ns/token", "mtok": "Mtoken/s/core", "ratio": f"x {baseline}"},
        rows=rows,
        targets={
            f"10 times as fast as: {baseline}": rates["from cached ids"] >= 10 * rates[baseline],
            "20 Mtoken/s/core": rates["from cached ids"] >= 20e6,
        },
        environment=environment(["numpy", "tiktoken", "tokenizers"]),
    )  # fmt: skip


def make_windows(texts: list[str], tokenizer, count: int, seq_len: int):
    """Documents in random order, laid end to end and cut into windows that share a token; and the number of pieces."""
    import numpy as np

    permutation = random.Random(SEED).sample(range(len(texts)), len(texts))
    ids: list[int] = []
    while len(ids) < count * seq_len + 1:  # again from the first, should there be too little code
        for number in permutation:
            ids += [*tokenizer.encode(texts[number]), tokenizer.eos_id]
            if len(ids) > count * seq_len:
                break
    stream = np.array(ids, np.int32)
    windows = [stream[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)]
    return windows, sum(int((window == tokenizer.eos_id).sum()) + 1 for window in windows)


def check_equal(windows, one: Callable, other: Callable) -> None:
    for number, window in enumerate(windows):
        first, second = (transform(window, seed=SEED, sample=number) for transform in (one, other))
        if first.tolist() != second.tolist():
            raise AssertionError(f"two transforms that must give the same ids differ in window {number}")
