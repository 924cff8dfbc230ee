"""Build and inspect token stores, and trace training samples to their files.

A token store is the training data as token ids: encoded once, in a seeded random order of documents, in compressed
shards with checksums. Training reads random windows of it. Documents come as parquet or jsonl files, or directories of
them, with a column `parts` (text and special tokens) or `content` (plain text).

    jaxcoder data build corpus/train.parquet --tokenizer tokenizer --output-dir store
    jaxcoder data build corpus/held_out.parquet --tokenizer tokenizer --output-dir held-out-store
    jaxcoder data inspect store --picture lengths.png
    jaxcoder data show quickstart --data store --step 1
    jaxcoder data trace runs/my-run --step 120

A build uses all cores, with half a gigabyte of memory each. The same command resumes an interrupted build, and returns
at once for a finished one. The bytes do not depend on the number of workers.
Paths may be local, gs:// or s3:// (for these, install jaxcoder[gcs] or jaxcoder[s3]).
"""

import argparse

from jaxcoder.cli import data_look, data_seqio


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="{build,inspect,show,trace,import-seqio}")

    build = verbs.add_parser("build", help="encode documents into a token store")
    build.add_argument("documents", nargs="+", help="parquet or jsonl files, or directories of them")
    build.add_argument("--tokenizer", required=True, help="a tokenizer.json, or the directory that holds one")
    build.add_argument("--output-dir", required=True, help="directory of the store; empty, or of the same build")
    build.add_argument("--seed", type=int, default=1234, help="seed of the document permutation (default %(default)s)")
    build.add_argument("--workers", type=int, metavar="N", help="local processes (default: one per core)")
    build.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="use a Ray cluster: its address, or the running one (needs the extra `cluster`)",
    )
    build.add_argument(
        "--max-document-bytes",
        type=int,
        default=64 << 20,
        metavar="N",
        help="maximum size of a document; a worker needs 50 times this memory (default %(default)s)",
    )

    data_look.add_verbs(verbs)
    data_seqio.add_verb(verbs)


def run(args: argparse.Namespace) -> None:
    actions = {"build": _build, "inspect": data_look.inspect, "show": data_look.show, "trace": data_look.trace}
    actions["import-seqio"] = data_seqio.run
    actions[args.data_verb](args)


def _build(args: argparse.Namespace) -> None:
    from jaxcoder.data.build import build_store
    from jaxcoder.record.console import ConsoleProgress
    from jaxcoder.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    mapper = _mapper(args)
    progress = ConsoleProgress()
    try:
        store = build_store(
            args.documents,
            tokenizer,
            args.output_dir,
            seed=args.seed,
            progress=progress,
            mapper=mapper,
            max_document_bytes=args.max_document_bytes,
        )
    finally:
        progress.close()
        if mapper is not None:
            mapper.close()
    print(data_look.summary(store))
    print(f"Train on it with: jaxcoder train CONFIG --data.store {store.path}")


def _mapper(args: argparse.Namespace):
    from jaxcoder.errors import ConfigError
    from jaxcoder.tasks import ProcessPool, RayCluster

    if args.ray is not None:
        if args.workers is not None:
            raise ConfigError("--workers is for local processes and --ray for a cluster: give one of them.")
        return RayCluster(args.ray)
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}: give 1 or more.")
    return None if args.workers is None else ProcessPool(args.workers)
