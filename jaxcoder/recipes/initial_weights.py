"""Initial weights of a training run, from a checkpoint or a Hugging Face directory."""

from pathlib import Path

from jaxcoder.checkpoint.names import assemble_tree
from jaxcoder.convert.hf_weights import is_hf_directory, open_hf_weights
from jaxcoder.convert.hub import local_path
from jaxcoder.models.protocol import Model
from jaxcoder.tokenizer.portable import has_tokenizer
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.train.restore import InitialWeights, open_checkpoint_weights


def open_weights(path: str) -> InitialWeights:
    """Opens a run, a checkpoint, or a directory or hub id in Hugging Face format, without conversion on disk.

    Raises CheckpointError or ConversionError for anything else and for damaged files.
    """
    local = path if "://" in path else str(local_path(path))
    if not is_hf_directory(Path(local)):
        return open_checkpoint_weights(local)
    weights = open_hf_weights(Path(local))

    def load(abstract: Model) -> Model:
        return assemble_tree(abstract, weights.reader(), "params/")

    tokenizer = Tokenizer.load(local) if has_tokenizer(Path(local)) else None
    return InitialWeights(path=path, model=weights.config, tokenizer=tokenizer, load=load)
