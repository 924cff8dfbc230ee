"""Process index, process count and coordinator of a run, from flags, the environment, SLURM or a TPU pod.

One process serves all accelerators of a machine: fewer processes can fail, and data is loaded once per machine.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxcoder.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run."""

    coordinator: str
    """HOST:PORT of process 0."""
    count: int
    index: int
    """Of this process."""
    source: str
    """Where the values come from, for messages."""
    hosts: tuple[str, ...] | None = None
    """Host names by process, if known before they connect."""


class TpuPod:
    """Several hosts of a TPU pod, or several slices: the metadata server has the rest."""


_FLAGS = {"coordinator": "--coordinator", "count": "--num-processes", "index": "--process-id"}
_VARIABLES = {"coordinator": "JAXCODER_COORDINATOR", "count": "JAXCODER_NUM_PROCESSES", "index": "JAXCODER_PROCESS_ID"}


def find_processes(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Processes | TpuPod | None:
    """From the flags, else JAXCODER_COORDINATOR, _NUM_PROCESSES and _PROCESS_ID, else a SLURM step, else a TPU pod.

    None for a single process. ConfigError if one of the three is missing or invalid.
    """
    flags = {"coordinator": coordinator, "count": num_processes, "index": process_id}
    if any(value is not None for value in flags.values()):
        return _explicit(flags, _FLAGS, "the command line")
    variables = {part: environment.get(name) or None for part, name in _VARIABLES.items()}
    if any(value is not None for value in variables.values()):
        return _explicit(variables, _VARIABLES, "the environment")
    return _slurm(environment) or _tpu_pod(environment)


def _explicit(values: dict, names: dict[str, str], source: str) -> Processes | None:
    missing = [names[part] for part, value in values.items() if value is None]
    if missing:
        given = [names[part] for part, value in values.items() if value is not None]
        raise ConfigError(f"{' and '.join(given)} came without {' and '.join(missing)}: give all three, or none.")
    count, index = _number(names["count"], values["count"]), _number(names["index"], values["index"])
    if count < 1 or not 0 <= index < count:
        raise ConfigError(f"{names['index']} is {index} of {count} processes: processes count from 0 to {count - 1}.")
    host, _, port = str(values["coordinator"]).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"{names['coordinator']} is {values['coordinator']!r}: give the host of process 0 and a free port, "
            "HOST:PORT."
        )
    if count == 1:
        return None
    return Processes(coordinator=f"{host}:{port}", count=count, index=index, source=source)


def _number(name: str, value: int | str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}: give an integer.") from None


def _slurm(environment: Mapping[str, str]) -> Processes | None:
    """A task of an `srun` step. (A batch script has the job's variables, but not those of a step.)"""
    try:
        count, index = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_PROCID"])
        job, nodes = int(environment["SLURM_JOB_ID"]), environment["SLURM_STEP_NODELIST"]
    except (KeyError, ValueError):
        return None
    if count == 1:
        return None
    port = 61440 + job % 4096  # above the ephemeral range, different for every job on a node
    hosts = host_names(nodes)
    return Processes(
        coordinator=f"{hosts[0]}:{port}",
        count=count,
        index=index,
        source="SLURM",
        hosts=hosts if len(hosts) == count else None,  # else several tasks share a node
    )


def host_names(nodes: str) -> tuple[str, ...]:
    """The hosts of a SLURM node list: "gpu[003-004,12],login" is gpu003, gpu004, gpu12, login. ConfigError if empty."""
    names: list[str] = []
    for group in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        expanded = [""]
        for text, numbers in re.findall(r"([^\[]+)|\[([^\]]*)\]", group):
            ends = [text] if text else [number for part in numbers.split(",") for number in _numbers(part)]
            expanded = [start + end for start in expanded for end in ends]
        names += expanded
    if not names or not all(names):
        raise ConfigError(
            f"SLURM's node list {nodes!r} names no host: give --coordinator, --num-processes and --process-id."
        )
    return tuple(names)


def _numbers(part: str) -> list[str]:
    """ "003-005" is 003, 004, 005."""
    first, dash, last = part.partition("-")
    if not dash or not (first.isdigit() and last.isdigit()):
        return [part]
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _tpu_pod(environment: Mapping[str, str]) -> TpuPod | None:
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host.strip()]
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    is_pod = len(hosts) > 1 or (slices.isdigit() and int(slices) > 1) or environment.get("JAXCODER_TPU_POD") == "1"
    return TpuPod() if is_pod else None
