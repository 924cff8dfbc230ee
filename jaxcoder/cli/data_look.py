"""`jaxcoder data inspect`, `show` and `trace`."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from jaxcoder.errors import ConfigError, DataError
from jaxcoder.formatting import plural

if TYPE_CHECKING:
    from jaxcoder.config import RunConfig
    from jaxcoder.data.schedule import StepHistory
    from jaxcoder.data.store import TokenStore
    from jaxcoder.data.trace import Tracer

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
    inspect.add_argument("--picture", metavar="PNG", help="plot the distribution of document lengths")

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

    paths = [path for name in args.stores for path in (store_paths(_config_of(name)) if _is_run(name) else [name])]
    stores = [TokenStore.open(path) for path in paths]
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
    inputs = ", ".join(entry["name"] for entry in store.manifest["settings"]["inputs"])
    return (
        f"{store.path}: {store.num_tokens:,} tokens of {store.num_documents:,} documents, {store.text_bytes:,} "
        f"bytes of text ({store.bytes_per_token:.2f} a token), {on_disk:,} bytes on disk\n"
        f"vocabulary {store.vocab_size:,}, tokenizer {store.tokenizer_fingerprint[:12]}, inputs {inputs}"
    )


def _languages(store: "TokenStore", most: int = 20) -> str:
    from jaxcoder.data.lengths import by_language

    rows = by_language(store)
    lines = [f"{'language':<20}{'documents':>14}{'tokens':>18}{'bytes':>18}"]
    lines += [f"{name or '(none)':<20}{docs:>14,}{tokens:>18,}{size:>18,}" for name, docs, tokens, size in rows[:most]]
    if len(rows) > most:
        lines.append(f"and {len(rows) - most} more")
    return "\n".join(lines)


def _lengths(store: "TokenStore", width: int = 40) -> str:
    """A bar for each power of two."""
    from jaxcoder.data.lengths import length_bins

    documents, tokens = length_bins(store)
    lines = [f"{'tokens in a document':<20}{'documents':>14}{'tokens':>18}  share of documents"]
    for k in range(int((documents > 0).argmax()), len(documents)):
        share = documents[k] / max(documents.sum(), 1)
        bar = "#" * round(width * share) or ("." if documents[k] else "")
        lines.append(f"{f'{2**k:,} to {2 ** (k + 1) - 1:,}':<20}{documents[k]:>14,}{tokens[k]:>18,}  {bar}")
    return "\n".join(lines)


def show(args: argparse.Namespace) -> None:
    from jaxcoder.data.trace import describe_row

    tracer = _tracer(args)
    stream, is_terminal = tracer.stream, sys.stdout.isatty()
    names = frozenset(stream.tokenizer.decode([id_]) for id_ in stream.tokenizer.special_ids)
    rows = tracer.batch(args.step) if args.row is None else [tracer.row(args.step, args.row)]
    for traced in rows:
        print(f"step {args.step} " + "\n".join(describe_row(stream, traced)))
        (_print_colored if is_terminal else _print_plain)(stream.sample(traced.sample), stream.tokenizer, names)


def _print_plain(window, tokenizer, names: frozenset[str]) -> None:
    from jaxcoder.data.show import labeled_texts, printable

    print("".join(printable(part, names) for part in labeled_texts(window, tokenizer)) + "\n")


def _print_colored(window, tokenizer, names: frozenset[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    from jaxcoder.data import show as kinds

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
    text = Text()
    for part in kinds.labeled_texts(window, tokenizer):
        text.append(kinds.printable(part, names), style=styles[part.kind])
    console.print(text, end="\n\n")


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
        rows = tracer.batch(args.step) if args.row is None else [tracer.row(args.step, args.row)]
        for traced in rows:
            place = {**traced.place._asdict(), "corpus": tracer.stream.stores[traced.place.corpus].path}
            documents = [document._asdict() for document in traced.documents]
            print(json.dumps({"step": args.step, **traced._asdict(), "place": place, "documents": documents}))
    elif args.row is not None:
        print("\n".join(describe_row(tracer.stream, tracer.row(args.step, args.row))))
    else:
        for line in describe_batch(tracer, args.step):
            print(line)


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
    from jaxcoder.config.load import with_store
    from jaxcoder.data.open import open_stream
    from jaxcoder.data.trace import Tracer

    config = _config_of(args.run)
    if args.data is not None:
        config = with_store(config, args.data)
    return Tracer(open_stream(config), _history(args.run, config), config.num_steps)


def _is_run(name: str) -> bool:
    return _exists(f"{name.rstrip('/')}/config.json")


def _config_of(name: str) -> "RunConfig":
    if _is_run(name):
        from jaxcoder.config.serialize import from_json

        return from_json(_text(f"{name.rstrip('/')}/config.json"), source=f"{name}/config.json")
    if os.path.isdir(name):
        raise DataError(f"{name} is not the directory of a run: it has no config.json.")
    from jaxcoder.config.load import load_run

    return load_run(name)


def _history(name: str, config: "RunConfig") -> "StepHistory":
    from jaxcoder.data.schedule import StepHistory
    from jaxcoder.record.metrics import read_metrics

    logged: dict[int, int] = {}
    metrics = f"{name.rstrip('/')}/metrics.jsonl"
    if _is_run(name) and _exists(metrics):
        # After a restart, the later record of a step replaces the earlier one.
        for record in read_metrics(metrics):
            if "samples" in record:
                logged[record["step"]] = record["samples"]
    return StepHistory(config.global_batch_size, config.data.stages, sorted(logged.items()))


def _exists(path: str) -> bool:
    from jaxcoder.io.addresses import open_address
    from jaxcoder.io.os_errors import access_errors

    fs, inside = open_address(path)
    with access_errors(path):
        return fs.exists(inside)


def _text(path: str) -> str:
    from jaxcoder.io.addresses import open_address
    from jaxcoder.io.os_errors import access_errors

    fs, inside = open_address(path)
    with access_errors(path), fs.open(inside, "r") as file:
        return file.read()
