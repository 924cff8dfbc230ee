"""Converts a checkpoint to a directory that transformers (and vLLM, llama.cpp, ...) loads.

It works tensor by tensor: memory is bounded by the largest one. Files: config.json, model.safetensors (or shards with
an index), generation_config.json, and the tokenizer's.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxcoder.checkpoint.arrays import load_numpy
from jaxcoder.checkpoint.discover import open_checkpoint
from jaxcoder.checkpoint.manifest import TOKENIZER, ArrayInfo, Manifest
from jaxcoder.checkpoint.names import check_arrays
from jaxcoder.config import ModelConfig
from jaxcoder.convert.hf_config import hf_config
from jaxcoder.convert.hf_names import Entry, entries, shape, to_hf_tensor
from jaxcoder.convert.output import check_finite, count_non_finite, output_directory
from jaxcoder.convert.safetensors import DTYPES, write_safetensors
from jaxcoder.errors import ConversionError
from jaxcoder.protocols import SILENT, Progress
from jaxcoder.tokenizer.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9
ROLES = ("bos_token", "eos_token", "pad_token")
"""Tokens whose ids are in config.json."""


@dataclass(frozen=True)
class Summary:
    """The output of a conversion."""

    directory: Path
    num_parameters: int
    num_files: int
    """Number of files with weights."""
    has_tokenizer: bool
    step: int


def to_hf(
    source: str | Path,
    directory: str | Path,
    *,
    step: int | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: str | None = None,
    allow_non_finite: bool = False,
    progress: Progress = SILENT,
) -> Summary:
    """Writes the weights of the checkpoint at `source` (a run, its checkpoints, or one of them) to `directory`.

    dtype: "float32", "float16" or "bfloat16"; None: that of the weights it was converted from, else float32.
    allow_non_finite: accept NaN and infinity. Raises CheckpointError if there is no checkpoint or it is damaged;
    ConversionError for a model that the format cannot represent and for an output directory that is not empty.
    """
    checkpoint, manifest = open_checkpoint(source, step=step)
    if Path(directory).resolve() == Path(checkpoint).resolve():
        raise ConversionError(f"the output directory {directory} is the source itself: choose another one.")
    config = manifest.model
    _check(Path(checkpoint), manifest)
    tokenizer = Tokenizer.load(checkpoint / TOKENIZER) if (checkpoint / TOKENIZER).is_dir() else None
    end_of_text = 0 if tokenizer is None else tokenizer.eos_id
    ids = dict.fromkeys(("bos_token", "eos_token"), end_of_text)
    if tokenizer is not None:
        ids |= {role: id_ for role in ROLES if (id_ := tokenizer.role_id(role)) is not None}
    roles: dict[str, object] = {f"{role}_id": id_ for role, id_ in ids.items()}
    dtype = dtype or str(manifest.metadata.get("dtype", "float32"))
    if dtype not in DTYPES:
        raise ConversionError(f"the dtype {dtype} is not supported: give one of {', '.join(DTYPES)}.")
    keys = hf_config(config, end_of_text=end_of_text, dtype=dtype) | roles
    itemsize = DTYPES[dtype].itemsize
    shards = _shards(entries(config), config, max_shard_bytes, itemsize)
    problems: list[str] = []
    num_parameters = sum(math.prod(shape(entry.hf_dims, config)) for entry in entries(config))
    with output_directory(Path(directory), overwrite=overwrite) as output:
        progress.start("converting", num_parameters, "parameters")
        for name, shard in shards.items():
            shapes = {entry.hf_name: shape(entry.hf_dims, config) for entry in shard}
            tensors = _tensors(checkpoint, shard, manifest, DTYPES[dtype], problems, progress)
            write_safetensors(output / name, shapes, tensors, dtype)
        check_finite(problems, str(checkpoint), allow_non_finite)
        if len(shards) > 1:
            _write_json(output / "model.safetensors.index.json", _index(shards, itemsize * num_parameters))
        _write_json(output / "generation_config.json", roles | {"_from_model_config": True})
        if tokenizer is not None:
            tokenizer.save(output)
        _write_json(output / "config.json", keys)
        progress.finish()
    return Summary(Path(directory), num_parameters, len(shards), tokenizer is not None, manifest.step)


def _check(checkpoint: Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless the checkpoint has exactly the arrays of the table."""
    config = manifest.model
    expected = {
        name: ArrayInfo(shape(dims, config), "float32")
        for entry in entries(config)
        for name, dims in entry.jax_dims.items()
    }
    saved = {name: info for name, info in manifest.arrays.items() if name.startswith("params/")}
    check_arrays(expected, saved, f"the checkpoint {checkpoint}")


def _shards(table: list[Entry], config: ModelConfig, max_bytes: int, itemsize: int) -> dict[str, list[Entry]]:
    """File name -> its tensors, each file at most `max_bytes` unless one tensor is larger."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in table:
        size = itemsize * math.prod(shape(entry.hf_dims, config))
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _tensors(
    checkpoint: Path, shard: list[Entry], manifest: Manifest, dtype: np.dtype, problems: list[str], progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) in `dtype`; adds tensors with values that are not finite to `problems`."""
    for entry in shard:
        arrays = load_numpy(checkpoint, {name: manifest.arrays[name] for name in entry.jax_dims})
        tensor = to_hf_tensor(entry, [arrays[name] for name in entry.jax_dims], manifest.model)
        with np.errstate(over="ignore"):  # reported below
            tensor = tensor.astype(dtype, copy=False)
        if count := count_non_finite(tensor):
            problems.append(f"{entry.hf_name} has {count:,} in {dtype.name}")
        yield entry.hf_name, tensor
        progress.advance(tensor.size)


def _index(shards: dict[str, list[Entry]], num_bytes: int) -> dict[str, object]:
    weight_map = {entry.hf_name: name for name, shard in shards.items() for entry in shard}
    return {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
