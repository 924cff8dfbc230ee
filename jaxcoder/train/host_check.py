"""Checks before the first step: configuration, software, data, clocks, disk and devices of all hosts.

Every process sends its facts to process 0, which compares them with its own: a few strings through JAX's coordination
service, and one sum over all devices.
"""

import hashlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxcoder
from jaxcoder.config import RunConfig, fields
from jaxcoder.data.stream import SampleStream, WindowStream
from jaxcoder.errors import ConfigError, DataError, JaxcoderError
from jaxcoder.formatting import format_bytes
from jaxcoder.runtime import ProcessGroup
from jaxcoder.train.inputs import HeldOutStream

logger = logging.getLogger(__name__)

_MOST_FIELDS = 3
_CLOCK_SECONDS = 5.0  # with a larger difference the logs of two hosts cannot be compared
_DISK_MARGIN = 1.1  # size of a checkpoint over the size of its arrays


def check_configuration(config: RunConfig, group: ProcessGroup, decide: Callable[[], object]) -> None:
    """Raises ConfigError in every process if the configuration, source, version or device kind of one differs from
    process 0's; then the error that `decide`, called in process 0, raises about the common configuration."""
    mine = {
        "configuration": {name: repr(value) for name, value in fields.leaves(config)},
        "software": {
            "jaxcoder": jaxcoder.__version__,
            "the source of jaxcoder": source_hash(),
            "jax": jax.__version__,
            "jaxlib": jax.lib.__version__,
            "Python": ".".join(map(str, sys.version_info[:2])),
        },
        "devices": {"devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"},
    }

    def compare(everyone: list[dict[str, dict[str, str]]]) -> None:
        for index, facts in enumerate(everyone[1:], start=1):
            for what, advice in _ADVICE.items():
                if different := _differences(everyone[0][what], facts[what]):
                    listed = "; ".join(
                        f"{group.name(index)} has {name} {other} and {group.name(0)} {first}"
                        for name, first, other in different[:_MOST_FIELDS]
                    )
                    more = f"; and {len(different) - _MOST_FIELDS} more" if len(different) > _MOST_FIELDS else ""
                    raise ConfigError(f"the hosts do not agree: {listed}{more}. {advice}")
        decide()

    group.agree("configuration", mine, compare)


_ADVICE = {
    "software": "Install the same on all hosts.",
    "configuration": "Start all processes with the same command and the same configuration file.",
    "devices": "Give the run hosts of one kind, and see that all devices of each are there.",
}


def check_data(stream: WindowStream, held_out: Sequence[HeldOutStream], group: ProcessGroup) -> list[str]:
    """Fingerprints of the token stores. Raises DataError in every process if one reads another version of a token store
    than process 0."""
    stores = stream.stores if isinstance(stream, SampleStream) else []
    stores = [*stores, *(store for other in held_out for store in other.stream.stores)]
    mine = {str(store.path): _hash(repr(sorted(store.manifest.items()))) for store in stores}

    def compare(everyone: list[dict[str, str]]) -> None:
        for index, facts in enumerate(everyone[1:], start=1):
            for path, first, other in _differences(everyone[0], facts):
                raise DataError(
                    f"the hosts do not agree: {group.name(index)} has another version of the token store {path} than "
                    f"{group.name(0)} (their manifests are {other} and {first}): give all hosts the same copy."
                )

    group.agree("data", mine, compare)
    return [mine[str(store.path)] for store in stores]


def check_clocks(group: ProcessGroup) -> None:
    """Logs a warning for clocks that differ from process 0's."""
    group.agree("now", None, lambda _: None)  # a barrier, so that all read their clocks at the same time

    def compare(times: list[float]) -> list[str]:
        late = [(index, seconds - times[0]) for index, seconds in enumerate(times)]
        return [
            f"the clock of {group.name(index)} is {abs(apart):.0f} seconds "
            f"{'ahead of' if apart > 0 else 'behind'} that of {group.name(0)}: set both by NTP, or logs mislead."
            for index, apart in late
            if abs(apart) > _CLOCK_SECONDS
        ]

    for line in group.agree("clocks", time.time(), compare):
        logger.warning(line)


def check_disk(directory: str, state_bytes: int) -> None:
    """Raises JaxcoderError if a local directory has no space for one checkpoint. Call it in process 0."""
    if "://" in directory:
        return
    path = Path(directory).absolute()
    while not path.exists():
        path = path.parent
    free, needed = shutil.disk_usage(path).free, int(_DISK_MARGIN * state_bytes)
    if free < needed:
        raise JaxcoderError(
            f"the disk of the output directory `{directory}` has {format_bytes(free)} free and one checkpoint needs "
            f"{format_bytes(needed)}: free some space, or give another --output-dir."
        )


def check_devices(mesh: Mesh) -> None:
    """Raises JaxcoderError unless a sum of ones over all devices of the mesh is their number."""
    axes = tuple(mesh.shape)
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    ones = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.ones(mesh.size, np.float32)[index])
    replicated = NamedSharding(mesh, PartitionSpec())
    found = float(jax.jit(lambda x: jnp.sum(jax.sharding.reshard(x, PartitionSpec())), out_shardings=replicated)(ones))
    if found != mesh.size:
        raise JaxcoderError(
            f"a sum of ones over the {mesh.size} devices of the mesh gives {found:g}: a device or a link is faulty; "
            "find it with the vendor's diagnostics and exclude its host."
        )


def source_hash() -> str:
    """Hash of every Python file of this package, which distinguishes two installations of one version."""
    root = Path(jaxcoder.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _differences(first: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, first, other) of every difference; "nothing" for a missing name."""
    names = [*first, *(name for name in other if name not in first)]
    pairs = ((name, first.get(name, "nothing"), other.get(name, "nothing")) for name in names)
    return [(name, first, other) for name, first, other in pairs if first != other]
