"""`jaxcoder bench fim`: fill-in-the-middle on windows of cached ids, beside decoding and encoding whole pieces.

The windows are real code, tokenized and laid end to end as in a token store. Nothing is read and nothing batched here:
this is the bare loop over windows in memory (`jaxcoder bench loader` measures the whole stream).
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace

from jaxcoder.benchmarks.measure import Report, environment, side_by_side, stdlib_sources

_SEED = 1
_CLEAN_UP = (".", "?", "!", ",")
_CLEAN_UP_CONTRACTIONS = ("n't", "'m", "'s", "'ve", "'re")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", help="directory or tokenizer.json; by default one is trained on the code")
    parser.add_argument("--code-megabytes", type=float, default=40.0, help="code to read (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=49152, help="of the one trained here (default %(default)s)")
    parser.add_argument("--windows", type=int, default=64, help="windows to transform (default %(default)s)")
    parser.add_argument("--seq-len", type=int, default=8192, help="a window has one token more (default %(default)s)")
    parser.add_argument("--fim-rate", type=float, default=0.5, help="share of pieces (default %(default)s; try 1)")
    parser.add_argument("--runs", type=int, default=5, help="the median of so many counts (default %(default)s)")


def run(args: argparse.Namespace) -> Report:
    import numpy as np

    from jaxcoder.config.schema import DataConfig
    from jaxcoder.config.variant import SWITCHES
    from jaxcoder.data.fim import Fim
    from jaxcoder.data.fim_text import TextCutter
    from jaxcoder.tokenizer.tokenizer import Tokenizer
    from jaxcoder.tokenizer.train import train_tokenizer

    texts = stdlib_sources(most_bytes=int(args.code_megabytes * 1e6))
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else train_tokenizer(texts, args.vocab_size)
    windows, pieces = _windows(texts, tokenizer, args.windows, args.seq_len)
    rules = DataConfig(fim_rate=args.fim_rate)
    as_trained = replace(rules, **dict.fromkeys(SWITCHES, True))
    transforms = {
        "no piece is cut (floor of the loop)": Fim(tokenizer, replace(rules, fim_rate=1e-18)),
        "from cached ids": Fim(tokenizer, rules),
        "whole pieces again, with tiktoken": Fim(tokenizer, rules, cut=TextCutter(tokenizer)),
        "whole pieces again, as trained": Fim(tokenizer, as_trained),
        "Megatron's way, with tokenizers": megatron_way(tokenizer, args.fim_rate, rules.fim_spm_rate),
    }
    floor, ours, whole, trained, theirs = transforms
    _check_equal(windows, transforms[ours], transforms[whole])
    _check_equal(windows[:8], transforms[trained], transforms[theirs])

    def loop(transform):
        return lambda: [transform(window, seed=_SEED, sample=i) for i, window in enumerate(windows)]

    contestants = {name: loop(transform) for name, transform in transforms.items()}
    contestants["a copy of the windows"] = lambda: [np.copy(window) for window in windows]
    seconds = side_by_side(contestants, runs=args.runs, least_seconds=0.3)
    num_tokens = sum(map(len, windows))
    rates = {name: num_tokens / taken for name, taken in seconds.items()}
    rows = [
        {"way": name, "ns": 1e9 / rate, "mtok": rate / 1e6, "times": rate / rates[theirs]}
        for name, rate in rates.items()
    ]
    return Report(
        title=f"FIM on windows of {args.seq_len} + 1 tokens, rate {args.fim_rate}: the bare loop, one core",
        settings={
            "tokens": num_tokens,
            "pieces": pieces,
            "vocabulary": tokenizer.vocab_size,
            "encoder": tokenizer.encoder_name,
            "runs": args.runs,
        },
        columns={"way": "way", "ns": "ns/token", "mtok": "Mtoken/s/core", "times": "x Megatron's"},
        rows=rows,
        targets={
            "10 times as fast as Megatron's way": rates[ours] >= 10 * rates[theirs],
            "20 Mtoken/s/core": rates[ours] >= 20e6,
        },
        environment=environment(["numpy", "tiktoken", "tokenizers"]),
    )


def _windows(texts: list[str], tokenizer, count: int, seq_len: int):
    """Documents in random order, laid end to end and cut into windows that share a token; and the number of pieces."""
    import numpy as np

    order = random.Random(_SEED).sample(range(len(texts)), len(texts))
    ids: list[int] = []
    while len(ids) < count * seq_len + 1:  # again from the first, should there be too little code
        for number in order:
            ids += [*tokenizer.encode(texts[number]), tokenizer.eos_id]
            if len(ids) > count * seq_len:
                break
    stream = np.array(ids, np.int32)
    windows = [stream[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)]
    return windows, sum(int((window == tokenizer.eos_id).sum()) + 1 for window in windows)


def _check_equal(windows, one: Callable, other: Callable) -> None:
    for number, window in enumerate(windows):
        first, second = (transform(window, seed=_SEED, sample=number) for transform in (one, other))
        if first.tolist() != second.tolist():
            raise AssertionError(f"two ways that must give the same ids differ in window {number}")


def megatron_way(tokenizer, fim_rate: float, fim_spm_rate: float) -> Callable:
    """What BigCode's Megatron-LM fork does with a window, by the `tokenizers` library; the cuts are drawn as ours.

    Pieces are decoded (with the clean-up of spaces that `transformers` then had), cut, and encoded part by part.
    """
    import tempfile

    import numpy as np
    import tokenizers

    from jaxcoder.data.fim import draw_fim
    from jaxcoder.data.randomness import happens

    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        backend = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
    fim, end_id = tokenizer.fim, tokenizer.eos_id

    def detokenize(ids):
        text = backend.decode(ids, skip_special_tokens=False)
        for mark in _CLEAN_UP:
            text = text.replace(f" {mark}", mark)
        text = text.replace(" ' ", "'")
        for contraction in _CLEAN_UP_CONTRACTIONS:
            text = text.replace(f" {contraction}", contraction)
        return text

    def tokenize(text):
        return np.array(backend.encode(text, add_special_tokens=False).ids, np.int64)

    def permute(ids, draw):
        if not happens(draw.transform, fim_rate):
            return ids
        text = detokenize(ids)
        first, second = draw.cuts(len(text))
        prefix, middle, suffix = tokenize(text[:first]), tokenize(text[first:second]), tokenize(text[second:])
        if happens(draw.order, fim_spm_rate):
            return np.concatenate([[fim.prefix, fim.suffix], suffix, [fim.middle], prefix, middle])
        return np.concatenate([[fim.prefix], prefix, [fim.suffix], suffix, [fim.middle], middle])

    def transform(window, *, seed, sample):
        draw_of = draw_fim(seed, sample)
        start, parts = 0, []
        ends = np.flatnonzero(window == end_id).tolist()
        for number, stop in enumerate(ends):
            if stop > start:
                parts += [permute(window[start:stop], draw_of(number)), [end_id]]
            start = stop + 1
        parts.append(permute(window[start:], draw_of(len(ends))))
        result = np.concatenate(parts)[: len(window)]
        return np.pad(result, (0, len(window) - len(result)), constant_values=fim.pad)

    return transform
