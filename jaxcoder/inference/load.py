"""From a path to a model that is ready to run: our checkpoints and PyTorch-format directories, unconverted."""

import contextlib
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxcoder.checkpoint.names import assemble_model
from jaxcoder.config import ComputeConfig, ModelConfig
from jaxcoder.convert.hf_weights import HFWeights, is_hf_directory, open_hf_weights
from jaxcoder.errors import CheckpointError
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.tokenizer.tokenizer import Tokenizer


def load_model(
    path: str | Path, *, compute: ComputeConfig | None = None, mesh: Mesh | None = None
) -> tuple[GPTBigCode, ModelConfig, Tokenizer | None]:
    """The model at `path`, its config, and its tokenizer where one lies beside the weights.

    Args:
        path: a run's directory, its `checkpoints`, one checkpoint, or a directory in Hugging Face's format.
        compute: how to compute; default `ComputeConfig()`. Weights are fp32 in any case.
        mesh: where given, every array lands in its shards on this mesh; else everything is on the first device.

    Raises CheckpointError or ConversionError, in one sentence, for anything that is no such directory or is damaged.
    """
    path = Path(path)
    compute = compute or ComputeConfig()
    if is_hf_directory(path):
        weights = open_hf_weights(path)
        return _from_hf(weights, compute, mesh), weights.config, _tokenizer(path)
    raise CheckpointError(f"{path} is no model.")


def abstract_model(config: ModelConfig, compute: ComputeConfig) -> GPTBigCode:
    """The model as shapes; made under the mesh in scope, they carry its shardings."""
    return jax.eval_shape(lambda: GPTBigCode(config, compute, rngs=nnx.Rngs(0)))


def _from_hf(weights: HFWeights, compute: ComputeConfig, mesh: Mesh | None) -> GPTBigCode:
    owner = {name: entry for entry in weights.entries() for name in entry.ours}
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return assemble_model(
            abstract_model(weights.config, compute), lambda name, target: weights.read(owner[name])[name], "params/"
        )


def _tokenizer(directory: Path) -> Tokenizer | None:
    return Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
