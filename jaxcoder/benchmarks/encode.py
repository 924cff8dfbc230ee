"""`jaxcoder bench encode`: text to ids on one core, tiktoken's path beside the `tokenizers` library, on real files.

Both have to give the same ids for every file, or there is no result.
"""

import argparse

from jaxcoder.benchmarks.measure import Report, environment, side_by_side, stdlib_sources
from jaxcoder.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", help="directory or tokenizer.json; by default one is trained on the code")
    parser.add_argument("--code-megabytes", type=float, default=40.0, help="code to read (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=49152, help="of the one trained here (default %(default)s)")
    parser.add_argument("--megabytes", type=float, default=4.0, help="of it to encode (default %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="the median of so many counts (default %(default)s)")


def run(args: argparse.Namespace) -> Report:
    import tempfile

    import tokenizers

    from jaxcoder.tokenizer.encoders import tokenizers_encoder
    from jaxcoder.tokenizer.tokenizer import Tokenizer
    from jaxcoder.tokenizer.train import train_tokenizer

    everything = stdlib_sources(most_bytes=int(args.code_megabytes * 1e6))
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else train_tokenizer(everything, args.vocab_size)
    texts = everything[:: max(1, int(sum(map(len, everything)) / (args.megabytes * 1e6)))]
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        backend = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
    reference = tokenizers_encoder(backend)
    for text in texts:
        if tokenizer.encode(text) != reference(text):
            raise DataError(
                f"{tokenizer.encoder_name} and tokenizers give other ids for a text that begins {text[:40]!r}: do not "
                "build a store with this tokenizer, and report it."
            )
    ours = f"jaxcoder ({tokenizer.encoder_name})"
    theirs, batched = "tokenizers, encode", "tokenizers, encode_batch_fast"
    contestants = {
        ours: lambda: [tokenizer.encode(text) for text in texts],
        theirs: lambda: [reference(text) for text in texts],
        batched: lambda: backend.encode_batch_fast(texts, add_special_tokens=False),
    }
    seconds = side_by_side(contestants, runs=args.runs, least_seconds=0.3)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    rows = [
        {"way": name, "mb": megabytes / taken, "mtok": num_tokens / taken / 1e6, "times": seconds[theirs] / taken}
        for name, taken in seconds.items()
    ]
    return Report(
        title="Text to ids: one core, the same ids for every file",
        settings={
            "files": len(texts),
            "megabytes": round(megabytes, 2),
            "tokens": num_tokens,
            "vocabulary": tokenizer.vocab_size,
            "runs": args.runs,
        },
        columns={"way": "way", "mb": "MB/s/core", "mtok": "Mtoken/s/core", "times": "x tokenizers"},
        rows=rows,
        targets={"several MB/s/core (3)": megabytes / seconds[ours] >= 3},
        environment=environment(["tiktoken", "tokenizers"]),
    )
