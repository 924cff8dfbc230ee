"""Reads `pytorch_model.bin` without torch and without executing code from the file.

A .bin file is a zip archive: a pickle that describes the tensors, and one member per storage with raw bytes. A pickle
may call any function of any module; this unpickler replaces the names that a dictionary of tensors needs by local
functions and raises ConversionError for every other name.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxcoder.convert.safetensors import Tensor
from jaxcoder.errors import ConversionError

_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_MAX_PICKLE = 256 * 2**20


def read_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file by name, read lazily.

    Raises ConversionError for anything but a zip archive with a dictionary of tensors.
    """
    if not zipfile.is_zipfile(path):
        raise ConversionError(
            f"{path} is truncated, or was saved by torch before 1.6: download it again, or save it as safetensors."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root(archive, path)
            if _member(archive, f"{root}/byteorder", b"little") != b"little":
                raise ConversionError(f"{path} holds big-endian numbers: save it again on a little-endian machine.")
            if archive.getinfo(f"{root}/data.pkl").file_size > _MAX_PICKLE:
                raise ConversionError(f"{path} has a pickle of over {_MAX_PICKLE:,} bytes: that is no list of tensors.")
            contents = _TensorsOnly(archive.read(f"{root}/data.pkl"), path, root).load()
            tensors = _dictionary_of_tensors(contents, path)
            return {name: _checked(name, tensor, archive, path) for name, tensor in tensors.items()}
    except (ConversionError, MemoryError):
        raise
    # A malicious or damaged pickle can raise any exception inside the unpickler.
    except Exception as error:
        raise ConversionError(f"{path} is damaged ({type(error).__name__}: {error}): download it again.") from error


@dataclass(frozen=True, slots=True)
class _Storage:
    member: str
    dtype: np.dtype


@dataclass(frozen=True, slots=True)
class _Strided:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Offset and strides count elements."""


class _TensorsOnly(pickle.Unpickler):
    def __init__(self, encoded: bytes, path: Path, root: str):
        super().__init__(io.BytesIO(encoded))
        self.path, self.root = path, root

    def find_class(self, module: str, name: str) -> Any:
        # A new function for every use: a pickle cannot modify one that the next file uses.
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *unused: _strided(storage, offset, shape, strides)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *unused: tensor
        if module == "torch" and name in _STORAGES:
            return name
        raise ConversionError(
            f"{self.path} refers to `{module}.{name}`, which weights do not need: nothing was executed. "
            "Do not trust this file; ask for safetensors."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _location, _numel = pid
        if kind != "storage" or storage not in _STORAGES or not isinstance(key, str):
            raise ConversionError(f"{self.path} refers to {pid!r}, which is not the storage of a tensor.")
        return _Storage(f"{self.root}/data/{key}", _STORAGES[storage])


def _strided(storage: Any, offset: Any, shape: Any, strides: Any) -> _Strided:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor without a storage")
    if any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} and strides {strides}")
    return _Strided(storage, offset, tuple(shape), tuple(strides))


def _dictionary_of_tensors(contents: Any, path: Path) -> dict[str, _Strided]:
    if not isinstance(contents, dict):
        raise ConversionError(f"{path} contains a {type(contents).__name__} instead of a dictionary of tensors.")
    for name, value in contents.items():
        if not isinstance(name, str) or not isinstance(value, _Strided):
            raise ConversionError(f"{path} contains {name!r}, a {type(value).__name__}, among its tensors.")
    return contents


def _checked(name: str, tensor: _Strided, archive: zipfile.ZipFile, path: Path) -> Tensor:
    """The tensor, checked to lie within its storage."""
    dtype = tensor.storage.dtype
    try:
        available = archive.getinfo(tensor.storage.member).file_size // dtype.itemsize
    except KeyError:
        raise ConversionError(f"{path} lacks the bytes of {name}: download it again.") from None
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)) + 1
    needed = tensor.offset + reach if math.prod(tensor.shape) else 0
    if needed > available or math.prod(tensor.shape) > available:
        raise ConversionError(
            f"{path} gives {name} the shape {tensor.shape}, but its storage has only {available:,} values."
        )
    return Tensor(tensor.shape, dtype.name, _reader(tensor, path))


def _reader(tensor: _Strided, path: Path) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        dtype = tensor.storage.dtype
        try:
            with zipfile.ZipFile(path) as archive:
                flat = np.frombuffer(archive.read(tensor.storage.member), dtype)
        except Exception as error:  # `zipfile` raises many types on damaged archives
            raise ConversionError(f"{path} is damaged ({type(error).__name__}: {error}): download it again.") from error
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)

    return read


def _root(archive: zipfile.ZipFile, path: Path) -> str:
    """The top folder of the archive, named after the file that was saved."""
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ConversionError(f"{path} is a zip archive without the pickle of a torch file: save it again.")
    return roots[0]


def _member(archive: zipfile.ZipFile, name: str, default: bytes) -> bytes:
    return archive.read(name).strip() if name in archive.namelist() else default
