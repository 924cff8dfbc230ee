"""Models of the Hugging Face hub, by id."""

import re
from pathlib import Path

from jaxcoder.errors import ConversionError

_WANTED = ("config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json")
_WANTED_BIN = ("config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "tokenizer.json")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name (or name, as the oldest models have)."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None


def fetch(hub_id: str) -> Path:
    """The directory with the model's files, fetched or in the hub's cache; ConversionError if they cannot be had.

    Safetensors where the model has them, else pytorch_model.bin; never both.
    """
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(hub_id, allow_patterns=list(_WANTED)))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(hub_id, allow_patterns=list(_WANTED_BIN)))
    except Exception as error:
        raise ConversionError(_reason(hub_id, error)) from error
    return path


def _reason(hub_id: str, error: Exception) -> str:
    from huggingface_hub import errors

    elsewhere = "or give a local directory"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{hub_id} is gated: accept its terms at https://huggingface.co/{hub_id}, run `hf auth login`, "
            f"and try again, {elsewhere}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no model {hub_id} on the hub, nor in this directory: check the spelling, {elsewhere}."
    # A private model looks like one that does not exist, and no network like a file that is not in the cache.
    return (
        f"{hub_id} could not be fetched from the hub ({_first_line(error)}): check the network "
        f"and HF_HUB_OFFLINE, {elsewhere}."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
