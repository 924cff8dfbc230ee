"""The whole road in a few minutes: real code on this machine -> a small StarCoder that completes it.

    <dir>/corpus/      train.parquet and held_out.parquet
    <dir>/tokenizer/   byte-level BPE
    <dir>/store/       token stores of both
    <dir>/checkpoints/ with config.json and metrics.jsonl beside: <dir> is the training run's directory too
    <dir>/hf/          the weights in PyTorch format
    <dir>/loss.png     the loss curve
    <dir>/report.json  what is shown at the end

Every stage leaves its result whole or not at all, so the same command, run again after any interruption, goes on where
it was.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

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
"""More than the model reads in its few minutes, and as much as the tokenizer needs."""
HELD_OUT_FRACTION = 0.02
SEED = 0
LOCK = ".quickstart.lock"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where the parts of a quickstart lie."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "quickstart.json"

    @property
    def train_documents(self) -> Path:
        return self.root / "corpus" / "train.parquet"

    @property
    def held_out_documents(self) -> Path:
        return self.root / "corpus" / "held_out.parquet"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def train_store(self) -> Path:
        return self.root / "store" / "train"

    @property
    def held_out_store(self) -> Path:
        return self.root / "store" / "held_out"


def quickstart(
    output_dir: Path, *, source: Path | None, num_steps: int | None, progress: Progress
) -> dict[str, object]:
    """Runs all stages and returns the report that it also writes and shows.

    Args:
        source: a tree of code; None takes the running interpreter's library and installed packages.
        num_steps: optimizer steps; None means the configuration's.
    Raises ConfigError if `output_dir` holds anything but a quickstart with these arguments.
    """
    paths = Paths(root=output_dir)
    config = load_run("quickstart")
    num_steps = config.num_steps if num_steps is None else num_steps
    settings = {"source": str(source.resolve()) if source else None, "num_steps": num_steps}
    check_claim(paths, settings)
    with acquire_run_lock(str(paths.root), lock=LOCK):
        claim(paths, settings)
        return stages(paths, config, source=source, num_steps=num_steps, progress=progress)


def stages(
    paths: Paths, config: RunConfig, *, source: Path | None, num_steps: int, progress: Progress
) -> dict[str, object]:
    """From the code to the report, in a directory that is ours; what is there already is not made again."""
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
    tokenizer = make_tokenizer(paths, config.model.vocab_size, progress)
    logger.info(f"Tokenizer: {tokenizer.vocab_size:,} tokens, byte-level BPE ({paths.tokenizer})")
    store = build_store(paths.train_documents, tokenizer, paths.train_store, seed=SEED, progress=progress)
    build_store(paths.held_out_documents, tokenizer, paths.held_out_store, seed=SEED, progress=progress)
    logger.info(
        f"Token store: {store.num_tokens:,} tokens, {store.bytes_per_token:.2f} bytes each ({paths.train_store})"
    )

    from jaxcoder.recipes.pretrain import pretrain
    from jaxcoder.recipes.quickstart_report import make_report

    config = fitted(config, paths, num_steps=num_steps, vocab_size=tokenizer.vocab_size)
    result = pretrain(config, directory_is_shared=True)
    result.raise_late_stop()
    return make_report(paths, result.eval_metrics, progress)


def check_claim(paths: Paths, settings: dict[str, object]) -> None:
    """Raises ConfigError if the directory holds something else, or what other arguments have made."""
    if paths.root.is_file():
        raise ConfigError(f"`{paths.root}` is a file: give another --output-dir.")
    made = {path.name for path in paths.root.iterdir() if not is_left_over(path.name)} if paths.root.is_dir() else set()
    made -= {paths.settings.name, LOCK}
    if not made:
        return  # of other arguments, such as a misspelt source, nothing came
    if not paths.settings.exists():
        raise ConfigError(f"`{paths.root}` holds something else: give an empty or new --output-dir.")
    before = read_claim(paths)
    if before != settings:
        raise ConfigError(
            f"`{paths.root}` holds a quickstart with other arguments ({spelled(before)}): give another --output-dir, "
            "delete it, or repeat those arguments to continue it."
        )


def claim(paths: Paths, settings: dict[str, object]) -> None:
    """The directory belongs to one quickstart: its arguments are written into it first."""
    if read_claim(paths) != settings:
        write_text(paths.settings, json.dumps(settings, indent=1) + "\n")


def read_claim(paths: Paths) -> dict[str, object] | None:
    """The arguments that the directory was claimed with; None without readable ones."""
    try:
        return json.loads(paths.settings.read_text())
    except (FileNotFoundError, ValueError):
        return None


def spelled(settings: dict[str, object] | None) -> str:
    """The arguments as one types them."""
    if not isinstance(settings, dict):
        return "which cannot be read"
    source = "no --source" if settings.get("source") is None else f"--source {settings['source']}"
    return f"{source}, --steps {settings.get('num_steps')}"


def make_tokenizer(paths: Paths, vocab_size: int, progress: Progress) -> Tokenizer:
    """Trains the tokenizer, or opens the one that is there."""
    if not paths.tokenizer.exists():
        texts = (document.text for document in read_documents(paths.train_documents))
        with atomic_directory(paths.tokenizer) as directory:
            train_tokenizer(texts, vocab_size, progress).save(directory)
    return Tokenizer.load(paths.tokenizer)


def fitted(config: RunConfig, paths: Paths, *, num_steps: int, vocab_size: int) -> RunConfig:
    """The configuration for this corpus and these devices."""
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
