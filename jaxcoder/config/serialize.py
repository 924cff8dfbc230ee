"""Configs to JSON and back, their fingerprints, and the difference between two of them.

The resolved config is written as JSON next to the checkpoints. A field that a file lacks takes its default, so a new
field needs a default that keeps the behaviour of older runs. An unknown field or a wrong type is an error.
"""

import dataclasses
import hashlib
import json
from typing import Any, TypeVar

from jaxcoder.config import fields
from jaxcoder.config.schema import ModelConfig, RunConfig
from jaxcoder.errors import ConfigError

Config = TypeVar("Config", RunConfig, ModelConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values. An int in a float field becomes a float, so that 1 and 1.0 are one config."""
    plain: dict[str, Any] = {}
    cls: Any = type(config)
    for name, hint in fields.hints(cls).items():
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
        names = [name for name, value in fields.leaves(config) if not fields.is_finite(value)]
        raise ConfigError(f"{', '.join(names)} must be a finite number.") from error


def from_json(text: str, cls: type[Config] = RunConfig, *, source: str = "the config") -> Config:  # type: ignore[assignment]
    """The config that `to_json` wrote. `source` (a file name) is used in the errors.

    Raises ConfigError that names every missing required field, unknown field and value of a wrong type.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not JSON ({error}): restore it from a backup or another checkpoint.") from error
    problems: list[str] = []
    config = _from_plain(cls, plain, "", problems)
    if problems:
        raise ConfigError(
            f"{source} does not fit this version of jaxcoder: {'; '.join(problems)}. Use the version that wrote it, "
            "or correct these fields in the file."
        )
    return config


def _from_plain(hint: Any, plain: Any, name: str, problems: list[str]) -> Any:
    """The value of the field `name` ("" is the config itself); what is wrong with it is added to `problems`."""
    item = fields.item_type(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(plain, dict):
            problems.append(f"{name or 'the content'} is {json.dumps(plain)}, but must be an object with fields")
            return None
        prefix, known = f"{name}." if name else "", fields.hints(hint)
        required = {field.name for field in dataclasses.fields(hint) if _is_required(field)}
        problems += [f"{prefix}{key} is missing" for key in known if key in required - plain.keys()]
        problems += [f"{prefix}{key} is unknown" for key in plain if key not in known]
        values = {key: _from_plain(known[key], plain[key], prefix + key, problems) for key in known if key in plain}
        return None if problems else hint(**values)
    if isinstance(plain, list) and dataclasses.is_dataclass(item):
        return tuple(_from_plain(item, entry, f"{name}.{number}", problems) for number, entry in enumerate(plain))
    value = tuple(plain) if isinstance(plain, list) and item is not None else plain
    if not fields.accepts(hint, value):
        problems.append(f"{name} is {json.dumps(plain)}, but must be {fields.describe(hint)}")
        return None
    return fields.normal(hint, value)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def fingerprint(config: RunConfig | ModelConfig) -> str:
    """16 hexadecimal digits (64 bits of SHA-256) over all values; any changed field changes it."""
    canonical = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def model_fingerprint(model: ModelConfig) -> str:
    """The fingerprint of the architecture alone: what a checkpoint of weights must have in common with its reader."""
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
