"""Configs to JSON and back, their fingerprints, and the difference between two of them.

The resolved config lies beside the checkpoints as JSON. Reading is strict: a file that misses a field or has one too
many was written by another version, and guessing would change a run silently.
"""

import dataclasses
import hashlib
import json
from typing import Any, TypeVar

from jaxcoder.config import fields
from jaxcoder.config.schema import (
    ComputeConfig,
    Corpus,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from jaxcoder.errors import ConfigError

Config = TypeVar("Config", RunConfig, ModelConfig)

_ADDED: dict[tuple[type, str], Any] = {
    (DataConfig, "corpora"): [],
    (DataConfig, "stages"): [],
    (DataConfig, "fim_clean_up"): False,
    (DataConfig, "fim_sentinels_as_text"): False,
    (DataConfig, "fim_replace_incomplete"): False,
    (DataConfig, "fim_drop_empty_pieces"): False,
    (DataConfig, "fim_transform_empty_tail"): False,
    (DataConfig, "pad_in_loss"): False,
    (RunConfig, "init_from"): "",
    (Corpus, "name"): "",
    (Corpus, "eval_store"): None,
    (EvalConfig, "infill_gaps"): 0,
    (ComputeConfig, "xla_options"): "chip",  # changes speed alone
    (ComputeConfig, "loss_chunk_tokens"): 1024,  # memory and speed alone
    (MeshConfig, "num_slices"): None,
    (OptimizerConfig, "skip_grad_norm_above"): None,
    (RunConfig, "watchdog"): {"step_seconds": 600.0, "start_seconds": 3600.0},  # changes no number
    (OptimizerConfig, "max_skipped_steps"): 10,  # nothing was skipped, and nothing but NaN came of it
}
"""Fields that files of older versions lack, with the JSON value of what those versions did."""

_DROPPED = {(ComputeConfig, "loss_chunk_size")}
"""Fields that files of older versions have and that changed memory and speed alone."""


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values. A whole number in a float field becomes a float, so that 1 and 1.0 are one config."""
    plain = {}
    for name, hint in fields.hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            plain[name] = to_dict(value)
        elif dataclasses.is_dataclass(fields.item_type(hint)):
            plain[name] = [to_dict(item) for item in value]
        elif fields.item_type(hint) is not None:
            plain[name] = list(fields.normal(hint, value))
        else:
            plain[name] = fields.normal(hint, value)
    return plain


def to_json(config: RunConfig | ModelConfig) -> str:
    """Indented JSON, fields in the order of the schema, a newline at the end."""
    try:
        return json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        culprits = [name for name, value in fields.leaves(config) if not fields.is_finite(value)]
        raise ConfigError(f"{', '.join(culprits)} is not a finite number: give one.") from error


def from_json(text: str, cls: type[Config] = RunConfig, *, source: str = "the config") -> Config:
    """The config that `to_json` wrote. `source` (a file name) stands in the errors.

    Raises ConfigError that names every missing field, unknown field and value of a wrong type.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON ({error}): restore it from a backup or another checkpoint.") from error
    problems: list[str] = []
    config = _from_plain(cls, plain, "", problems)
    if problems:
        raise ConfigError(
            f"{source} does not fit this version of jaxcoder: {'; '.join(problems)}. Use the jaxcoder that wrote it, "
            "or put these fields right in the file."
        )
    return config


def _from_plain(cls: type, plain: Any, prefix: str, problems: list[str]) -> Any:
    """The dataclass, or None when something was added to `problems`."""
    if not isinstance(plain, dict):
        problems.append(f"{prefix.rstrip('.') or 'the whole'} is {plain!r}, but has to be an object with fields")
        return None
    hints = fields.hints(cls)
    before = len(problems)
    plain = {name: default for (owner, name), default in _ADDED.items() if owner is cls} | plain
    plain = {name: value for name, value in plain.items() if (cls, name) not in _DROPPED}
    problems += [f"{prefix}{name} is missing" for name in hints if name not in plain]
    problems += [f"{prefix}{name} is unknown" for name in plain if name not in hints]
    values = {}
    for name, hint in hints.items():
        if name not in plain:
            continue
        value = plain[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _from_plain(hint, value, f"{prefix}{name}.", problems)
        elif isinstance(value, list) and dataclasses.is_dataclass(item := fields.item_type(hint)):
            values[name] = tuple(
                _from_plain(item, entry, f"{prefix}{name}.{number}.", problems) for number, entry in enumerate(value)
            )
        elif isinstance(value, list) and fields.item_type(hint) is not None and fields.accepts(hint, tuple(value)):
            values[name] = fields.normal(hint, tuple(value))
        elif fields.accepts(hint, value):
            values[name] = fields.normal(hint, value)
        else:
            problems.append(f"{prefix}{name} is {json.dumps(value)}, but has to be {fields.describe(hint)}")
    return cls(**values) if len(problems) == before else None


def fingerprint(config: RunConfig | ModelConfig) -> str:
    """16 hexadecimal digits (64 bits of SHA-256) over all values; any changed field changes it."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def model_fingerprint(model: ModelConfig) -> str:
    """The fingerprint of the architecture alone: what a checkpoint of weights has to share with its reader."""
    return fingerprint(model)


def diff(old: RunConfig | ModelConfig, new: RunConfig | ModelConfig) -> list[str]:
    """One line per changed field, in schema order: "optimizer.peak_learning_rate: 0.0003 -> 0.001"."""
    before, after = dict(fields.leaves(old)), dict(fields.leaves(new))
    names = list(before) + [name for name in after if name not in before]
    absent = "(absent)"
    return [
        f"{name}: {before.get(name, absent)} -> {after.get(name, absent)}"
        for name in names
        if name not in before or name not in after or before[name] != after[name]
    ]
