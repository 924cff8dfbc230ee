"""From a name and the command line's overrides to a RunConfig.

A name is a function of `jaxcoder_configs` (the folder `configs/` of a checkout) or `path/to/file.py[:function]`: a
Python function without required parameters that returns a full RunConfig. Overrides are parsed by tyro.
"""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Sequence
from types import ModuleType, NoneType
from typing import Any, Literal

from jaxcoder.config import fields
from jaxcoder.config.schema import RunConfig
from jaxcoder.config.variant import Variant, with_variant
from jaxcoder.errors import ConfigError

RunFunction = Callable[[], RunConfig]


def load_run(name_or_path: str, overrides: Sequence[str] = (), variant: Variant | None = None) -> RunConfig:
    """The run called `name_or_path`, with `overrides` such as ["--num-steps", "500", "--data.store", "runs/store"].

    A variant sets the switches for the original's defects (`variant.py`); overrides come after it.
    "--help" among the overrides prints every field with its present value and exits (SystemExit).
    Raises ConfigError for a name, file or function that is not there, a function that fails, an unknown field (the
    nearest is suggested) and a value of the wrong type. The values are checked against each other by `validate`.
    """
    config = _call(_function(name_or_path), name_or_path)
    if variant is not None:
        config = with_variant(config, variant)
    return apply_overrides(config, overrides, prog=f"jaxcoder train {name_or_path}")


def available_runs() -> dict[str, str]:
    """Name -> first line of the docstring, of every run that is installed with the package."""
    return {name: (function.__doc__ or "").partition("\n")[0] for name, function in _installed_functions().items()}


def docstring_of(name_or_path: str) -> str:
    """The docstring of a run's function, "" if it has none; errors as in `load_run`."""
    return inspect.getdoc(_function(name_or_path)) or ""


def cost_of(docstring: str) -> str | None:
    """The paragraph of a run's docstring that begins with "Cost:", as one line without that word."""
    found = re.search(r"^Cost:\s*(.+?)(?:\n\s*\n|\Z)", docstring, re.M | re.S)
    return " ".join(found[1].split()) if found else None


def apply_overrides(config: RunConfig, overrides: Sequence[str], prog: str = "jaxcoder train NAME") -> RunConfig:
    """`config` with single fields replaced; errors and "--help" as in `load_run`."""
    if not overrides:
        return config
    _check_options(overrides, prog, config)
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(RunConfig, prog=prog, default=config, args=list(overrides))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(f"{_first_paragraph(said.getvalue())} See `{prog} --help`.") from None


def with_store(config: RunConfig, store: str) -> RunConfig:
    """`config` reading `store` alone, in place of its store or its mixture."""
    stages = tuple(dataclasses.replace(stage, weights=()) for stage in config.data.stages)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, store=store, corpora=(), stages=stages))


# --- finding the function --------------------------------------------------------------------------------------------


def _function(name: str) -> RunFunction:
    return _function_in_file(name) if _is_path(name) else _function_by_name(name)


def _is_path(name: str) -> bool:
    return name.partition(":")[0].endswith(".py") or os.sep in name


