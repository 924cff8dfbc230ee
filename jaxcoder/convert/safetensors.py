"""Safetensors files, tensor by tensor: read with the `safetensors` library, written as a stream.

The library's `save_file` needs all tensors of a file in memory; `write_safetensors` needs one. Layout: eight bytes of
header length, a JSON header, then the tensors' bytes.
Reference: https://github.com/huggingface/safetensors#format
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxcoder.errors import ConversionError

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""Dtypes of weights, by NumPy's names."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file; `read()` returns the array. dtype: NumPy's name if it has one."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. ConversionError if the file is truncated or its header is not valid."""
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ConversionError(
            f"{path} is truncated or not a valid safetensors file ({error}): download it again."
        ) from error
    tensors = {}
    for name in file.keys():  # noqa: SIM118  (the file is not a mapping)
        header = file.get_slice(name)
        dtype = header.get_dtype()
        read = functools.partial(file.get_tensor, name)
        tensors[name] = Tensor(tuple(header.get_shape()), _DTYPES.get(dtype, dtype), read)
    return tensors


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: str = "float32",
) -> None:
    """Writes `arrays` one by one, cast to `dtype`. `shapes`, in the same order, make the header, which comes first."""
    code = next(code for code, name in _DTYPES.items() if name == dtype)
    itemsize = DTYPES[dtype].itemsize
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + itemsize * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the tensors
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (expected, shape), (name, array) in zip(shapes.items(), arrays, strict=True):
            if name != expected or array.shape != shape:
                raise ValueError(f"got {name} {array.shape}, expected {expected} {shape}")
            file.write(np.ascontiguousarray(array.astype(DTYPES[dtype], copy=False)).view(np.uint8).data)
