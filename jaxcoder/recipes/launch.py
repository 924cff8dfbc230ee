"""Fills in the files of `launch/` for `jaxcoder launch`.

A file declares its variables between the lines "# --- variables" and "# --- end of variables", one per line:
`NAME=default  # help` in scripts, the same in a comment of YAML (replacing `${NAME}` below it), and
`#SBATCH --name=default  # help` for SLURM (with two # for an option without default). Nothing else is changed.
"""

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jaxcoder
from jaxcoder.errors import ConfigError

_ASSIGNMENT = re.compile(r"(?P<before>(?:# )?)(?P<name>[A-Z_]+)=(?P<default>'[^']*'|\S*)(?P<blanks> +)# (?P<help>.*)")
_DIRECTIVE = re.compile(r"(?P<before>##?SBATCH --)(?P<name>[a-z-]+)=(?P<default>\S*)(?P<blanks> +)# (?P<help>.*)")
_ARGUMENTS = "--arguments"
_REQUIRED = "required: "


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A file of `launch/`, and the command that submits it when the file's path is appended."""

    file: str
    client: tuple[str, ...]
    summary: str


KINDS = {
    "local": Kind(file="local.sh", client=("bash",), summary="several CPU processes on this machine, for testing"),
    "gpu-node": Kind(file="gpu_node.sh", client=("bash",), summary="one GPU node without a scheduler"),
    "slurm": Kind(file="slurm.sbatch", client=("sbatch",), summary="GPU nodes of a SLURM cluster"),
    "tpu-vm": Kind(file="tpu_vm.sh", client=("bash",), summary="Google Cloud TPU VMs (queued resource)"),
    "gke": Kind(file="gke_jobset.yaml", client=("kubectl", "apply", "-f"), summary="TPU slices on GKE (JobSet)"),
    "skypilot": Kind(file="skypilot.yaml", client=("sky", "launch"), summary="GPUs on any cloud (SkyPilot)"),
}


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A variable of a launch file: its command-line option ("--gpus-per-node") and its line number."""

    option: str
    default: str
    help: str
    line: int

    @property
    def is_required(self) -> bool:
        return self.help.startswith(_REQUIRED) and not self.default


def read(kind: str) -> str:
    """The text of a launch file, from the installed package or the checkout."""
    name = KINDS[kind].file
    checkout = Path(jaxcoder.__file__).parents[1] / "launch" / name
    return checkout.read_text() if checkout.is_file() else resources.files("jaxcoder_launch").joinpath(name).read_text()


def variables(text: str) -> list[Variable]:
    """The variables of a launch file, without the arguments of `jaxcoder train`."""
    return [
        Variable(option=_option(match), default=match["default"].strip("'"), help=match["help"], line=number)
        for number, match in _matches(text)
        if _option(match) != _ARGUMENTS
    ]


def fill(kind: str, values: Mapping[str, str], arguments: Sequence[str]) -> str:
    """The launch file with `values` (keyed by option, such as "--nodes") and the arguments of `jaxcoder train`.

    Raises ConfigError for missing required variables and for values that the file cannot represent.
    """
    text = read(kind)
    known = {variable.option: variable for variable in variables(text)}
    for option, value in values.items():
        if "\n" in value or not value:
            raise ConfigError(f"{option} is {value!r}: give one line of text.")
        if is_yaml(kind) and not re.fullmatch(r"[\w.,:/@\[\]+=-]+", value):
            raise ConfigError(f"{option} is {value!r}: YAML needs a value of letters, digits and _.,:/@[]+=-")
    missing = [v for v in known.values() if v.is_required and v.option not in values]
    if missing:
        options = ", ".join(f"{v.option} ({v.help.removeprefix(_REQUIRED)})" for v in missing)
        raise ConfigError(f"`jaxcoder launch {kind}` needs {options}.")
    lines = text.split("\n")
    joined = shlex.join(arguments)
    for number, match in _matches(text):
        option = _option(match)
        if option == _ARGUMENTS:
            lines[number] = _line(match, joined if is_yaml(kind) else f"({joined})")
        elif option in values:
            is_literal = is_yaml(kind) or match.re is _DIRECTIVE
            lines[number] = _line(match, values[option] if is_literal else shlex.quote(values[option]))
    text = "\n".join(lines)
    if is_yaml(kind):
        for variable in known.values():
            name = variable.option.removeprefix("--").replace("-", "_").upper()
            text = text.replace(f"${{{name}}}", values.get(variable.option, variable.default))
        text = text.replace("${ARGUMENTS}", joined)
    return text


def client_of(kind: str) -> tuple[str, ...]:
    """The command that submits the file. ConfigError if it is not installed."""
    client = KINDS[kind].client
    if shutil.which(client[0]) is None:
        raise ConfigError(
            f"`jaxcoder launch {kind}` needs `{client[0]}`, which is not installed: install it, or print the file with "
            "--dry-run and submit it from another machine."
        )
    return client


def is_yaml(kind: str) -> bool:
    return KINDS[kind].file.endswith(".yaml")


def _matches(text: str) -> Iterator[tuple[int, re.Match[str]]]:
    """(line number, match) of every variable."""
    inside = False
    for number, line in enumerate(text.split("\n")):
        if line.startswith("# --- "):
            inside = line.startswith("# --- variables")
        elif inside and (match := _DIRECTIVE.fullmatch(line) or _ASSIGNMENT.fullmatch(line)):
            yield number, match


def _option(match: re.Match[str]) -> str:
    return "--" + match["name"].lower().replace("_", "-")


def _line(match: re.Match[str], value: str) -> str:
    """The variable's line with another value; its help stays in the same column where the value leaves room."""
    before = match["before"].replace("##SBATCH", "#SBATCH")
    width = len(match["default"] + match["blanks"]) + len(match["before"]) - len(before) - 1
    return f"{before}{match['name']}={value:<{width}} # {match['help']}"