def _installed_functions() -> dict[str, RunFunction]:
    import jaxcoder_configs

    found: dict[str, RunFunction] = {}
    for info in sorted(pkgutil.iter_modules(jaxcoder_configs.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"jaxcoder_configs.{info.name}")
        for name, function in _run_functions(module).items():
            if name in found:
                raise ConfigError(f"configs/ has two runs called {name!r}: rename one of them.")
            found[name] = function
    return found


def _run_functions(module: ModuleType) -> dict[str, RunFunction]:
    """Public functions defined in the module itself that are annotated to return a RunConfig, or that have neither an
    annotation nor required parameters."""
    found = {}
    for name, function in vars(module).items():
        if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        returns = inspect.signature(function).return_annotation
        bare = returns is inspect.Signature.empty and not _required_parameters(function)
        if bare or returns is RunConfig or str(returns).rpartition(".")[2] == "RunConfig":
            found[name] = function
    return found


def _required_parameters(function: RunFunction) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _function_by_name(name: str) -> RunFunction:
    functions = _installed_functions()
    if name not in functions:
        raise ConfigError(
            f"there is no run called {name!r}{_did_you_mean(name, functions)}. "
            f"There are: {', '.join(functions) or 'none'}; or give a file: path/to/file.py:function."
        )
    return functions[name]


def _function_in_file(name: str) -> RunFunction:
    path, _, wanted = name.partition(":")
    if not path.endswith(".py"):
        raise ConfigError(f"{path!r} is no Python file: give a run's name, or path/to/file.py:function.")
    if not os.path.isfile(path):
        raise ConfigError(f"there is no file {path!r}: check the path, or give a run's name.")
    module = _import_file(path)
    functions = _run_functions(module)
    if not functions or wanted:
        _refuse_parameters(module, path, wanted)
    if wanted and wanted not in functions:
        raise ConfigError(
            f"{path} has no function {wanted!r} that returns a RunConfig{_did_you_mean(wanted, functions)}: "
            f"it has {', '.join(functions) or 'none'}."
        )
    if not wanted and len(functions) != 1:
        raise ConfigError(
            f"{path} has {len(functions)} functions that return a RunConfig ({', '.join(functions) or 'none'}): "
            + (f"say which, as in {path}:{next(iter(functions))}." if functions else "write one.")
        )
    return functions[wanted or next(iter(functions))]


def _refuse_parameters(module: ModuleType, path: str, wanted: str) -> None:
    """Raises ConfigError if the function asked for, or the only ones there are, cannot be called without arguments."""
    candidates = {
        name: _required_parameters(function)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
        and inspect.signature(function).return_annotation is inspect.Signature.empty
    }
    for name in [wanted] if wanted in candidates else [] if wanted else candidates:
        if candidates[name]:
            raise ConfigError(
                f"the function {name} of {path} needs the arguments {', '.join(candidates[name])}: a run is made "
                "without any, give each of them a default."
            )


def _import_file(path: str) -> ModuleType:
    module_name = "jaxcoder_user_config_" + re.sub(r"\W", "_", os.path.abspath(path))
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses in the file look their module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ConfigError(f"{path} fails when imported: {_said(error)}. `--debug` shows where.") from error
    return module


def _call(function: RunFunction, name: str) -> RunConfig:
    required = _required_parameters(function)
    if required:
        raise ConfigError(f"the run {name} needs the arguments {', '.join(required)}: give each of them a default.")
    try:
        config = function()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"the run {name} fails: {_said(error)}. `--debug` shows where.") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"the run {name} returns {type(config).__name__}: it has to return a RunConfig.")
    problems = fields.type_problems(config)
    if problems:
        raise ConfigError(f"the run {name} cannot work: {' '.join(problems)}")
    return config


def _said(error: BaseException) -> str:
    """The error in a line; a misspelt field of a dataclass gets the nearest one suggested."""
    text = f"{type(error).__name__}: {error}"
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        names = [part for name, _ in fields.walk(RunConfig) for part in name.split(".")]
        text += _did_you_mean(unknown[1], names)
    return text


# --- overrides -------------------------------------------------------------------------------------------------------


