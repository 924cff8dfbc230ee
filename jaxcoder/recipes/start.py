"""Opens the weights that a run begins with, whichever format they have: what `train` is handed as `open_weights`."""

from pathlib import Path

from jaxcoder.checkpoint.names import assemble_tree
from jaxcoder.convert.hf_weights import is_hf_directory, open_hf_weights
from jaxcoder.models.protocol import Model
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.train.restore import InitialWeights, open_checkpoint_weights


def open_weights(path: str) -> InitialWeights:
    """A run or checkpoint of ours, or a directory in PyTorch format, which is read unconverted.

    Raises CheckpointError or ConversionError, in one sentence, for anything else and for what is damaged.
    """
    if not is_hf_directory(Path(path)):
        return open_checkpoint_weights(path)
    weights = open_hf_weights(Path(path))

    def load(abstract: Model) -> Model:
        return assemble_tree(abstract, weights.reader(), "params/")

    has_tokenizer = (Path(path) / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(path) if has_tokenizer else None
    return InitialWeights(path=path, model=weights.config, tokenizer=tokenizer, load=load)
