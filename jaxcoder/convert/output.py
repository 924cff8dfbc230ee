"""Output directories of conversions: complete or absent."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxcoder.checkpoint.manifest import MANIFEST, STATE, TOKENIZER
from jaxcoder.errors import ConversionError
from jaxcoder.io.atomic import atomic_directory
from jaxcoder.io.os_errors import access_errors
from jaxcoder.tokenizer.portable import TOKENIZER_FILES

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


def _other_names(path: Path) -> list[str]:
    """Names in `path` that no conversion writes; all names if it mixes both formats; [] for a conversion's output."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    hf_names = {name for name in names if name in _HF_NAMES or name.endswith(".safetensors")}
    if (MANIFEST in names and names <= _CHECKPOINT_NAMES) or ("config.json" in names and names == hf_names):
        return []
    return sorted(names - hf_names or names)
