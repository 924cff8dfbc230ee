"""The fields of the config dataclasses, walked by their type hints: what loading, validating and reading share."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, Union


@cache
def hints(cls: type) -> dict[str, Any]:
    """Field name -> resolved type hint of a config dataclass, in order of declaration."""
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


def item_type(hint: Any) -> Any:
    """The type of the items of a `tuple[X, ...]`, None for other hints."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type hint) of every leaf field: ("model.num_layers", int). A tuple is one leaf."""
    for name, hint in hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from walk(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf field of a config; dataclasses in a tuple are numbered: "data.corpora.0.store"."""
    for name in hints(type(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            for number, item in enumerate(value):
                yield from leaves(item, f"{prefix}{name}.{number}.")
        else:
            yield prefix + name, value


def options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type hint) of every field that the command line can set in `config`: those of `leaves`."""
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from options(value, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(item_type(hint)):
            for number, item in enumerate(value):
                yield from options(item, f"{prefix}{name}.{number}.")
        else:
            yield prefix + name, hint


def is_finite(value: Any) -> bool:
    """False for NaN and infinities, alone or in a tuple."""
    if isinstance(value, tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value has the declared type. A whole number serves as a float; a bool is no number."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return any(accepts(option, value) for option in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(accepts(item_type(hint), item) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def normal(hint: Any, value: Any) -> Any:
    """The value, as a float where the field is one: 1 and 1.0 are the same config."""
    if typing.get_origin(hint) is tuple:
        return tuple(normal(item_type(hint), item) for item in value)
    options = typing.get_args(hint) or (hint,)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and float in options and int not in options else value


def describe(hint: Any) -> str:
    """The type in a user's words: "a whole number or None"."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(f'"{option}"' for option in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if origin is tuple:
        return f"a tuple, each item {describe(item_type(hint))}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "None"}
    return names.get(hint, f"a {hint.__name__}")


def type_problems(config: Any, prefix: str = "") -> list[str]:
    """One sentence for every field that holds a value of another type than declared (Python does not check)."""
    problems = []
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if not accepts(hint, value):
            problems.append(f"{prefix}{name} is {value!r}, but has to be {describe(hint)}.")
        elif dataclasses.is_dataclass(hint):
            problems += type_problems(value, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(item_type(hint)):
            for number, item in enumerate(value):
                problems += type_problems(item, f"{prefix}{name}.{number}.")
    return problems
