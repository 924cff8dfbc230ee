"""Meshes: the devices of a run laid out along MESH_AXES, all axes in explicit-sharding mode.

The layout decides which traffic meets which network. `data`, whose devices exchange one sum of gradients a pass, runs
across slices (groups of devices with a fast network inside and a slow one between); `fsdp` and `tensor`, which work in
every layer, stay in a slice. In a slice of TPUs the axes follow the wires; elsewhere neighbours in the order of
processes are neighbours in the mesh, `tensor` first. Rows of the batch follow the processes that read them.
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
    """The mesh of `config`, whose axis sizes must be filled in, over `devices` (default: all that JAX sees).

    Raises ConfigError where there are too few devices, or `data` cannot run across the slices.
    """
    devices = jax.devices() if devices is None else devices
    size = config.num_devices
    if min(config.sizes.values()) < 1 or size > len(devices):
        raise ConfigError(
            f"the mesh {config} needs {plural(size, 'device')} but there are {len(devices)}: change `mesh`."
        )
    return Mesh(arrange(config, devices[:size]), MESH_AXES, axis_types=EXPLICIT)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The same mesh of devices that need not exist: for shapes and shardings by `jax.eval_shape`."""
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
    """Devices by slice: as TPUs say themselves, else in `num_slices` equal parts of whole processes (None: one).

    Raises ConfigError where that contradicts the devices.
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
            raise ConfigError(f"the mesh takes {sizes} devices of the slices: let it take as many of each.")
        return slices
    num_slices = num_slices or 1
    in_order = sorted(devices, key=lambda device: device.process_index)
    size, rest = divmod(len(devices), num_slices)
    slices = [in_order[start : start + size] for start in range(0, size * num_slices, max(size, 1))]
    in_slices = [{device.process_index for device in slice_} for slice_ in slices]
    processes = set().union(*in_slices)
    is_cut = len(processes) > 1 and sum(map(len, in_slices)) > len(processes)  # one may be cut: virtual devices
    if rest or is_cut:
        raise ConfigError(
            f"mesh.num_slices {num_slices} does not divide the {len(devices)} devices of {len(processes)} processes "
            "without cutting a process in two: use a divisor of the number of processes."
        )
    return slices


def _arrange_slice(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.array(devices).reshape(shape)
    mesh = _rows_by_process(_along_the_wires(shape, devices))
    if not _reads_contiguously(mesh):  # a process has parts of several replicas: replicas of whole processes instead
        merged = (1, prod(shape[:BATCH_AXES])) + shape[BATCH_AXES:]
        rows = _rows_by_process(_along_the_wires(merged, devices))
        mesh = rows.reshape(shape)
    return mesh


def _along_the_wires(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """TPUs so that every axis of the mesh is an axis of the torus, or several; if that cannot be, parts of one."""
    for may_split in (False, True):
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=may_split)
        except (NotImplementedError, AssertionError, ValueError):  # ... of chips that show two devices each
            continue
    return np.array(devices).reshape(shape)


def _rows_by_process(mesh: np.ndarray) -> np.ndarray:
    """The mesh with the rows of its batch axes sorted by the processes that hold them, so that a process reads one
    contiguous part of the batch. The groups of devices stay the same, and with them the collectives."""
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh)
    for axis in range(BATCH_AXES):
        rows = np.moveaxis(processes, axis, 0).reshape(mesh.shape[axis], -1)
        order = sorted(range(len(rows)), key=lambda row: sorted(rows[row].tolist()))
        mesh, processes = np.take(mesh, order, axis), np.take(processes, order, axis)
    return mesh


def _reads_contiguously(mesh: np.ndarray) -> bool:
    """Whether the rows of the batch that a process holds are neighbours."""
    rows: dict[int, list[int]] = {}
    for (row, _), device in np.ndenumerate(mesh.reshape(prod(mesh.shape[:BATCH_AXES]), -1)):
        rows.setdefault(device.process_index, []).append(row)
    return all(max(held) - min(held) < len(set(held)) for held in rows.values())


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """One device (default: the first) under the same axis names, so that one code path serves a laptop and a pod."""
    return make_mesh(MeshConfig(**dict.fromkeys(MESH_AXES, 1)), [device or jax.devices()[0]])


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
