"""`jaxcoder data inspect`, `show` and `trace`."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from jaxcoder.errors import ConfigError, DataError
from jaxcoder.formatting import escape_control, format_names, format_table, plural

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from jaxcoder.config import RunConfig
    from jaxcoder.data.store import TokenStore
    from jaxcoder.data.trace import TracedRow, Tracer
    from jaxcoder.tokenizer.tokenizer import Tokenizer

_INSPECT_EPILOG = """\
  jaxcoder data inspect store --picture lengths.png
  jaxcoder data inspect store --verify              compare every file with its hash
  jaxcoder data inspect runs/my-run                 every store of a run
"""
_SHOW_EPILOG = """\
FIM parts are colored and special tokens highlighted; text that spells a special token has a backslash.

  jaxcoder data show runs/my-run --step 120
  jaxcoder data show quickstart --data store --step 1 --row 3
"""
_TRACE_EPILOG = """\
Lists the files in the batch of a step, or all completed and future steps whose batch contains a file or repository.
This needs no recorded data: a sample is an invertible function of seed and index.

  jaxcoder data trace runs/my-run --step 120
  jaxcoder data trace runs/my-run --repository octocat/hello
  jaxcoder data trace runs/my-run --file src/main.py
"""


def add_verbs(verbs) -> None:
    inspect = verbs.add_parser("inspect", help="summarize token stores", epilog=_INSPECT_EPILOG)
    inspect.add_argument("stores", nargs="+", metavar="STORE", help="token stores, or runs whose stores to inspect")
    inspect.add_argument("--verify", action="store_true", help="compare every file with its hash")
    inspect.add_argument("--picture", metavar="FILE", help="plot the distribution of document lengths (.png or .svg)")

    show = verbs.add_parser("show", help="print training samples as the model sees them", epilog=_SHOW_EPILOG)
    _add_run(show)
    show.add_argument("--step", type=int, required=True, help="step of the batch, from 1")
    show.add_argument("--row", type=int, help="row of the batch (default: all)")

    trace = verbs.add_parser("trace", help="list the files of a step, or the steps of a file", epilog=_TRACE_EPILOG)
    _add_run(trace)
    trace.add_argument("--step", type=int, help="list the files in the batch of this step")
    trace.add_argument("--row", type=int, help="with --step: only this row")
    trace.add_argument(
        "--file", metavar="PATH", help="list the steps that contain this file (path, or repository/path)"
    )
    trace.add_argument("--repository", metavar="NAME", help="list the steps that contain a file of this repository")
    trace.add_argument("--json", action="store_true", help="print one JSON object per line")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_OR_CONFIG", help="a run's directory, a run's name, or FILE.py[:FUNCTION]")
    parser.add_argument("--data", metavar="STORE", help="token store to use instead of the configured ones")


def inspect(args: argparse.Namespace) -> None:
    from jaxcoder.data.lengths import draw_lengths
    from jaxcoder.data.open import store_paths
    from jaxcoder.data.store import TokenStore

    stores = []
    for name in args.stores:
        config = run_config(name)
        stores += [TokenStore.open(path) for path in (store_paths(config) if config else [name])]
    for store in stores:
        if args.verify:
            store.verify()
            print(f"All {len(store.manifest['files'])} files match their hashes.")
        print(summary(store))
        print(_languages(store) + "\n")
        print(_lengths(store) + "\n")
    if len(stores) > 1:
        tokens, documents = sum(s.num_tokens for s in stores), sum(s.num_documents for s in stores)
        print(f"total {tokens:,} tokens of {documents:,} documents")
    if args.picture:
        print(f"Wrote the plot of document lengths to {draw_lengths(stores, args.picture)}")


def summary(store: "TokenStore") -> str:
    """Two lines: sizes; vocabulary and origin."""
    on_disk = sum(entry["bytes"] for entry in store.manifest["files"].values())
    inputs = format_names([entry["name"] for entry in store.manifest["settings"]["inputs"]])
    return (
        f"{store.path}: {store.num_tokens:,} tokens of {store.num_documents:,} documents, {store.text_bytes:,} "
        f"bytes of text ({store.bytes_per_token:.2f} a token), {on_disk:,} bytes on disk\n"
        f"vocabulary {store.vocab_size:,}, tokenizer {store.tokenizer_fingerprint[:12]}, inputs {inputs}"
    )


def _languages(store: "TokenStore", most: int = 20) -> str:
    from jaxcoder.data.lengths import by_language

    rows = by_language(store)
    shown = [(escape_control(name) or "(none)", *counts) for name, *counts in rows[:most]]
    table = format_table(["language", "documents", "tokens", "bytes"], shown)
    return table + (f"\nand {len(rows) - most} more" if len(rows) > most else "")


def _lengths(store: "TokenStore", width: int = 40) -> str:
    """A histogram with one bin for each power of two."""
    from jaxcoder.data.lengths import length_bins

    documents, tokens = length_bins(store)
    rows = []
    for k in range(int((documents > 0).argmax()), len(documents)):
        bar = "#" * round(width * documents[k] / max(documents.sum(), 1)) or ("." if documents[k] else "")
        rows.append((f"{2**k:,} to {2 ** (k + 1) - 1:,}", int(documents[k]), int(tokens[k]), bar))
    return format_table(["tokens in a document", "documents", "tokens", "share of documents"], rows)


def show(args: argparse.Namespace) -> None:
    from jaxcoder.data.trace import describe_row

    tracer = _tracer(args)
    stream = tracer.stream
    names = frozenset(stream.tokenizer.decode([id_]) for id_ in stream.tokenizer.special_ids)
    for traced in _rows(tracer, args):
        print(f"step {args.step} " + "\n".join(describe_row(stream, traced)))
        print_window(stream.sample(traced.sample), stream.tokenizer, names)


def print_window(window: "np.ndarray", tokenizer: "Tokenizer", special_names: frozenset[str]) -> None:
    """Prints the text of a window of ids, int32 [length]; on a terminal in colors, after a legend."""
    from rich.console import Console
    from rich.text import Text

    from jaxcoder.data import show as kinds

    parts = [(part.kind, kinds.printable(part, special_names)) for part in kinds.labeled_texts(window, tokenizer)]
    if not sys.stdout.isatty():
        print("".join(text for _, text in parts) + "\n")
        return
    styles = {
        kinds.TEXT: "",
        kinds.PREFIX: "cyan",
        kinds.SUFFIX: "green",
        kinds.MIDDLE: "bold yellow",
        kinds.SPM_MIDDLE: "bold magenta",
        kinds.SPECIAL: "reverse",
    }
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text("  ").join(Text(kind, style=style) for kind, style in styles.items()))
    console.print(Text.assemble(*((text, styles[kind]) for kind, text in parts)), end="\n\n")


def trace(args: argparse.Namespace) -> None:
    if (args.step is None) == (args.file is None and args.repository is None):
        raise ConfigError("give either --step, or --file or --repository.")
    tracer = _tracer(args)
    if args.step is not None:
        _trace_step(tracer, args)
    else:
        _trace_documents(tracer, args)


def _trace_step(tracer: "Tracer", args: argparse.Namespace) -> None:
    from jaxcoder.data.trace import describe_batch, describe_row

    if args.json:
        for traced in _rows(tracer, args):
            place = {**traced.place._asdict(), "corpus": tracer.stream.stores[traced.place.corpus].path}
            documents = [document._asdict() for document in traced.documents]
            print(json.dumps({"step": args.step, **traced._asdict(), "place": place, "documents": documents}))
    elif args.row is not None:
        print("\n".join(describe_row(tracer.stream, tracer.row(args.step, args.row))))
    else:
        for line in describe_batch(tracer, args.step):
            print(line)


def _rows(tracer: "Tracer", args: argparse.Namespace) -> "Iterable[TracedRow]":
    return tracer.batch(args.step) if args.row is None else [tracer.row(args.step, args.row)]


def _trace_documents(tracer: "Tracer", args: argparse.Namespace) -> None:
    found = tracer.find(path=args.file, repo_name=args.repository)
    readings = tracer.readings(found)
    paths = [store.path for store in tracer.stream.stores]
    last = tracer.history.last_step
    if args.json:
        for reading in readings:
            print(json.dumps({**reading._asdict(), "corpus": paths[reading.corpus], "done": reading.step <= last}))
        return
    done = [reading for reading in readings if reading.step <= last]
    documents = sum(len(rows) for _, rows in found)
    print(
        f"{plural(documents, 'document')} in {', '.join(paths[corpus] for corpus, _ in found)}: "
        f"in {len(readings):,} samples of {len({reading.step for reading in readings}):,} of "
        f"{tracer.num_steps:,} steps; {len(done):,} samples in the {last:,} completed steps."
    )
    for reading in readings:
        state = "done" if reading.step <= last else "future"
        where = f"  {paths[reading.corpus]}" if len(paths) > 1 else ""
        print(f"step {reading.step:>9,}  row {reading.row:>5}  epoch {reading.epoch}  {state}{where}")


def _tracer(args: argparse.Namespace) -> "Tracer":
    from jaxcoder.config.load import load_run, with_store
    from jaxcoder.data.open import open_stream
    from jaxcoder.data.schedule import StepHistory
    from jaxcoder.data.trace import Tracer

    config, logged = run_config(args.run), {}
    if config is not None:
        logged = _logged_samples(args.run)
    elif os.path.isdir(args.run):
        raise DataError(f"{args.run} is not the directory of a run: it has no config.json.")
    else:
        config = load_run(args.run)
    if args.data is not None:
        config = with_store(config, args.data)
    history = StepHistory(config.global_batch_size, config.data.stages, sorted(logged.items()))
    return Tracer(open_stream(config), history, config.num_steps)


def run_config(name: str) -> "RunConfig | None":
    """The configuration of the run in the directory `name`; None if it has no config.json."""
    from jaxcoder.config.serialize import from_json
    from jaxcoder.io.addresses import open_address
    from jaxcoder.io.os_errors import access_errors

    path = f"{name.rstrip('/')}/config.json"
    fs, inside = open_address(path)
    with access_errors(path):
        return from_json(fs.read_text(inside), source=path) if fs.exists(inside) else None


def _logged_samples(run_dir: str) -> dict[int, int]:
    """Step -> samples consumed, from metrics.jsonl; of records of the same step, the last counts."""
    from jaxcoder.io.addresses import open_address
    from jaxcoder.io.os_errors import access_errors
    from jaxcoder.record.metrics import read_metrics

    path = f"{run_dir.rstrip('/')}/metrics.jsonl"
    fs, inside = open_address(path)
    with access_errors(path):
        if not fs.exists(inside):
            return {}
    return {record["step"]: record["samples"] for record in read_metrics(path) if "samples" in record}
