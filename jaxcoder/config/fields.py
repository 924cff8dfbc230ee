"""The fields of the config dataclasses: their constraints, types, documentation, and a walk over all of them.

A constraint is a function from a value to what the value must be ("at least 0"), or None if it is satisfied. It is
stored in the metadata of the field: `num_layers: int = positive()`, `fim_rate: float = between(0, 1, default=0.5)`.
`None` in an optional field satisfies every constraint; each item of a tuple is checked.
"""

import ast
import dataclasses
import inspect
import itertools
import math
import struct
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, Union

Constraint = Callable[[Any], str | None]

SMALLEST_FP32 = 2.0**-126
"""Devices flush smaller numbers to zero."""


def to_fp32(value: float) -> float:
    """The nearest fp32 number, which is what the devices compute with; infinite above the largest one."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


# --- Constraints -----------------------------------------------------------------------------------------------------


def constrained(constraint: Constraint, default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A dataclass field with a constraint; a required field if `default` is left out."""
    return dataclasses.field(default=default, metadata={"constraint": constraint, **metadata})


def positive(default: Any = dataclasses.MISSING, *, dim: str | None = None) -> Any:
    """A field above 0, in fp32 too if it is a float. dim: it is the size of this logical dim, which the mesh shards."""

    def constraint(value: float) -> str | None:
        if value <= 0:
            return "larger than 0"
        return None if value >= SMALLEST_FP32 else f"at least {SMALLEST_FP32:.1e}, because it would be 0 in fp32"

    return constrained(constraint, default, dim=dim)


def non_negative(default: Any = dataclasses.MISSING) -> Any:
    """A field of 0 or more."""
    return constrained(lambda value: None if value >= 0 else "0 or larger", default)


def between(low: float, high: float, default: Any = dataclasses.MISSING) -> Any:
    """A field from `low` to `high`, both included."""
    return constrained(lambda value: None if low <= value <= high else f"from {low} to {high}", default)


def below_one(default: Any = dataclasses.MISSING) -> Any:
    """A field of at least 0 and below 1, in fp32 too: a dropout rate, a decay rate of Adam."""
    return constrained(lambda value: None if value >= 0 and to_fp32(value) < 1 else "at least 0 and below 1", default)


def non_empty(default: Any = dataclasses.MISSING) -> Any:
    """A string field that must be set."""
    return constrained(lambda value: None if value else "a non-empty string", default)


def mesh_axis(default: int) -> Any:
    """A field that is the size of a mesh axis; its constraints are checked together with those of the other axes."""
    return dataclasses.field(default=default, metadata={"is_axis": True})


# --- Walking ---------------------------------------------------------------------------------------------------------


@cache
def hints(cls: Any) -> dict[str, Any]:
    """Field name -> resolved type hint of a config dataclass, in order of declaration."""
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


@cache
def docs(cls: Any) -> dict[str, str]:
    """Field name -> the string literal under the field in the source of a config dataclass, on one line."""
    body: Any = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    return {
        str(field.target.id): " ".join(text.value.value.split())  # type: ignore[union-attr, attr-defined]
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def item_type(hint: Any) -> Any:
    """The type of the items of a `tuple[X, ...]`, None for other hints."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


class Leaf(NamedTuple):
    """A field that holds no other config. `name` is dotted: "model.num_layers", "data.corpora.0.store"."""

    name: str
    value: Any
    hint: Any
    owner: type
    field: dataclasses.Field

    @property
    def doc(self) -> str:
        return docs(self.owner).get(self.field.name, "")


def walk(config: Any, prefix: str = "") -> Iterator[Leaf]:
    """Every leaf of a config in order of declaration. Configs in a tuple are numbered; an empty tuple is a leaf, and so
    is a value of the wrong type in place of a config."""
    cls: Any = type(config)
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        hint: Any = hints(cls)[field.name]
        item = item_type(hint)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, hint):
            yield from walk(value, f"{name}.")
        elif dataclasses.is_dataclass(item) and value and accepts(hint, value):
            for number, entry in enumerate(value):
                yield from walk(entry, f"{name}.{number}.")
        else:
            yield Leaf(name, value, hint, type(config), field)


def leaves(config: Any) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf."""
    return ((leaf.name, leaf.value) for leaf in walk(config))


def replace(config: Any, name: str, value: Any) -> Any:
    """`config` with the field of a dotted name replaced."""
    head, _, rest = name.partition(".")
    if isinstance(config, tuple):
        number = int(head)
        return (*config[:number], replace(config[number], rest, value), *config[number + 1 :])
    return dataclasses.replace(config, **{head: replace(getattr(config, head), rest, value) if rest else value})


# --- Types -----------------------------------------------------------------------------------------------------------


def choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union, (int, NoneType) for `int | None`; any other type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_finite(value: Any) -> bool:
    """False for NaN and infinities, alone or in a tuple."""
    if isinstance(value, tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value has the declared type. An int serves as a float; a bool is not a number."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return any(accepts(option, value) for option in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(accepts(item_type(hint), item) for item in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def parse(hint: Any, text: str) -> Any:
    """The value that a text on the command line stands for. Raises ValueError if it has another type."""
    for choice in sorted(choices(hint), key=lambda choice: choice is not types.NoneType):
        if typing.get_origin(choice) is Literal and text in typing.get_args(choice):
            return text
        if choice is types.NoneType and text == "None":
            return None
        if choice in (int, float):
            try:
                return choice(text)
            except ValueError:
                continue
        if choice is str:
            return text
    raise ValueError(text)


def normal(hint: Any, value: Any) -> Any:
    """The value, as a float where the field is one: 1 and 1.0 are the same config."""
    if typing.get_origin(hint) is tuple:
        return tuple(normal(item_type(hint), item) for item in value)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_int and float in choices(hint) else value


def describe(hint: Any) -> str:
    """The type in words: "an integer or None"."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(f'"{option}"' for option in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, typing.get_args(hint)))
    if origin is tuple:
        return f"a tuple, each item {describe(item_type(hint))}"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", types.NoneType: "None"}
    return names.get(hint, f"a {hint.__name__}")


# --- Checking --------------------------------------------------------------------------------------------------------


def type_problems(config: Any) -> list[str]:
    """One sentence for every field that holds a value of another type than declared (Python does not check)."""
    return [
        f"{leaf.name} is {leaf.value!r}, but must be {describe(leaf.hint)}."
        for leaf in walk(config)
        if not accepts(leaf.hint, leaf.value)
    ]


def value_problems(config: Any, prefix: str = "") -> list[str]:
    """One sentence for every number that is not finite in fp32 and every value that violates its constraint. The types
    must be right."""
    problems = []
    for leaf in walk(config, prefix):
        is_tuple = isinstance(leaf.value, tuple)
        for number, value in enumerate(leaf.value if is_tuple else (leaf.value,)):
            name = f"{leaf.name}[{number}]" if is_tuple else leaf.name
            constraint = leaf.field.metadata.get("constraint")
            if not is_finite(value):
                problems.append(f"{name} is {value}, but must be a finite number.")
            elif isinstance(value, float) and math.isinf(to_fp32(value)):
                problems.append(f"{name} is {value}, which is infinite in fp32: use a smaller number.")
            elif value is not None and constraint is not None and (required := constraint(value)):
                problems.append(f"{name} is {value!r}, but must be {required}.")
    return problems
