"""Build a token store from documents, or look into one.

A token store is the training data as token ids: encoded once, in a seeded random order of documents, in compressed
shards with checksums. Training reads random windows of it. Documents come as parquet or jsonl files, or directories of
them, with a column `parts` (text and special tokens) or `content` (plain text).

    jaxcoder data build corpus/train.parquet --tokenizer tokenizer --output-dir store
    jaxcoder data build corpus/held_out.parquet --tokenizer tokenizer --output-dir held-out-store
    jaxcoder data inspect store

A build that was interrupted is completed by the same command; a finished one is recognised and returns at once.
Paths may be local, gs:// or s3:// (for these, install gcsfs or s3fs).
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `data build` and `data inspect`."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="{build,inspect}")

    build = verbs.add_parser("build", help="encode documents into a token store")
    build.add_argument("documents", nargs="+", help="parquet or jsonl files, or directories of them")
    build.add_argument("--tokenizer", required=True, help="a tokenizer.json, or the directory that holds one")
    build.add_argument("--output-dir", required=True, help="where the store goes; empty, or of the same build")
    build.add_argument("--seed", type=int, default=1234, help="decides the order of documents (default %(default)s)")

    inspect = verbs.add_parser("inspect", help="say what a token store holds")
    inspect.add_argument("store", help="directory of the store")
    inspect.add_argument("--verify", action="store_true", help="compare every file with its hash (reads all of it)")


def run(args: argparse.Namespace) -> int | None:
    """Carry out the verb."""
    if args.data_verb == "build":
        _build(args)
    else:
        _inspect(args)


def _build(args: argparse.Namespace) -> None:
    from jaxcoder.data.build import build_store
    from jaxcoder.observability.console import ConsoleProgress
    from jaxcoder.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    store = build_store(args.documents, tokenizer, args.output_dir, seed=args.seed, progress=ConsoleProgress())
    print(_summary(store))
    print(f"Train on it with: jaxcoder train CONFIG --data.store {store.path}")


def _inspect(args: argparse.Namespace) -> None:
    from jaxcoder.data.store import TokenStore

    store = TokenStore.open(args.store)
    if args.verify:
        store.verify()
        print(f"All {len(store.manifest['files'])} files are as they were written.")
    print(_summary(store))
    print(_languages(store))


def _summary(store) -> str:
    on_disk = sum(entry["bytes"] for entry in store.manifest["files"].values())
    inputs = ", ".join(entry["name"] for entry in store.manifest["settings"]["inputs"])
    return (
        f"{store.path}: {store.num_tokens:,} tokens of {store.num_documents:,} documents, {store.text_bytes:,} "
        f"bytes of text ({store.bytes_per_token:.2f} a token), {on_disk:,} bytes on disk\n"
        f"vocabulary {store.vocab_size:,}, tokenizer {store.tokenizer_fingerprint[:12]}, made from {inputs}"
    )


def _languages(store, most: int = 20) -> str:
    """A line for each language with its documents, tokens and bytes, the largest first."""
    import numpy as np

    lengths = np.diff(store.document_offsets)
    languages = store.documents["lang"].to_numpy(zero_copy_only=False).astype(str)
    names, of_document = np.unique(languages, return_inverse=True)
    documents = np.bincount(of_document)
    tokens = np.bincount(of_document, weights=lengths).astype(np.int64)
    text_bytes = np.bincount(of_document, weights=store.documents["text_bytes"].to_numpy()).astype(np.int64)
    lines = [f"{'language':<20}{'documents':>14}{'tokens':>18}{'bytes':>18}"]
    for row in np.argsort(-tokens)[:most]:
        lines.append(f"{names[row] or '(none)':<20}{documents[row]:>14,}{tokens[row]:>18,}{text_bytes[row]:>18,}")
    if len(names) > most:
        lines.append(f"and {len(names) - most} more")
    return "\n".join(lines)
