"""Meshes: the devices of a run arranged along MESH_AXES, all axes in explicit-sharding mode.

The arrangement decides which collectives use which network. The first axis, `data`, all-reduces gradients once per step
and may cross slices (groups of devices with a fast network inside and a slow one between them); the other axes
communicate in every layer and stay within a slice. Within a TPU slice the axes follow the torus; on other devices the
last axis changes fastest in the order of processes. Each process gets contiguous rows of the batch.
"""

from collections.abc import Sequence
from math import prod

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcoder.config.mesh import MESH_AXES, DimRules, MeshConfig, slice_problem
from jaxcoder.errors import ConfigError
from jaxcoder.formatting import plural

EXPLICIT = (AxisType.Explicit,) * len(MESH_AXES)

BATCH_AXES = len(DimRules().of("batch"))
"""The batch is sharded over the first axes of the mesh, in their order."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config`, whose axis sizes must be resolved, over `devices` (default: all of `jax.devices()`).

    Raises ConfigError if there are too few devices, or if the first axis cannot cross the slices.
    """
    devices = jax.devices() if devices is None else devices
    size = config.num_devices
    if min(config.sizes.values()) < 1 or size > len(devices):
        raise ConfigError(
            f"the mesh {config} needs {plural(size, 'device')} but there are {len(devices)}: change `mesh`."
        )
    return Mesh(arrange(config, devices[:size]), MESH_AXES, axis_types=EXPLICIT)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh without devices, for shapes and shardings by `jax.eval_shape`."""
    return AbstractMesh(tuple(config.sizes.values()), MESH_AXES, axis_types=EXPLICIT)


def arrange(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """All of `devices` in the shape of the mesh."""
    slices = split_into_slices(devices, config.num_slices)
    problem = slice_problem(config, len(slices))
    if problem is not None:
        raise ConfigError(problem)
    across, *within = config.sizes.values()  # the first axis crosses slices
    shape = (across // len(slices), *within)
    return np.concatenate([_arrange_slice(shape, devices) for devices in slices])


def split_into_slices(devices: Sequence[jax.Device], num_slices: int | None) -> list[list[jax.Device]]:
    """Devices by slice: by the `slice_index` of TPUs, else `num_slices` groups of as many processes (None: one).

    Raises ConfigError if `num_slices` contradicts the devices.
    """
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        index = getattr(device, "slice_index", None) if device.platform == "tpu" else None
        found.setdefault(index or 0, []).append(device)
    if len(found) > 1 or devices[0].platform == "tpu":
        slices = [found[index] for index in sorted(found)]
        if num_slices not in (None, len(slices)):
            raise ConfigError(f"mesh.num_slices is {num_slices}, but the devices are in {len(slices)}: leave it None.")
        if len({len(slice_) for slice_ in slices}) > 1:
            sizes = ", ".join(str(len(slice_)) for slice_ in slices)
            raise ConfigError(f"the mesh uses {sizes} devices of the slices: use the same number of each.")
        return slices
    num_slices = num_slices or 1
    in_order = sorted(devices, key=lambda device: device.process_index)
    size, rest = divmod(len(devices), num_slices)
    slices = [in_order[start : start + size] for start in range(0, size * num_slices, max(size, 1))]
    in_slices = [{device.process_index for device in slice_} for slice_ in slices]
    processes = set().union(*in_slices)
    # A single process may be divided: its devices are virtual slices.
    is_divided = len(processes) > 1 and sum(map(len, in_slices)) > len(processes)
    if rest or is_divided:
        raise ConfigError(
            f"mesh.num_slices {num_slices} does not divide the {len(devices)} devices of {len(processes)} processes "
            "without dividing a process: use a divisor of the number of processes."
        )
    return slices


def _arrange_slice(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.array(devices).reshape(shape)
    mesh = _rows_by_process(_along_the_torus(shape, devices))
    if not _reads_contiguously(mesh):
        # Merge the batch axes before the arrangement, so that a process does not have parts of several replicas.
        merged = (1, prod(shape[:BATCH_AXES])) + shape[BATCH_AXES:]
        mesh = _rows_by_process(_along_the_torus(merged, devices)).reshape(shape)
    return mesh


def _along_the_torus(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """TPUs arranged so that every mesh axis is one or several axes of the torus, or else a part of one."""
    for may_split in (False, True):
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=may_split)
        except (NotImplementedError, AssertionError, ValueError):  # also raised for chips with two devices
            continue
    return np.array(devices).reshape(shape)


def _rows_by_process(mesh: np.ndarray) -> np.ndarray:
    """The mesh with the rows of its batch axes sorted by process, so that each process reads a contiguous block of the
    batch. The groups of devices, and so the collectives, stay the same."""
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh)
    for axis in range(BATCH_AXES):
        rows = np.moveaxis(processes, axis, 0).reshape(mesh.shape[axis], -1)
        order = sorted(range(len(rows)), key=lambda row: sorted(rows[row].tolist()))
        mesh, processes = np.take(mesh, order, axis), np.take(processes, order, axis)
    return mesh


def _reads_contiguously(mesh: np.ndarray) -> bool:
    """Whether each process has contiguous rows of the batch."""
    rows: dict[int, list[int]] = {}
    for (row, _), device in np.ndenumerate(mesh.reshape(prod(mesh.shape[:BATCH_AXES]), -1)):
        rows.setdefault(device.process_index, []).append(row)
    return all(max(own) - min(own) < len(set(own)) for own in rows.values())


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """A mesh of one device (default: the first) with the axes of every other mesh."""
    return make_mesh(MeshConfig(**dict.fromkeys(MESH_AXES, 1)), [device or jax.devices()[0]])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array with a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
