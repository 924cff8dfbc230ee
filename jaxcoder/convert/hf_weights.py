"""The weights of a directory in Hugging Face's format, checked against its config and read lazily.

Supported files: model.safetensors or pytorch_model.bin, or shards of either with an index.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxcoder.checkpoint.names import listed
from jaxcoder.config import ModelConfig
from jaxcoder.convert.hf_config import read_hf_config
from jaxcoder.convert.hf_names import EMBEDDING, LM_HEAD, Entry, entries, shape, to_jax_arrays
from jaxcoder.convert.safetensors import Tensor, read_safetensors
from jaxcoder.convert.torch_file import read_torch_file
from jaxcoder.errors import ConversionError

_FORMS = (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch_file))
_BUFFERS = ("attn.bias", "attn.masked_bias")
"""Causal masks that early files contain; `transformer.bias` is the later one."""
_OTHER_PREFIXES = {
    "module.": "DistributedDataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "PEFT (merge the adapter into the model first)",
}
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class HFWeights:
    """A checked directory: it has every tensor of the table in the expected shape."""

    directory: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]

    @property
    def dtype(self) -> str:
        """The dtype of all tensors, "float32" if they have several."""
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def entries(self) -> list[Entry]:
        return entries(self.config)

    def read(self, entry: Entry) -> dict[str, np.ndarray]:
        """The fp32 jax arrays of one hf tensor."""
        tensor = self.tensors[entry.hf_name].read().astype(np.float32, copy=False)
        return to_jax_arrays(entry, tensor, self.config)

    def reader(self) -> Callable[[str, object], np.ndarray]:
        """A `fetch` for `checkpoint.names.assemble_tree`: reads the jax array of a name."""
        entry_of = {name: entry for entry in self.entries() for name in entry.jax_dims}
        return lambda name, target: self.read(entry_of[name])[name]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """All jax arrays, one at a time."""
        for entry in self.entries():
            yield from self.read(entry).items()


def is_hf_directory(directory: Path) -> bool:
    """Whether the directory has weights in a PyTorch format."""
    return any((directory / name).is_file() for form, _ in _FORMS for name in (form, f"{form}.index.json"))


def open_hf_weights(directory: Path) -> HFWeights:
    """Opens and checks a directory. Raises ConversionError for tensors that are missing, unexpected or of another shape
    or dtype."""
    config, is_tied = read_hf_config(directory)
    tensors = _without_buffers(_with_prefix(directory, _read_headers(directory)))
    if is_tied and EMBEDDING not in tensors and LM_HEAD in tensors:
        tensors[EMBEDDING] = tensors[LM_HEAD]  # tied: either name is valid
    if config.num_layers > len(tensors):
        raise ConversionError(
            f"{directory}/config.json has {config.num_layers:,} layers, but the weights have only {len(tensors)} "
            "tensors: use the config.json that belongs to them."
        )
    _check(directory, tensors, config)
    head = tensors.pop(LM_HEAD, None)
    if head is None and not is_tied:
        raise ConversionError(
            f"{directory}/config.json sets tie_word_embeddings to false, but the weights have no {LM_HEAD}: add it, or "
            "set tie_word_embeddings to true if the head is the embedding."
        )
    if head is not None and head is not tensors[EMBEDDING]:
        _check_tied(directory, head, tensors[EMBEDDING])
    return HFWeights(directory, config, tensors)


def _read_headers(directory: Path) -> dict[str, Tensor]:
    for form, read in _FORMS:
        if (directory / form).is_file():
            return read(directory / form)
        index = directory / f"{form}.index.json"
        if index.is_file():
            return _read_shards(index, read)
    names = ", ".join(form for form, _ in _FORMS)
    raise ConversionError(f"{directory} has no weights: none of {names} (or their .index.json) exists.")


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all shards, which must be in the files that the index names."""
    tensors: dict[str, Tensor] = {}
    shard_of: dict[str, str] = {}
    problems = []
    weight_map = _weight_map(index)
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read(index.parent / shard).items():
            if name in tensors:
                problems.append(f"{name} is in both {shard_of[name]} and {shard}")
            elif weight_map.get(name, shard) != shard:
                problems.append(f"{name} is in {shard}, but the index has it in {weight_map[name]}")
            tensors[name], shard_of[name] = tensor, shard
    problems += [f"{name} is not in {shard}" for name, shard in weight_map.items() if name not in tensors]
    if problems:
        raise ConversionError(f"{index} does not match its shards: {listed(problems)}. Download them again.")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of files that exist."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        # A name with a directory in it could refer to files outside this directory.
        is_sound = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise ConversionError(f"{index} is not the index of a sharded model: download it again.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ConversionError(f"{index.parent} lacks {listed(missing)} of its {len(names)} shards: download it again.")
    return weight_map


def _with_prefix(directory: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names with the prefix of the full model; a bare decoder is saved without it.

    Raises ConversionError for known formats of other programs.
    """
    for prefix, program in _OTHER_PREFIXES.items():
        if any(name.startswith(prefix) for name in tensors):
            raise ConversionError(
                f"the tensors in {directory} have the prefix `{prefix}` of {program}: save the model that it wraps "
                "(in PyTorch, its `save_pretrained`)."
            )
    if any(name.endswith((".q_attn.weight", ".kv_attn.weight")) for name in tensors):
        raise ConversionError(
            f"{directory} is in SantaCoder's first format, with q_attn and kv_attn: use its GPTBigCode form, "
            "bigcode/gpt_bigcode-santacoder."
        )
    if any(name.startswith("transformer.") for name in tensors):
        return tensors
    return {name if name == LM_HEAD else f"transformer.{name}": tensor for name, tensor in tensors.items()}


def _without_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def is_buffer(name: str) -> bool:
        return name == "transformer.bias" or (name.startswith("transformer.h.") and name.split(".", 3)[-1] in _BUFFERS)

    return {name: tensor for name, tensor in tensors.items() if not is_buffer(name)}


def _check(directory: Path, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    expected = {entry.hf_name: shape(entry.hf_dims, config) for entry in entries(config)}
    allowed = expected | {LM_HEAD: expected[EMBEDDING]}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in allowed]
    for name, tensor in tensors.items():
        if name in allowed and tensor.shape != allowed[name]:
            problems.append(f"{name} is {list(tensor.shape)} instead of {list(allowed[name])}")
        elif name in allowed and tensor.dtype not in ("float32", "float16", "bfloat16"):
            problems.append(f"{name} is {tensor.dtype}, not float32, float16 or bfloat16")
    if problems:
        raise ConversionError(f"the weights in {directory} do not fit its config.json: {listed(problems)}.")


def _check_tied(directory: Path, head: Tensor, embedding: Tensor) -> None:
    head_rows, embedding_rows = head.read(), embedding.read()
    for start in range(0, len(head_rows), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        if head_rows[rows].tobytes() != embedding_rows[rows].tobytes():
            raise ConversionError(
                f"{directory} has an lm_head.weight that differs from {EMBEDDING}: only tied heads are supported, as "
                "in every published model of the family."
            )
