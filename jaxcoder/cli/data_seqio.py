"""`jaxcoder data import-seqio`."""

import argparse

_EPILOG = """\
The examples of a registered Mixture or Task become documents, their features joined. Text is encoded with --tokenizer;
ids are passed through if their vocabulary is this very tokenizer (jaxcoder.data.seqio_tasks.CodeVocabulary) and refused
otherwise: name the text then, as in --features targets_pretokenized. Every Task is read once, whole; --examples takes
so many at the Mixture's rates instead. To mix later, import each Task into a store of its own, for data.corpora.

  jaxcoder data import-seqio my_mixture --module-import my_tasks --tokenizer tokenizer --output-dir store

Interrupted, the same command goes on. Needs the extra `seqio`: pip install 'jaxcoder[seqio]'.
"""


def add_verb(verbs) -> None:
    parser = verbs.add_parser(
        "import-seqio",
        help="turn a seqio Mixture or Task into a token store",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mixture", help="name under which seqio knows the Mixture or Task")
    parser.add_argument("--output-dir", required=True, help="where the store goes; empty, or of the same import")
    parser.add_argument(
        "--module-import", action="append", default=[], metavar="MODULE", help="module that registers it; repeatable"
    )
    parser.add_argument(
        "--features", type=lambda names: names.split(","), help="features to join, in order (default: inputs,targets)"
    )
    parser.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    parser.add_argument("--tokenizer", help="a tokenizer.json, or its directory; ids bring their own")
    parser.add_argument("--separator", default="", help="text between joined features (default: none)")
    parser.add_argument("--examples", type=int, help="so many examples, at the Mixture's rates")
    parser.add_argument("--seed", type=int, default=1234, help="decides the order of documents (default %(default)s)")
    parser.add_argument("--work-dir", help="local directory for the documents on their way (default: STORE.import)")


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
