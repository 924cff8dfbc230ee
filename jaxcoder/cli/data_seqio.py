"""`jaxcoder data import-seqio`."""

import argparse

_EPILOG = """\
Each example becomes a document of its joined features. Text is encoded with --tokenizer. Ids are copied if their
vocabulary is jaxcoder.data.seqio_tasks.CodeVocabulary with the same tokenizer, else refused: select the text, as in
--features targets_pretokenized. Every Task is read once; --examples N samples N at the Mixture's rates instead. To set
rates at training time, import each Task into its own store and list the stores in data.corpora.

  jaxcoder data import-seqio my_mixture --module-import my_tasks --tokenizer tokenizer --output-dir store

The same command resumes an interrupted import. Needs the extra `seqio`.
"""


def add_verb(verbs) -> None:
    parser = verbs.add_parser(
        "import-seqio",
        help="import a seqio Mixture or Task into a token store",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mixture", help="registered name of the Mixture or Task")
    parser.add_argument("--output-dir", required=True, help="directory of the store; empty, or of the same import")
    parser.add_argument(
        "--module-import", action="append", default=[], metavar="MODULE", help="module that registers it; repeatable"
    )
    parser.add_argument(
        "--features", type=lambda names: names.split(","), help="features to join, in order (default: inputs,targets)"
    )
    parser.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    parser.add_argument("--tokenizer", help="tokenizer.json or its directory; not needed for ids")
    parser.add_argument("--separator", default="", help="text between joined features (default: none)")
    parser.add_argument("--examples", type=int, help="number of examples, at the Mixture's rates (default: all, once)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the document permutation (default %(default)s)")
    parser.add_argument("--work-dir", help="local directory for intermediate documents (default: STORE.import)")


def run(args: argparse.Namespace) -> None:
    from jaxcoder.data.seqio_import import import_seqio
    from jaxcoder.record.console import ConsoleProgress
    from jaxcoder.tokenizer.tokenizer import Tokenizer

    store = import_seqio(
        args.mixture,
        args.output_dir,
        tokenizer=Tokenizer.load(args.tokenizer) if args.tokenizer else None,
        modules=args.module_import,
        features=args.features,
        split=args.split,
        separator=args.separator,
        num_examples=args.examples,
        seed=args.seed,
        work_dir=args.work_dir,
        progress=ConsoleProgress(),
    )
    print(f"{store.path}: {store.num_tokens:,} tokens of {store.num_documents:,} documents")
    print(f"Train on it with: jaxcoder train CONFIG --data.store {store.path}")
