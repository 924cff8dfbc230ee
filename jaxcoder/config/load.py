"""Loading a RunConfig by name, with overrides from the command line.

A name is a function in `jaxcoder_configs` (the folder `configs/` of a checkout) or `path/to/file.py[:function]`: a
Python function without required parameters that returns a RunConfig.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from jaxcoder.config import fields, schema
from jaxcoder.config.overrides import apply_overrides
from jaxcoder.config.schema import RunConfig
from jaxcoder.config.variant import Variant, with_variant
from jaxcoder.errors import ConfigError
from jaxcoder.formatting import did_you_mean

RunFunction = Callable[[], RunConfig]


def load_run(name_or_path: str, overrides: Sequence[str] = (), variant: Variant | None = None) -> RunConfig:
    """The run called `name_or_path`, with `overrides` such as ["--num-steps", "500", "--data.store", "runs/store"].

    A variant sets the switches for the original's defects (`variant.py`) before the overrides apply.
    Raises ConfigError for an unknown name, file or function, a function that fails, and as `apply_overrides` does.
    `validate` checks the values.
    """
    config = _call(_run_function(name_or_path), name_or_path)
    if variant is not None:
        config = with_variant(config, variant)
    return apply_overrides(config, overrides, prog=f"jaxcoder train {name_or_path}")


def available_runs() -> dict[str, str]:
    """Name -> first line of the docstring, of every run that is installed with the package."""
    return {name: (function.__doc__ or "").partition("\n")[0] for name, function in _installed_functions().items()}


def docstring_of(name_or_path: str) -> str:
    """The docstring of a run's function, "" if it has none. Raises ConfigError as `load_run` does."""
    return inspect.getdoc(_run_function(name_or_path)) or ""


def cost_of(docstring: str) -> str | None:
    """The paragraph of a run's docstring that begins with "Cost:", as one line without that word."""
    found = re.search(r"^Cost:\s*(.+?)(?:\n\s*\n|\Z)", docstring, re.M | re.S)
    return " ".join(found[1].split()) if found else None


def with_store(config: RunConfig, store: str) -> RunConfig:
    """`config` with the single token store `store` instead of its store or mixture."""
    stages = tuple(dataclasses.replace(stage, weights=()) for stage in config.data.stages)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, store=store, corpora=(), stages=stages))


def _run_function(name: str) -> RunFunction:
    path, _, wanted = name.partition(":")
    if path.endswith(".py") or os.sep in name:
        return _function_in_file(path, wanted)
    functions = _installed_functions()
    if name not in functions:
        raise ConfigError(
            f"there is no run called {name!r}{did_you_mean(name, functions, cutoff=0.5)}. "
            f"Choose one of {', '.join(functions) or '(none)'}, or give a file: path/to/file.py:function."
        )
    return functions[name]


def _installed_functions() -> dict[str, RunFunction]:
    import jaxcoder_configs

    found: dict[str, RunFunction] = {}
    for info in sorted(pkgutil.iter_modules(jaxcoder_configs.__path__), key=lambda info: info.name):
        for name, function in _functions_of(importlib.import_module(f"jaxcoder_configs.{info.name}")).items():
            if name in found:
                raise ConfigError(f"configs/ has two runs called {name!r}: rename one of them.")
            found[name] = function
    return found


def _function_in_file(path: str, wanted: str) -> RunFunction:
    if not path.endswith(".py"):
        raise ConfigError(f"{path!r} is not a Python file: give the name of a run, or path/to/file.py:function.")
    if not os.path.isfile(path):
        raise ConfigError(f"there is no file {path!r}: check the path, or give the name of a run.")
    functions = _functions_of(_import_file(path))
    names = ", ".join(functions) or "none"
    if wanted and wanted not in functions:
        near = did_you_mean(wanted, functions, cutoff=0.5)
        raise ConfigError(f"{path} has no function {wanted!r} that returns a RunConfig{near}: it has {names}.")
    if not wanted and len(functions) != 1:
        advice = f"choose one, as in {path}:{next(iter(functions))}" if functions else "write one"
        raise ConfigError(f"{path} has {len(functions)} functions that return a RunConfig ({names}): {advice}.")
    return functions[wanted or next(iter(functions))]


def _functions_of(module: ModuleType) -> dict[str, RunFunction]:
    """Public functions defined in the module that are annotated to return a RunConfig or have neither an annotation nor
    required parameters; failing that, those without an annotation, for the sake of the error."""
    annotated: dict[str, RunFunction] = {}
    bare: dict[str, RunFunction] = {}
    for name, function in vars(module).items():
        if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        returns = inspect.signature(function).return_annotation
        if returns is inspect.Signature.empty:
            bare[name] = function
        if returns is RunConfig or str(returns).rpartition(".")[2] == "RunConfig":
            annotated[name] = function
    return annotated | {name: function for name, function in bare.items() if not _required(function)} or bare


def _required(function: RunFunction) -> list[str]:
    """Names of the parameters without a default."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _import_file(path: str) -> ModuleType:
    module_name = "jaxcoder_user_config_" + re.sub(r"\W", "_", os.path.abspath(path))
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses in the file look up their module here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ConfigError(f"{path} fails when imported: {_describe(error)}. `--debug` shows where.") from error
    return module


def _call(function: RunFunction, name: str) -> RunConfig:
    if required := _required(function):
        raise ConfigError(f"the run {name} needs the arguments {', '.join(required)}: give each of them a default.")
    try:
        config = function()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"the run {name} fails: {_describe(error)}. `--debug` shows where.") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"the run {name} returns {type(config).__name__}: it must return a RunConfig.")
    if problems := fields.type_problems(config):
        raise ConfigError(f"the run {name} is invalid: {' '.join(problems)}")
    return config


def _describe(error: BaseException) -> str:
    """The error on one line, with the nearest field where one of a config is misspelt."""
    text = f"{type(error).__name__}: {error}"
    misspelt = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    cls: Any = getattr(schema, misspelt[1], None) if misspelt else None
    if misspelt and dataclasses.is_dataclass(cls):
        text += did_you_mean(misspelt[2], [field.name for field in dataclasses.fields(cls)])
    return text
