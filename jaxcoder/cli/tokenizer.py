"""Train, inspect and compare tokenizers.

A tokenizer is trained on documents: the files that `jaxcoder corpus gather` writes, or any parquet or .jsonl file with
a column `content`. It is a byte-level BPE like StarCoder's, in files that `transformers` reads too.

  jaxcoder tokenizer train corpus/train.parquet --output-dir tokenizer --vocab-size 4096
  jaxcoder tokenizer show tokenizer --text "def f(x): return x + 12"
  jaxcoder tokenizer report corpus/held_out.parquet --tokenizer tokenizer --output report.png
"""

import argparse
from pathlib import Path

from jaxcoder.formatting import format_bytes, format_table

_TRAIN_EPILOG = """\
The vocabulary includes the 19 special tokens (ids 0 to 18) and all 256 bytes. StarCoder's has 49152 entries; a small
model needs fewer: the quickstart uses 4096. More text than 64 MB hardly changes the result, so larger inputs
are sampled evenly and reproducibly; --max-megabytes changes the limit. 8192 tokens from 20 MB take about 5 seconds,
49152 from 64 MB about 17.

  jaxcoder tokenizer train corpus/train.parquet --output-dir tokenizer --vocab-size 4096

Next: jaxcoder data build corpus/train.parquet --tokenizer tokenizer --output-dir store
"""

_SHOW_EPILOG = """\
Text that spells a special token is encoded as ordinary text; special tokens enter through documents only.

  jaxcoder tokenizer show tokenizer --text "x = 12"
"""

