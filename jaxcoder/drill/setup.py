"""The run of a drill: a small model, a small store of real code, and bad batches.

DRILL/documents.jsonl, store/     files of Python's standard library, encoded
DRILL/config.json                 the run; mesh and directory are options of each start
DRILL/bad_batches.json            {step: kind}, the same in the undisturbed run
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxcoder.benchmarks.measure import stdlib_sources
from jaxcoder.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    WatchdogConfig,
)
from jaxcoder.config.mesh import MESH_AXES
from jaxcoder.config.serialize import from_json, to_json
from jaxcoder.data.build import build_store
from jaxcoder.data.loader import Batch
from jaxcoder.io.document import Document, Part
from jaxcoder.io.document_files import write_documents
from jaxcoder.tokenizer.train import train_tokenizer

STORE, CONFIG, BAD_BATCHES = "store", "config.json", "bad_batches.json"
CORPUS_BYTES = 300_000
SAVE_EVERY_STEPS = 4
STEP_SECONDS = 8.0
"""Limit of the watchdog. A step takes some ten milliseconds, and sometimes waits a second for a save."""
START_SECONDS = 120.0
"""Limit of the watchdog for compiling, restoring and saving."""
SKIP_GRAD_NORM_ABOVE = 12.0
"""Between the gradient norms of ordinary batches and of a batch of one repeated token."""


def run_config(num_steps: int, store: Path) -> RunConfig:
    """Small enough for ten steps a second on one core; in fp32, with dropout and FIM."""
    model = ModelConfig(
        num_layers=2, embed_dim=128, num_heads=4, head_dim=32, mlp_dim=512, vocab_size=512, max_seq_len=64
    )
    return RunConfig(
        name="drill",
        model=model,
        num_steps=num_steps,
        global_batch_size=8,
        compute=ComputeConfig(dtype="float32"),
        data=DataConfig(store=str(store)),
        optimizer=OptimizerConfig(
            peak_learning_rate=1e-3,
            final_learning_rate=1e-4,
            warmup_steps=10,
            skip_grad_norm_above=SKIP_GRAD_NORM_ABOVE,
        ),
        checkpoint=CheckpointConfig(save_every_steps=SAVE_EVERY_STEPS, keep_last=2),
        watchdog=WatchdogConfig(step_seconds=STEP_SECONDS, start_seconds=START_SECONDS),
    )


def prepare(directory: Path, num_steps: int, bad_batches: dict[int, str]) -> RunConfig:
    """Writes the files of the drill and returns the run."""
    texts = stdlib_sources(CORPUS_BYTES)
    documents = directory / "documents.jsonl"
    write_documents((Document(parts=(Part(text=text),)) for text in texts), documents)
    tokenizer = train_tokenizer(texts, 512)
    build_store(documents, tokenizer, directory / STORE, seed=0)
    config = run_config(num_steps, directory / STORE)
    (directory / CONFIG).write_text(to_json(config), encoding="utf-8")
    (directory / BAD_BATCHES).write_text(json.dumps(bad_batches), encoding="utf-8")
    return config


def read(directory: Path, output_dir: str, mesh: Sequence[int]) -> tuple[RunConfig, "BadBatches"]:
    """The run of one process of the drill in `directory`. mesh: sizes in the order of `MESH_AXES`."""
    config = from_json((directory / CONFIG).read_text(encoding="utf-8"), source=str(directory / CONFIG))
    steps = json.loads((directory / BAD_BATCHES).read_text(encoding="utf-8"))
    config = replace(config, output_dir=output_dir, mesh=MeshConfig(**dict(zip(MESH_AXES, mesh, strict=True))))
    return config, BadBatches({int(step): kind for step, kind in steps.items()})


@dataclass(frozen=True)
class BadBatches:
    """`alter_batch` of the training loop: replaces the batches of these steps, in every process alike."""

    steps: dict[int, str]

    def __call__(self, step: int, batch: Batch) -> Batch:
        kind = self.steps.get(step)
        if kind == "nan":
            return batch._replace(loss_mask=np.full_like(batch.loss_mask, np.nan))
        if kind == "spike":  # one token repeated: all gradients point the same way
            token = np.int32(7)
            return batch._replace(
                inputs=np.full_like(batch.inputs, token),
                targets=np.full_like(batch.targets, token),
                loss_mask=np.ones_like(batch.loss_mask),
            )
        return batch
