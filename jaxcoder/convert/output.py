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
    """Yields a temporary directory to write into; on success it replaces `path`.

    On failure it is removed and `path` stays as it was. Raises ConversionError when `path` is there already
    (and not empty) without `overwrite`, when it holds anything that no conversion wrote, and when it cannot be written.
    """
    path = path.resolve() if path.name in ("", "..") else path
    if path.exists() and not path.is_dir():
        raise ConversionError(f"the output {path} is a file: choose another name.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConversionError(f"the output directory {path} is not empty: choose another one, or give --overwrite.")
    others = _other_names(path)
    if others:
        raise ConversionError(
            f"the output directory {path} holds more than a converted model ({', '.join(others[:3])}), which would "
            "be lost: choose another one, or empty it yourself."
        )
    with access_errors(path, "write", ConversionError), atomic_directory(path) as temporary:
        yield temporary


def _other_names(path: Path) -> list[str]:
    """Names at `path` that no conversion writes, or all names of an unknown mix; [] for its output or nothing."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    hf_names = {name for name in names if name in _HF_NAMES or name.endswith(".safetensors")}
    if (MANIFEST in names and names <= _CHECKPOINT_NAMES) or ("config.json" in names and names == hf_names):
        return []
    return sorted(names - hf_names or names)
