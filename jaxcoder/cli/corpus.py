"""Gather source trees into filtered, deduplicated documents.

Source files are filtered by StarCoder's rules, deduplicated exactly, and split by top-level package into training and
held-out documents. Without --source, the input is the standard library and site-packages of the running Python.

  jaxcoder corpus gather --output-dir corpus
  jaxcoder corpus gather --source ~/projects --language python --language c --output-dir corpus
"""

import argparse
from pathlib import Path

_GATHER_EPILOG = """\
Writes train.parquet, held_out.parquet (columns content, repo_name, path, lang) and manifest.json. The same files and
options always give the same bytes. After an interruption, run the same command again.

  jaxcoder corpus gather --source ~/projects --output-dir corpus

Next: jaxcoder tokenizer train corpus/train.parquet --output-dir tokenizer --vocab-size 4096
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    gather = verbs.add_parser("gather", help="gather source files into documents", epilog=_GATHER_EPILOG)
    gather.add_argument("--source", action="append", type=Path, metavar="DIR", help="directory of code (repeatable)")
    gather.add_argument(
        "--output-dir", required=True, type=Path, metavar="DIR", help="where to write; new, empty, or this corpus"
    )
    gather.add_argument(
        "--language",
        action="append",
        metavar="NAME",
        help='one of StarCoder\'s languages, or "all" (repeatable; default: python)',
    )
    gather.add_argument(
        "--held-out-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the bytes held out (default: %(default)s)",
    )
    gather.add_argument("--max-megabytes", type=float, metavar="MB", help="maximum amount of text (default: no limit)")
    gather.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the choice of held-out packages (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int | None:
    from jaxcoder.corpus.gather import gather
    from jaxcoder.errors import ConfigError
    from jaxcoder.record.console import ConsoleProgress

    if args.max_megabytes is not None and not 0 < args.max_megabytes < float("inf"):
        raise ConfigError(f"--max-megabytes is {args.max_megabytes}, but must be a positive number.")
    summary = gather(
        args.source,
        args.output_dir,
        languages=args.language or ("python",),
        held_out_fraction=args.held_out_fraction,
        max_bytes=None if args.max_megabytes is None else int(args.max_megabytes * 1e6),
        seed=args.seed,
        progress=ConsoleProgress(),
    )
    print("\n".join(summary.lines()))
    return None
