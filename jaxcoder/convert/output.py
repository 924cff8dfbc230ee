"""Directories that appear whole or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxcoder.checkpoint.manifest import MANIFEST, STATE, TOKENIZER
from jaxcoder.errors import ConversionError
from jaxcoder.io.atomic import atomic_directory
from jaxcoder.io.os_errors import access_errors
from jaxcoder.tokenizer.portable import TOKENIZER_FILES

_OURS = frozenset({STATE, TOKENIZER, MANIFEST})
_THEIRS = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES})


@contextlib.contextmanager
def whole_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yields a directory to write into, beside `path`; at the end it takes the place of `path`.

    On failure nothing of it is left, and what was at `path` stays. Raises ConversionError when `path` is there already
    (and not empty) without `overwrite`, when it holds anything that no conversion wrote, and when it cannot be written.
    """
    path = path.resolve() if path.name in ("", "..") else path
    if path.exists() and not path.is_dir():
        raise ConversionError(f"the output {path} is a file: choose another name.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConversionError(f"the output directory {path} is not empty: choose another one, or give --overwrite.")
    strangers = _strangers(path)
    if strangers:
        raise ConversionError(
            f"the output directory {path} holds more than a converted model ({', '.join(strangers[:3])}), which would "
            "be lost: choose another one, or empty it yourself."
        )
    with access_errors(path, "write", ConversionError), atomic_directory(path) as temporary:
        yield temporary


def _strangers(path: Path) -> list[str]:
    """Names at `path` that make it more than what one direction of a conversion has written; none if it is empty."""
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    theirs = {name for name in names if name in _THEIRS or name.endswith(".safetensors")}
    if (MANIFEST in names and names <= _OURS) or ("config.json" in names and names == theirs):
        return []
    return sorted(names - theirs or names)
