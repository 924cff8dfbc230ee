"""Output of conversions: directories that are complete or absent, and the check for values that are not finite."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxcoder.checkpoint.manifest import MANIFEST, STATE, TOKENIZER
from jaxcoder.checkpoint.names import listed
from jaxcoder.errors import ConversionError
from jaxcoder.io.atomic import atomic_directory
from jaxcoder.io.os_errors import access_errors
from jaxcoder.tokenizer.portable import TOKENIZER_FILES

logger = logging.getLogger(__name__)

_CHECKPOINT_NAMES = frozenset({STATE, TOKENIZER, MANIFEST})
_HF_NAMES = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES})


@contextlib.contextmanager
def output_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary directory, which replaces `path` on success and is removed on failure.

    Raises ConversionError if `path` is not empty and `overwrite` is false, if it contains files that no conversion
    writes, or if it cannot be written.
    """
    path = path.resolve() if path.name in ("", "..") else path
    if path.exists() and not path.is_dir():
        raise ConversionError(f"the output {path} is a file: choose another name.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConversionError(f"the output directory {path} is not empty: choose another one, or give --overwrite.")
    others = _other_names(path)
    if others:
        raise ConversionError(
            f"the output directory {path} contains other files than a converted model ({', '.join(others[:3])}), which "
            "would be deleted: choose another one, or empty it."
        )
    with access_errors(path, "write", ConversionError), atomic_directory(path) as temporary:
        yield temporary


def count_non_finite(array: np.ndarray) -> int:
    """Number of NaN and infinite values."""
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def check_finite(problems: list[str], where: str, allow: bool) -> None:
    """Raises ConversionError, or logs a warning if they are allowed, for tensors with NaN or infinity."""
    if not problems:
        return
    message = f"the weights in {where} have values that are NaN or infinite: {listed(problems)}"
    if not allow:
        raise ConversionError(f"{message}. Use other weights, or give --allow-non-finite.")
    logger.warning(message)


def _other_names(path: Path) -> list[str]:
    """Names in `path` that no conversion writes; all names if it mixes both formats; [] for a conversion's output."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    hf_names = {name for name in names if name in _HF_NAMES or name.endswith(".safetensors")}
    if (MANIFEST in names and names <= _CHECKPOINT_NAMES) or ("config.json" in names and names == hf_names):
        return []
    return sorted(names - hf_names or names)