_REPORT_EPILOG = """\
Bytes per token by language, ids that the corpus never uses, the longest tokens, and the share of tokens that are only
digits or only whitespace. --tokenizer takes any tokenizer.json, also WordPiece and Unigram, and can be repeated.
"exact" is the share of the text that encoding and decoding leaves unchanged: a tokenizer that drops text has fewer
tokens than it needs. More text than --max-megabytes is sampled evenly and reproducibly, in complete documents.

  jaxcoder tokenizer report corpus/held_out.parquet --tokenizer tokenizer --tokenizer other/tokenizer.json \\
      --output report.png --output report.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    train = verbs.add_parser("train", help="learn a vocabulary from documents", epilog=_TRAIN_EPILOG)
    train.add_argument("documents", nargs="+", help="parquet or .jsonl files, or directories of them")
    train.add_argument(
        "--output-dir", required=True, type=Path, help="directory to write; new, empty, or a tokenizer's"
    )
    train.add_argument("--vocab-size", type=int, default=49152, help="number of tokens (default: %(default)s)")
    train.add_argument("--max-megabytes", type=float, default=64.0, help="text to read (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="sampling seed for larger inputs (default: %(default)s)")
    train.add_argument("--overwrite", action="store_true", help="replace the tokenizer in --output-dir")
    show = verbs.add_parser("show", help="describe a tokenizer, and encode a text", epilog=_SHOW_EPILOG)
    show.add_argument("tokenizer", type=Path, help="directory or tokenizer.json")
    show.add_argument("--text", help="text to encode")
    report = verbs.add_parser("report", help="compare tokenizers on a corpus", epilog=_REPORT_EPILOG)
    report.add_argument("documents", nargs="+", help="parquet or .jsonl files, or directories of them")
    report.add_argument("--tokenizer", action="append", required=True, help="tokenizer.json or directory; repeatable")
    report.add_argument("--output", action="append", default=[], metavar="FILE", help=".png or .json file; repeatable")
    report.add_argument("--max-megabytes", type=float, default=64.0, help="text to measure (default: %(default)s)")
    report.add_argument("--seed", type=int, default=0, help="sampling seed for larger corpora (default: %(default)s)")


def run(args: argparse.Namespace) -> int | None:
    return {"train": _train, "show": _show, "report": _report}[args.verb](args)


def _train(args: argparse.Namespace) -> None:
    from jaxcoder.errors import ConfigError
    from jaxcoder.record.console import ConsoleProgress
    from jaxcoder.tokenizer.portable import check_output_directory
    from jaxcoder.tokenizer.train import sample_texts, train_tokenizer

    if not 0 < args.max_megabytes < float("inf"):
        raise ConfigError(f"--max-megabytes is {args.max_megabytes}, but must be a positive number.")
    check_output_directory(args.output_dir, overwrite=args.overwrite)
    texts = sample_texts(args.documents, max_bytes=int(args.max_megabytes * 1e6), seed=args.seed)
    tokenizer = train_tokenizer(texts, args.vocab_size, ConsoleProgress())
    tokenizer.save(args.output_dir)
    if tokenizer.vocab_size < args.vocab_size:
        print(f"The text has pairs for {tokenizer.vocab_size} tokens only, not {args.vocab_size}: use that vocab_size.")
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


def _report(args: argparse.Namespace) -> None:
    from jaxcoder.errors import ConfigError
    from jaxcoder.record.console import ConsoleProgress
    from jaxcoder.tokenizer.report import check_output, tokenizer_report

    if not 0 < args.max_megabytes < float("inf"):
        raise ConfigError(f"--max-megabytes is {args.max_megabytes}, but must be a positive number.")
    for output in args.output:
        check_output(output)
    report = tokenizer_report(
        args.documents,
        args.tokenizer,
        max_bytes=int(args.max_megabytes * 1e6),
        seed=args.seed,
        progress=ConsoleProgress(),
    )
    print(_report_text(report))
    for output in args.output:
        report.write(output)
        print(f"Wrote {output}")


def _report_text(report, most_languages: int = 20) -> str:
    """The report for a terminal: two tables, and the longest tokens."""
    sample, measured = report.sample, report.measured
    everything = sample.num_documents == sample.corpus_documents or sample.num_bytes == sample.corpus_bytes
    extent = "all of it" if everything else f"a sample of {format_bytes(sample.corpus_bytes)}, seed {sample.seed}"
    languages = report.languages()
    rows = [
        [language, measured[0].languages[language][1] / 2**20, *(report.bytes_per_token(m, language) for m in measured)]
        for language in languages[:most_languages]
    ]
    rows.append(["all", sample.num_bytes / 2**20, *(report.bytes_per_token(m) for m in measured)])
    left_out = len(languages) - most_languages
    totals = [
        [
            m.name,
            m.vocab_size,
            m.num_tokens,
            f"{len(m.unused):,} ({len(m.unused) / max(len(m.tokens), 1):.1%})",
            *(f"{m.share(kind)[0]:.1%} ({m.share(kind)[1]:.1%})" for kind in ("digits", "whitespace")),
            f"{m.exact_bytes / max(m.num_bytes, 1):.2%}",
        ]
        for m in measured
    ]
    longest = [
        f"{m.name}: " + "  ".join(f"{_compact(token)} ({uses:,})" for _, token, uses in m.longest(8)) for m in measured
    ]
    return "\n".join(
        [
            f"{format_bytes(sample.num_bytes)} of text in {sample.num_documents:,} documents ({extent})",
            "",
            "Bytes per token" + (f", {left_out} smaller languages not shown" if left_out > 0 else ""),
            format_table(["language", "MiB", *(m.name for m in measured)], rows),
            "",
            "Share of tokens (of bytes) that are only digits, only whitespace",
            format_table(["tokenizer", "ids", "tokens", "unused", "digits", "whitespace", "exact"], totals),
            "",
            "Longest tokens (uses)",
            *longest,
        ]
    )


def _compact(token: bytes) -> str:
    """A token as a Python string, in which runs of one character are counted: '\\n' ' '*48."""
    import re

    text = token.decode(errors="replace")
    return " ".join(
        f"{run[1]!r}*{len(run[0])}" if run[1] else repr(run[0])
        for run in re.finditer(r"(.)\1{5,}|(?:(?!(.)\2{5,}).)+", text, re.DOTALL)
    )
