"""Converts a directory (or hub id) in Hugging Face's format to a checkpoint, array by array, without torch.

The output is one checkpoint directory (jaxcoder/checkpoint/manifest.py) of step 0 without optimizer state.
"""

import math
from pathlib import Path

from etils import epath

from jaxcoder.checkpoint.arrays import ArrayWriter
from jaxcoder.checkpoint.manifest import TOKENIZER, Manifest, write_manifest
from jaxcoder.convert.hf_names import shape
from jaxcoder.convert.hf_weights import HFWeights, open_hf_weights
from jaxcoder.convert.hub import local_path
from jaxcoder.convert.output import check_finite, count_non_finite, output_directory
from jaxcoder.convert.to_hf import Summary
from jaxcoder.errors import ConversionError
from jaxcoder.protocols import SILENT, Progress
from jaxcoder.tokenizer.portable import has_tokenizer
from jaxcoder.tokenizer.tokenizer import Tokenizer


def from_hf(
    source: str | Path,
    directory: str | Path,
    *,
    overwrite: bool = False,
    allow_non_finite: bool = False,
    progress: Progress = SILENT,
) -> Summary:
    """Writes the weights at `source`, a directory or a hub id such as "bigcode/starcoderbase-1b", as a checkpoint.

    Checkpoints are fp32, to which float16 and bfloat16 convert exactly; the manifest records the source's dtype, in
    which `to_hf` writes them again. allow_non_finite: accept NaN and infinity. Raises ConversionError for tensors that
    are missing, unexpected or of another shape, a config that is not supported, and files that are truncated or would
    run code.
    """
    weights = open_hf_weights(_local(source))
    if Path(directory).resolve() == weights.directory.resolve():
        raise ConversionError(f"the output directory {directory} is the source itself: choose another one.")
    # The tokenizer is checked first: the weights take longer.
    tokenizer = Tokenizer.load(weights.directory) if has_tokenizer(weights.directory) else None
    if tokenizer is not None:
        tokenizer.valid_ids(weights.config.vocab_size)  # raises if it has more ids than the embedding
    num_parameters = sum(math.prod(shape(entry.hf_dims, weights.config)) for entry in weights.entries())
    with output_directory(Path(directory), overwrite=overwrite) as output:
        progress.start("converting", num_parameters, "parameters")
        manifest = Manifest(
            step=0,
            model=weights.config,
            arrays=_write_arrays(weights, output, allow_non_finite, progress).infos,
            metadata={"converted_from": str(source), "dtype": weights.dtype},
        )
        if tokenizer is not None:
            tokenizer.save(output / TOKENIZER)
        write_manifest(epath.Path(output), manifest)
        progress.finish()
    return Summary(Path(directory), num_parameters, 1, tokenizer is not None, 0)


def _write_arrays(weights: HFWeights, output: Path, allow_non_finite: bool, progress: Progress) -> ArrayWriter:
    writer, problems = ArrayWriter(output), []
    for entry in weights.entries():
        arrays = weights.read(entry)
        if count := sum(count_non_finite(array) for array in arrays.values()):
            problems.append(f"{entry.hf_name} has {count:,}")
        for name, array in arrays.items():
            writer.add(name, array)
            progress.advance(array.size)
    check_finite(problems, str(weights.directory), allow_non_finite)
    writer.finish()
    return writer


def _local(source: str | Path) -> Path:
    path = local_path(source)
    if path.is_file():
        raise ConversionError(f"{source} is a file: give the directory that contains it and its config.json.")
    if not path.exists():
        raise ConversionError(
            f"{source} does not exist: give a directory, or a hub id such as bigcode/starcoderbase-1b."
        )
    return path
