"""train a tokenizer, or try one

A tokenizer is trained on documents: the files that `jaxcoder corpus gather` writes, or any parquet or .jsonl file with
a column `content`. It is a byte-level BPE like StarCoder's, saved in files that `transformers` and others open too.

  jaxcoder tokenizer train corpus/train.parquet --output-dir tokenizer --vocab-size 8192
  jaxcoder tokenizer show tokenizer --text "def f(x): return x + 12"
"""

import argparse
from pathlib import Path

_TRAIN_EPILOG = """\
The vocabulary counts the 19 special tokens (ids 0 to 18) and all 256 bytes. StarCoder's has 49152 entries; a small
model does better with fewer: the quickstart takes 4096. More text than 64 MB hardly changes the result, so of larger
inputs an even sample is read, always the same one; --max-megabytes changes that. 8192 tokens from 20 MB take about 5
seconds, 49152 from 64 MB about 17.

  jaxcoder tokenizer train corpus/train.parquet --output-dir tokenizer --vocab-size 8192

Next: jaxcoder data build corpus/train.parquet --tokenizer tokenizer --output-dir store
"""

_SHOW_EPILOG = """\
Text that spells a special token is encoded as ordinary text; special tokens enter through documents only.

  jaxcoder tokenizer show tokenizer --text "x = 12"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    train = verbs.add_parser("train", help="learn a vocabulary from documents", epilog=_TRAIN_EPILOG)
    train.add_argument("documents", nargs="+", help="parquet or .jsonl files, or directories of them")
    train.add_argument("--output-dir", required=True, type=Path, help="where to write; new, empty, or a tokenizer's")
    train.add_argument("--vocab-size", type=int, default=49152, help="tokens in all (default: %(default)s)")
    train.add_argument("--max-megabytes", type=float, default=64.0, help="text to read (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="of the sample of larger inputs (default: %(default)s)")
    train.add_argument("--overwrite", action="store_true", help="replace the tokenizer in --output-dir")
    show = verbs.add_parser("show", help="what a tokenizer is, and how it cuts a text", epilog=_SHOW_EPILOG)
    show.add_argument("tokenizer", type=Path, help="directory or tokenizer.json")
    show.add_argument("--text", help="text to encode")


def run(args: argparse.Namespace) -> int | None:
    return _train(args) if args.verb == "train" else _show(args)


def _train(args: argparse.Namespace) -> None:
    from jaxcoder.errors import ConfigError
    from jaxcoder.observability.console import ConsoleProgress
    from jaxcoder.tokenizer.portable import check_output_directory
    from jaxcoder.tokenizer.train import sample_texts, train_tokenizer

    if not 0 < args.max_megabytes < float("inf"):
        raise ConfigError(f"--max-megabytes is {args.max_megabytes}, but it must be a positive number.")
    check_output_directory(args.output_dir, overwrite=args.overwrite)
    texts = sample_texts(args.documents, max_bytes=int(args.max_megabytes * 1e6), seed=args.seed)
    tokenizer = train_tokenizer(texts, args.vocab_size, ConsoleProgress())
    tokenizer.save(args.output_dir)
    if tokenizer.vocab_size < args.vocab_size:
        print(
            f"The text had pairs for {tokenizer.vocab_size} tokens only, not {args.vocab_size}: a model for this "
            f"tokenizer needs no more than that."
        )
    print(f"Wrote the tokenizer ({tokenizer.vocab_size} tokens) to {args.output_dir}")


def _show(args: argparse.Namespace) -> None:
    from jaxcoder.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    why = f" ({tokenizer.encoder_reason})" if tokenizer.encoder_reason else ""
    print(f"{tokenizer.vocab_size} tokens, {len(tokenizer.special_ids)} special; encoder {tokenizer.encoder_name}{why}")
    print(f"fingerprint {tokenizer.fingerprint}")
    if args.text is not None:
        for id_ in tokenizer.encode(args.text):
            print(f"{id_:>7}  {tokenizer.decode_bytes([id_])!r}".replace("  b", "  ", 1))