def _check_options(overrides: Sequence[str], prog: str, config: RunConfig) -> None:
    """Refuses unknown fields, values of a wrong type and values that follow no field, in better words than tyro's."""
    options = _options(config)
    waiting: str | None = None  # the option whose value comes next
    several: str | None = None  # the option that takes any number of values and has one
    for argument in overrides:
        if waiting and argument.startswith("--"):
            break
        if argument in ("-h", "--help"):
            continue
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            option = name.replace("_", "-")
            if option in ("data.corpora", "data.stages"):
                raise ConfigError(
                    f"`--{name}` is a list: write it in the run's Python function; what stands there can be changed as "
                    f"`--{option}.0.{'weight' if option == 'data.corpora' else 'from-sample'}`."
                )
            if option not in options:
                near = _nearest_option(option, options)
                raise ConfigError(f"there is no field `--{name}`{near}. See `{prog} --help`.")
            is_switch = options[option] is bool
            if equals and is_switch:
                opposite = _opposite(option, options)
                raise ConfigError(f"`--{name}` is a switch: write it, or `{opposite}`, without {value!r}.")
            if equals:
                _check_value(option, value, options[option])
            waiting, several = None if is_switch or equals else option, None
        elif waiting or several:
            several = waiting or several
            _check_value(several, argument, options[several])
            waiting, several = None, several if fields.item_type(options[several]) else None
        else:
            raise ConfigError(f"{_stray(argument, options)} See `{prog} --help`.")
    if waiting:
        raise ConfigError(f"`--{waiting}` has no value behind it: it takes {fields.describe(options[waiting])}.")


def _check_value(option: str, text: str, hint: Any) -> None:
    one = fields.item_type(hint) or hint
    if not any(_parses(choice, text) for choice in typing.get_args(one) or (one,)):
        raise ConfigError(f"`--{option}` is {text!r}, but has to be {fields.describe(hint)}.")


def _parses(choice: Any, text: str) -> bool:
    """Whether the text is a value of one choice of a type hint: a type, or one of the values of a Literal."""
    if typing.get_origin(choice) is Literal:
        return text in typing.get_args(choice)
    if choice in (int, float):
        try:
            choice(text)
        except ValueError:
            return False
        return True
    return choice is str or text == ("None" if choice is NoneType else choice)


def _options(config: RunConfig) -> dict[str, Any]:
    """Every option without its dashes -> its type hint. A switch has a "no-" form."""
    options = {}
    for name, hint in fields.options(config):
        option = name.replace("_", "-")
        options[option] = hint
        if hint is bool:
            options[_negative(option)] = hint
    return options


def _negative(option: str) -> str:
    room, dot, name = option.rpartition(".")
    return f"{room}{dot}no-{name}"


def _opposite(option: str, options: dict[str, Any]) -> str:
    room, dot, name = option.rpartition(".")
    positive = room + dot + name.removeprefix("no-")
    return f"--{positive}" if name.startswith("no-") and positive in options else f"--{_negative(option)}"


def _stray(argument: str, options: dict[str, Any]) -> str:
    name, equals, value = argument.partition("=")
    option = name.replace("_", "-")
    if equals and option in options:
        return f"{argument!r} belongs to no option: write `--{option} {value}`."
    return f"{argument!r} belongs to no option: every field is set as `--field value` (a switch as `--field`)."


def _nearest_option(option: str, options: dict[str, Any]) -> str:
    """The nearest option, looked for among the full names first and then among their last parts."""
    near = difflib.get_close_matches(option, options, n=1, cutoff=0.75)
    if not near:
        by_last = {name.rpartition(".")[2]: name for name in options}
        last = difflib.get_close_matches(option.rpartition(".")[2], by_last, n=1, cutoff=0.6)
        near = [by_last[last[0]]] if last else difflib.get_close_matches(option, options, n=1, cutoff=0.5)
    return f" (did you mean `--{near[0]}`?)" if near else ""


def _did_you_mean(word: str, known: Sequence[str] | dict[str, RunFunction]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _first_paragraph(box: str) -> str:
    """tyro's message out of the box it draws: the lines up to the first rule, as one sentence."""
    lines = []
    for line in box.splitlines():
        text = line.strip("│┃| \t")
        if set(text) <= set("─━╭╮╰╯-"):
            if lines:
                break
        elif not line.startswith(("╭", "┏", "╰")):
            lines.append(text)
    sentence = " ".join(lines).strip()
    return sentence if sentence.endswith((".", "?")) else f"{sentence}."
