"""`jaxcoder bench encode`: text to ids on one core, tiktoken next to the `tokenizers` library, on real files.

Both must give the same ids for every file.
"""

import argparse

from jaxcoder.benchmarks.fim import add_corpus_arguments, corpus
from jaxcoder.benchmarks.measure import Report, add_runs_argument, environment, time_in_turns
from jaxcoder.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_corpus_arguments(parser)
    parser.add_argument("--megabytes", type=float, default=4.0, help="of the code to encode (default %(default)s)")
    add_runs_argument(parser)


def run(args: argparse.Namespace) -> Report:
    import tempfile

    import tokenizers

    from jaxcoder.tokenizer.encoders import tokenizers_encoder

    all_texts, tokenizer = corpus(args)
    texts = all_texts[:: max(1, int(sum(map(len, all_texts)) / (args.megabytes * 1e6)))]
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        backend = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
    reference = tokenizers_encoder(backend)
    for text in texts:
        if tokenizer.encode(text) != reference(text):
            raise DataError(
                f"{tokenizer.encoder_name} and tokenizers give different ids for text that starts with {text[:40]!r}: "
                "do not build a store with this tokenizer, and report the bug."
            )
    own, baseline = f"jaxcoder ({tokenizer.encoder_name})", "tokenizers, encode"
    calls = {
        own: lambda: [tokenizer.encode(text) for text in texts],
        baseline: lambda: [reference(text) for text in texts],
        "tokenizers, encode_batch_fast": lambda: backend.encode_batch_fast(texts, add_special_tokens=False),
    }
    seconds = time_in_turns(calls, runs=args.runs, min_seconds=0.3)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    rows = [
        {"name": name, "mb": megabytes / taken, "mtok": num_tokens / taken / 1e6, "ratio": seconds[baseline] / taken}
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
        columns={"name": "", "mb": "MB/s/core", "mtok": "Mtoken/s/core", "ratio": "x tokenizers"},
        rows=rows,
        targets={"several MB/s/core (3)": megabytes / seconds[own] >= 3},
        environment=environment(["tiktoken", "tokenizers"]),
    )
