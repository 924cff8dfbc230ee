"""Meshes: the devices of a run laid out along MESH_AXES, all axes in explicit-sharding mode."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcoder.config import MeshConfig
from jaxcoder.config.validate import counted
from jaxcoder.errors import ConfigError
from jaxcoder.sharding.rules import MESH_AXES


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config`, whose axis sizes must be filled in, over `devices` (default: all that JAX sees)."""
    devices = jax.devices() if devices is None else devices
    shape = (config.data, config.fsdp, config.tensor)
    size = config.data * config.fsdp * config.tensor
    if min(shape) < 1 or size > len(devices):
        described = ", ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, shape))
        raise ConfigError(
            f"a mesh of {described} needs {counted(size, 'device')} and {len(devices)} can be had: change `mesh`."
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(shape), devices=devices[:size])


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """One device (default: the first) under the same axis names, so that one code path serves a laptop and a pod."""
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), [device or jax.devices()[0]])


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
