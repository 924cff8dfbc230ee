"""Models of the Hugging Face hub, by id."""

import re
from pathlib import Path

from jaxcoder.errors import ConversionError

_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_WANTED = (*_SMALL_FILES, "model*.safetensors", "model.safetensors.index.json")
_WANTED_BIN = (*_SMALL_FILES, "pytorch_model*.bin", "pytorch_model.bin.index.json")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name (or name, as the oldest models have)."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", text) is not None


def local_path(source: str | Path) -> Path:
    """`source` itself if it exists or is not a hub id, else the directory of that model in the hub's cache."""
    path = Path(source)
    return fetch(str(source)) if isinstance(source, str) and not path.exists() and is_hub_id(source) else path


def fetch(hub_id: str) -> Path:
    """The directory of the model's files in the hub's cache, downloaded if needed. Raises ConversionError.

    Safetensors if the model has them, else pytorch_model.bin.
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
        return f"there is no model {hub_id} on the hub and no such directory: check the spelling, {elsewhere}."
    # The hub's errors do not distinguish a private model from a missing one, nor a lost network from an empty cache.
    return (
        f"{hub_id} is not a local directory and could not be downloaded from the hub ({_first_line(error)}): check "
        f"the network and HF_HUB_OFFLINE, {elsewhere}."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
