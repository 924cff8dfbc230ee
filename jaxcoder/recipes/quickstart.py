"""The complete pipeline in a few minutes: from source files on this machine to a small StarCoder that completes code.

    <dir>/corpus/      train.parquet and held_out.parquet
    <dir>/tokenizer/   byte-level BPE
    <dir>/store/       token stores of both
    <dir>/checkpoints/ <dir> is also the training run's directory, with config.json and metrics.jsonl
    <dir>/hf/          the weights in PyTorch format
    <dir>/loss.png     the loss curve
    <dir>/report.json  the results that are printed

Each stage writes its result atomically and skips what exists, so the same command resumes after an interruption.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxcoder.config import RunConfig
from jaxcoder.config.load import load_run
from jaxcoder.corpus.gather import gather
from jaxcoder.data.build import build_store
from jaxcoder.errors import ConfigError
from jaxcoder.formatting import format_bytes
from jaxcoder.io.atomic import atomic_directory, is_left_over, write_text
from jaxcoder.io.document_files import read_documents
from jaxcoder.protocols import Progress
from jaxcoder.runtime import acquire_run_lock
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.tokenizer.train import train_tokenizer

CORPUS_BYTES = 20_000_000
"""Enough for the tokenizer, and more than the model reads."""
HELD_OUT_FRACTION = 0.02
SEED = 0
LOCK = ".quickstart.lock"

logger = logging.getLogger(__name__)


class Paths:
    """Files of a quickstart in the directory `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.settings = root / "quickstart.json"
        self.train_documents = root / "corpus" / "train.parquet"
        self.held_out_documents = root / "corpus" / "held_out.parquet"
        self.tokenizer = root / "tokenizer"
        self.train_store = root / "store" / "train"
        self.held_out_store = root / "store" / "held_out"


def quickstart(output_dir: Path, *, source: Path | None, num_steps: int | None, progress: Progress) -> dict[str, Any]:
    """Runs all stages and returns the contents of report.json.

    Args:
        source: a tree of code; default the library and installed packages of this interpreter.
        num_steps: optimizer steps; default the configuration's.
    Raises ConfigError if `output_dir` holds anything but a quickstart with these arguments.
    """
    paths = Paths(output_dir)
    config = load_run("quickstart")
    num_steps = config.num_steps if num_steps is None else num_steps
    settings = {"source": str(source.resolve()) if source else None, "num_steps": num_steps}
    check_directory(paths, settings)
    with acquire_run_lock(str(paths.root), lock=LOCK):
        write_text(paths.settings, json.dumps(settings, indent=1) + "\n")
        return run_stages(paths, config, source=source, num_steps=num_steps, progress=progress)


def run_stages(
    paths: Paths, config: RunConfig, *, source: Path | None, num_steps: int, progress: Progress
) -> dict[str, Any]:
    """Runs the stages whose results do not exist yet; returns the contents of report.json."""
    summary = gather(
        [source] if source else None,
        paths.root / "corpus",
        held_out_fraction=HELD_OUT_FRACTION,
        max_bytes=CORPUS_BYTES,
        seed=SEED,
        progress=progress,
    )
    logger.info(
        f"Corpus: {summary.train_documents:,} files, {format_bytes(summary.train_bytes)}; held out: "
        f"{summary.held_out_documents:,} files of {len(summary.held_out_packages)} packages, "
        f"{format_bytes(summary.held_out_bytes)}"
    )
    if not paths.tokenizer.exists():
        texts = (document.text for document in read_documents(paths.train_documents))
        with atomic_directory(paths.tokenizer) as directory:
            train_tokenizer(texts, config.model.vocab_size, progress).save(directory)
    tokenizer = Tokenizer.load(paths.tokenizer)
    logger.info(f"Tokenizer: {tokenizer.vocab_size:,} tokens, byte-level BPE ({paths.tokenizer})")
    store = build_store(paths.train_documents, tokenizer, paths.train_store, seed=SEED, progress=progress)
    build_store(paths.held_out_documents, tokenizer, paths.held_out_store, seed=SEED, progress=progress)
    logger.info(
        f"Token store: {store.num_tokens:,} tokens, {store.bytes_per_token:.2f} bytes each ({paths.train_store})"
    )

    from jaxcoder.recipes.pretrain import pretrain
    from jaxcoder.recipes.quickstart_report import make_report

    config = adapt_config(config, paths, num_steps=num_steps, vocab_size=tokenizer.vocab_size)
    result = pretrain(config, directory_is_shared=True)
    result.raise_late_stop()
    return make_report(paths, result.eval_metrics, progress)


def check_directory(paths: Paths, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if the directory holds other files, or results of other arguments."""
    if paths.root.is_file():
        raise ConfigError(f"`{paths.root}` is a file: give another --output-dir.")
    names = (
        {path.name for path in paths.root.iterdir() if not is_left_over(path.name)} if paths.root.is_dir() else set()
    )
    if not names - {paths.settings.name, LOCK}:
        return  # no results yet: the arguments may change, for example after a misspelt --source
    try:
        before = json.loads(paths.settings.read_text())
        arguments = "no --source" if before["source"] is None else f"--source {before['source']}"
        arguments += f", --steps {before['num_steps']}"
    except FileNotFoundError:
        raise ConfigError(f"`{paths.root}` holds other files: give an empty or new --output-dir.") from None
    except (ValueError, TypeError, KeyError):
        before, arguments = None, f"{paths.settings.name} is damaged"
    if before != settings:
        raise ConfigError(
            f"`{paths.root}` holds a quickstart with other arguments ({arguments}): give another --output-dir, "
            "delete it, or repeat those arguments to continue it."
        )


def adapt_config(config: RunConfig, paths: Paths, *, num_steps: int, vocab_size: int) -> RunConfig:
    """The configuration for these stores and devices."""
    import jax

    devices = jax.devices()
    batch = -(-config.global_batch_size // len(devices)) * len(devices)
    is_cpu = devices[0].platform == "cpu"
    return replace(
        config,
        num_steps=num_steps,
        global_batch_size=batch,
        output_dir=str(paths.root),
        model=replace(config.model, vocab_size=vocab_size),
        compute=replace(config.compute, dtype="float32" if is_cpu else "bfloat16"),
        data=replace(config.data, store=str(paths.train_store), eval_store=str(paths.held_out_store)),
        optimizer=replace(config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, num_steps // 10)),
    )
