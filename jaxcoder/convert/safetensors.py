"""Safetensors files, tensor by tensor: read through a memory map, written in a stream.

The layout is eight bytes of header length, a JSON header, then the tensors' bytes. The library's own `save_file` wants
all tensors of a file at once; this keeps the memory of a conversion at one tensor.
Reference: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxcoder.errors import ConversionError

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file that is not read yet: `read()` gives the array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    source: Path


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. ConversionError when the file is cut off or is no safetensors file."""
    size = path.stat().st_size
    header, start = _read_header(path, size)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise ConversionError(f"{path} describes {name} as {entry}, which is not supported.") from None
        if not 0 <= begin <= end or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise ConversionError(f"{path} gives {name} bytes {begin} to {end}, which do not hold its shape {shape}.")
        if start + end > size:
            raise ConversionError(
                f"{path} is cut off: {name} ends at byte {start + end:,} and the file has {size:,}; fetch it again."
            )
        tensors[name] = Tensor(shape, dtype, _reader(path, start + begin, shape, dtype), path)
    return tensors


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes fp32 `arrays` as they come, in the order of `shapes`, which is what the header needs to know before."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors begin aligned
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (expected, shape), (name, array) in zip(shapes.items(), arrays, strict=True):
            if name != expected or array.shape != shape:
                raise ValueError(f"{name} {array.shape} came where {expected} {shape} was announced")
            file.write(np.ascontiguousarray(array, dtype="<f4").data)


def _read_header(path: Path, size: int) -> tuple[dict, int]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER or 8 + length > size:
            raise ConversionError(f"{path} is cut off or is no safetensors file ({size:,} bytes): fetch it again.")
        encoded = file.read(length)
    try:
        header = json.loads(encoded)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ConversionError(f"{path} has a damaged header: fetch it again.")
    return header, 8 + length


def _reader(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if math.prod(shape) == 0:
            return np.zeros(shape, dtype)
        # An offset need not be aligned in files of others: bytes first, then their type.
        raw = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(math.prod(shape) * dtype.itemsize,))
        return raw.view(dtype).reshape(shape)

    return read
