"""Loads a model for inference from a jaxcoder checkpoint or, without conversion, a Hugging Face directory."""

import contextlib
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxcoder.checkpoint import arrays as array_files
from jaxcoder.checkpoint.discover import is_checkpoint, open_checkpoint
from jaxcoder.checkpoint.manifest import TOKENIZER, Manifest
from jaxcoder.checkpoint.names import assemble_tree, check_arrays, flatten_tree, unflatten_tree
from jaxcoder.config import ComputeConfig, ModelConfig
from jaxcoder.convert.hf_weights import HFWeights, is_hf_directory, open_hf_weights
from jaxcoder.convert.hub import local_path
from jaxcoder.errors import CheckpointError
from jaxcoder.models.protocol import Decoder, abstract_model
from jaxcoder.tokenizer.portable import has_tokenizer
from jaxcoder.tokenizer.tokenizer import Tokenizer


def load_model(
    path: str | Path,
    *,
    compute: ComputeConfig | None = None,
    mesh: Mesh | None = None,
    step: int | None = None,
) -> tuple[Decoder, ModelConfig, Tokenizer | None]:
    """The model at `path`, its config, and the tokenizer saved with the weights, if any.

    Args:
        path: a run's directory, its `checkpoints`, one checkpoint, a directory in Hugging Face's format, or the id of a
            model on the Hugging Face hub, which is downloaded into its cache.
        compute: default `ComputeConfig()`. Weights are fp32 in any case.
        mesh: shards every array on this mesh; None: all arrays are on the first device.
        step: the checkpoint of a run; default the latest complete one.

    Raises CheckpointError or ConversionError for any other directory and for damaged files.
    """
    path = local_path(path)
    compute = compute or ComputeConfig()
    if is_hf_directory(path):
        if step is not None:
            raise CheckpointError(f"{path} is one model in PyTorch format and has no step {step}: leave the step out.")
        weights = open_hf_weights(path)
        return _from_hf(weights, compute, mesh), weights.config, _tokenizer(path)
    if is_checkpoint(path):
        directory, manifest = open_checkpoint(path, step=step)
        return _from_checkpoint(directory, manifest, compute, mesh), manifest.model, _tokenizer(directory / TOKENIZER)
    raise CheckpointError(
        f"{path} {_describe(path)}: give a run's directory, one of its checkpoints, a directory with config.json and "
        "model.safetensors (or pytorch_model.bin), or the id of a model on the Hugging Face hub."
    )


def _describe(path: Path) -> str:
    """What a path without a model is."""
    if not path.is_dir():
        return "is a file" if path.exists() else "does not exist"
    if (path / "tokens" / "zarr.json").exists():
        return "is a token store, not a model"
    if any(path.glob("*.parquet")) or any(path.glob("*.jsonl*")):
        return "is a corpus, not a model"
    return "is a tokenizer, not a model" if has_tokenizer(path) else "contains no model"


def _from_hf(weights: HFWeights, compute: ComputeConfig, mesh: Mesh | None) -> Decoder:
    with _scope(mesh):
        return assemble_tree(abstract_model(weights.config, compute), weights.reader(), "params/")


def _from_checkpoint(directory: Path, manifest: Manifest, compute: ComputeConfig, mesh: Mesh | None) -> Decoder:
    saved = {name: info for name, info in manifest.arrays.items() if name.startswith("params/")}
    with _scope(mesh):
        model = abstract_model(manifest.model, compute)
        targets = flatten_tree(model, "params/")
        check_arrays(targets, saved, f"the checkpoint {directory}")
        return unflatten_tree(model, array_files.load(directory, targets), "params/")


def _scope(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _tokenizer(directory: Path) -> Tokenizer | None:
    return Tokenizer.load(directory) if has_tokenizer(Path(directory)) else None
