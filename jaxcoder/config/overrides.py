"""Command-line overrides of a config: `--optimizer.peak-learning-rate 1e-4 --no-tensorboard --data.corpora.0.weight 2`.

Options are the dotted names of the fields, with hyphens or underscores. A value follows its option after a space or
`=`; a tuple takes all values up to the next option; `--field` and `--no-field` set a bool.
"""

import dataclasses
import shutil
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from jaxcoder.config import fields
from jaxcoder.errors import ConfigError
from jaxcoder.formatting import nearest

Config = TypeVar("Config")


def apply_overrides(config: Config, overrides: Sequence[str], prog: str = "jaxcoder train NAME") -> Config:
    """`config` with the fields replaced that `overrides` names; `prog` is the command in messages.

    "--help" among the overrides prints every field with its value and documentation and exits (SystemExit).
    Raises ConfigError for an unknown field (the nearest one is suggested), a missing value or one of the wrong type.
    """
    options = {_option(leaf.name): leaf for leaf in fields.walk(config)}
    negatives = {_negative(option): option for option, leaf in options.items() if leaf.hint is bool}
    words = list(overrides)
    wants_help = False
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            wants_help = True
            continue
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}: set a field as `--field value`. See `{prog} --help`.")
        given, equals, text = word.partition("=")
        option = given.replace("_", "-")
        if option in negatives or (option in options and options[option].hint is bool):
            if equals:
                raise ConfigError(f"`{given}` takes no value: use it, or its opposite, without {text!r}.")
            config = fields.replace(config, options[negatives.get(option, option)].name, option in options)
            continue
        if option not in options:
            raise ConfigError(f"{_unknown(given, option, [*options, *negatives])}. See `{prog} --help`.")
        leaf = options[option]
        item = fields.item_type(leaf.hint)
        if dataclasses.is_dataclass(item) and isinstance(item, type):
            raise ConfigError(f"`{given}` is a list of {item.__name__}: write it in the run's Python function.")
        texts = [text] if equals else []
        while not equals and words and not words[0].startswith("--") and (item or not texts):
            texts.append(words.pop(0))
        if not texts:
            raise ConfigError(f"`{given}` has no value: it must be {fields.describe(leaf.hint)}.")
        values = []
        for text in texts:
            try:
                values.append(fields.parse(item or leaf.hint, text))
            except ValueError:
                raise ConfigError(f"`{given}` is {text!r}, but must be {fields.describe(leaf.hint)}.") from None
        config = fields.replace(config, leaf.name, tuple(values) if item else values[0])
    if wants_help:
        print(_help(config, prog))
        raise SystemExit(0)
    return config


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _negative(option: str) -> str:
    """ "--no-tensorboard", "--data.no-document-mask"."""
    group, dot, name = option[2:].rpartition(".")
    return f"--{group}{dot}no-{name}"


def _unknown(given: str, option: str, options: list[str]) -> str:
    group = [name for name in options if name.startswith(option + ".")]
    if group:
        return f"`{given}` is a group of fields: set one of them, such as `{group[0]}`"
    # The full names first, then the names without their groups.
    near = nearest(option, options, cutoff=0.75)
    if near is None:
        by_name = {name[2:].rpartition(".")[2]: name for name in options}
        last = nearest(option[2:].rpartition(".")[2], by_name)
        near = by_name[last] if last else nearest(option, options, cutoff=0.5)
    return f"there is no field `{given}`" + (f" (did you mean `{near}`?)" if near else "")


def _help(config: object, prog: str) -> str:
    """Every field as an option, with its type, value and documentation, under a heading for each dataclass."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = [f"usage: {prog} [OPTIONS] [--FIELD VALUE ...]", ""]
    lines += [f"Fields of the run and their values (`{' '.join(prog.split()[:2])} --help` lists the options):", ""]
    group = None
    for leaf in sorted(fields.walk(config), key=lambda leaf: "." in leaf.name):  # those of no group first
        option = _option(leaf.name)
        path = leaf.name.rpartition(".")[0]
        if path != group:
            group = path
            if path:
                about = " ".join((leaf.owner.__doc__ or "").split())
                lines += ["", *textwrap.wrap(f"{path}: {about}", width)]
        name = f"{option}, {_negative(option)}" if leaf.hint is bool else f"{option} {_metavar(leaf.hint)}"
        lines.append(f"  {name}  (value: {leaf.value!r})")
        lines += textwrap.wrap(leaf.doc, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _metavar(hint: Any) -> str:
    """ "INT|None", "{gelu_tanh,gelu}", "[FLOAT ...]"."""
    item = fields.item_type(hint)
    if item is not None:
        return f"[{_metavar(item)} ...]"
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(typing.get_args(hint)) + "}"
    members = fields.choices(hint)
    return "|".join(map(_metavar, members)) if len(members) > 1 else _METAVARS.get(hint, hint.__name__.upper())


_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", type(None): "None"}
