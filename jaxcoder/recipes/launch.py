"""The files of `launch/`, filled in: what `jaxcoder launch` prints or hands to the user's own client.

A file has its variables between the lines "--- fill in" and "--- that is all", one a line, with what it is behind it:
`NAME=default  # what` in scripts, the same in a comment of YAML (where `${NAME}` stands for it below), and
`#SBATCH --name=default  # what` for SLURM (with two # where nothing is the default). Nothing else in them is changed.
"""

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jaxcoder
from jaxcoder.errors import ConfigError

_ASSIGNED = re.compile(r"(?P<before>(?:# )?)(?P<name>[A-Z_]+)=(?P<default>'[^']*'|\S*)(?P<blanks> +)# (?P<what>.*)")
_DIRECTIVE = re.compile(r"(?P<before>##?SBATCH --)(?P<name>[a-z-]+)=(?P<default>\S*)(?P<blanks> +)# (?P<what>.*)")
_LIST = "ARGUMENTS"
_REQUIRED = "required: "


@dataclass(frozen=True, kw_only=True)
class Kind:
    """file: in `launch/`. client: the program that takes it, before the file's path."""

    file: str
    client: tuple[str, ...]
    summary: str


KINDS = {
    "local": Kind(file="local.sh", client=("bash",), summary="several CPU processes on this machine, to try"),
    "gpu-node": Kind(file="gpu_node.sh", client=("bash",), summary="one node of GPUs, without a scheduler"),
    "slurm": Kind(file="slurm.sbatch", client=("sbatch",), summary="GPU nodes of a SLURM cluster"),
    "tpu-vm": Kind(file="tpu_vm.sh", client=("bash",), summary="TPU VMs of Google Cloud, by a queued resource"),
    "gke": Kind(file="gke_jobset.yaml", client=("kubectl", "apply", "-f"), summary="TPU slices of GKE, by a JobSet"),
    "skypilot": Kind(file="skypilot.yaml", client=("sky", "launch"), summary="GPUs of any cloud, by SkyPilot"),
}


@dataclass(frozen=True, kw_only=True)
class Variable:
    """option: as on the command line ("--gpus-per-node"); line: its number in the file."""

    option: str
    default: str
    what: str
    line: int

    @property
    def is_required(self) -> bool:
        return self.what.startswith(_REQUIRED) and not self.default


def read(kind: str) -> str:
    """The text of a launch file, from the installed package or the checkout."""
    name = KINDS[kind].file
    beside = Path(jaxcoder.__file__).parents[1] / "launch" / name
    return beside.read_text() if beside.is_file() else resources.files("jaxcoder_launch").joinpath(name).read_text()


def variables(text: str) -> list[Variable]:
    """What there is to fill in, the options of `jaxcoder train` left out."""
    found = [_variable(number, match) for number, match in _matches(text)]
    return [variable for variable in found if variable.option != _option(_LIST)]


def fill(kind: str, values: Mapping[str, str], arguments: Sequence[str]) -> str:
    """The file with `values` (by option, as "--nodes") and the options of `jaxcoder train` put in.

    Raises ConfigError for a variable that is required and has no value, and for values that the file cannot hold.
    """
    text = read(kind)
    known = {variable.option: variable for variable in variables(text)}
    for option, value in values.items():
        if "\n" in value or not value:
            raise ConfigError(f"{option} is {value!r}: give one line of text.")
        if is_yaml(kind) and not re.fullmatch(r"[\w.,:/@\[\]+=-]+", value):
            raise ConfigError(f"{option} is {value!r}, which a YAML file would read as something else: give another.")
    missing = [v for v in known.values() if v.is_required and v.option not in values]
    if missing:
        said = ", ".join(f"{v.option} ({v.what.removeprefix(_REQUIRED)})" for v in missing)
        raise ConfigError(f"`jaxcoder launch {kind}` needs {said}.")
    lines = text.split("\n")
    words = shlex.join(arguments)
    for number, match in _matches(text):
        option = _option(match["name"])
        if option == _option(_LIST):
            lines[number] = _line(match, words if is_yaml(kind) else f"({words})")
        elif option in values:
            quoted = is_yaml(kind) or match.re is _DIRECTIVE
            lines[number] = _line(match, values[option] if quoted else shlex.quote(values[option]))
    text = "\n".join(lines)
    if is_yaml(kind):
        for variable in known.values():
            name = variable.option.removeprefix("--").replace("-", "_").upper()
            text = text.replace(f"${{{name}}}", values.get(variable.option, variable.default))
        text = text.replace(f"${{{_LIST}}}", words)
    return text


def client_of(kind: str) -> tuple[str, ...]:
    """The command that takes the file. ConfigError where it is not installed."""
    client = KINDS[kind].client
    if shutil.which(client[0]) is None:
        raise ConfigError(
            f"`jaxcoder launch {kind}` hands its file to `{client[0]}`, which is not on this machine: install it, or "
            "print the file with --dry-run and take it where it is."
        )
    return client


def is_yaml(kind: str) -> bool:
    return KINDS[kind].file.endswith(".yaml")


def _matches(text: str):
    """(number of the line, match) of every variable."""
    inside = False
    for number, line in enumerate(text.split("\n")):
        if line.startswith("# --- "):
            inside = line.startswith("# --- fill in")
        elif inside and (match := _DIRECTIVE.fullmatch(line) or _ASSIGNED.fullmatch(line)):
            yield number, match


def _variable(number: int, match: re.Match) -> Variable:
    default = match["default"].strip("'")
    return Variable(option=_option(match["name"]), default=default, what=match["what"], line=number)


def _option(name: str) -> str:
    return "--" + name.lower().replace("_", "-")


def _line(match: re.Match, value: str) -> str:
    before = match["before"].replace("##SBATCH", "#SBATCH")
    width = len(match["default"] + match["blanks"]) + len(match["before"]) - len(before) - 1
    return f"{before}{match['name']}={value:<{width}} # {match['what']}"
