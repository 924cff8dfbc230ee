"""Which device stands where: slices along `data`, TPUs along their wires, processes in contiguous rows of the batch."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from jaxcoder.config import MeshConfig
from jaxcoder.errors import ConfigError
from jaxcoder.sharding.mesh import arrange, make_mesh


@dataclass(frozen=True)
class Device:
    """What a mesh asks a `jax.Device` for."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H200"
    slice_index: int | None = None
    coords: tuple[int, int, int] | None = None
    core_on_chip: int = 0


def gpus(nodes: int, each: int = 8) -> list[Device]:
    return [Device(id=n, process_index=n // each) for n in range(nodes * each)]


def tpus(sides: tuple[int, int, int], slices: int = 1) -> list[Device]:
    """Slices of v5p chips; a process has 2 x 2 x 1 of them."""
    devices = []
    hosts = sides[0] * sides[1] // 4
    for index in range(slices):
        for z, y, x in np.ndindex(sides[::-1]):
            process = index * hosts * sides[2] + z * hosts + y // 2 * (sides[0] // 2) + x // 2
            devices.append(
                Device(len(devices), process, "tpu", "TPU v5", index if slices > 1 else None, (int(x), int(y), int(z)))
            )
    return devices


def rows_of_processes(mesh: np.ndarray) -> dict[int, list[int]]:
    """The rows of the batch that each process holds."""
    rows = mesh.reshape(-1, mesh.shape[-1])
    processes = {device.process_index for device in mesh.flat}
    return {p: [n for n, row in enumerate(rows) if p in {d.process_index for d in row}] for p in processes}


def assert_contiguous_equal_parts(mesh: np.ndarray) -> None:
    for rows in rows_of_processes(mesh).values():
        assert rows == list(range(rows[0], rows[0] + len(rows))) and rows[0] % len(rows) == 0
    assert len({len(rows) for rows in rows_of_processes(mesh).values()}) == 1


def spread(devices, coordinate: int) -> int:
    return len({device.coords[coordinate] for device in devices})


@pytest.mark.parametrize(
    "shape", [(1, 64, 1), (1, 16, 4), (4, 16, 1), (2, 32, 1), (1, 32, 2), (1, 8, 8), (16, 4, 1)], ids=str
)
def test_tpus_lie_along_their_wires_and_processes_in_contiguous_rows(shape):
    devices = tpus((4, 4, 4))
    mesh = arrange(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]), devices)
    assert mesh.shape == shape and {d.id for d in mesh.flat} == set(range(64))
    assert_contiguous_equal_parts(mesh)
    for group in mesh.reshape(-1, shape[2]):  # tensor: a box of the torus
        sides = [spread(group, coordinate) for coordinate in range(3)]
        assert np.prod(sides) == shape[2], sides


def test_data_alone_crosses_slices():
    mesh = arrange(MeshConfig(data=4, fsdp=8, tensor=4), tpus((4, 4, 2), slices=4))
    for index, replica in enumerate(mesh):
        assert {device.slice_index for device in replica.flat} == {index}
    assert_contiguous_equal_parts(mesh)
    two_in_a_slice = arrange(MeshConfig(data=4, fsdp=4, tensor=4), tpus((4, 4, 2), slices=2))
    assert [{d.slice_index for d in replica.flat} for replica in two_in_a_slice] == [{0}, {0}, {1}, {1}]
    assert_contiguous_equal_parts(two_in_a_slice)


def test_a_cluster_of_gpus():
    """`tensor` in a node, then `fsdp`; with num_slices, `data` runs across nodes even if the devices come unsorted."""
    mesh = arrange(MeshConfig(data=1, fsdp=8, tensor=4), gpus(4))
    assert all(len({device.process_index for device in group}) == 1 for group in mesh.reshape(-1, 4))
    assert_contiguous_equal_parts(mesh)
    assert arrange(MeshConfig(data=4, fsdp=2, tensor=1, num_slices=4), gpus(1)).shape == (4, 2, 1)
    mixed = gpus(2)[::2] + gpus(2)[1::2]
    mesh = arrange(MeshConfig(data=2, fsdp=8, tensor=1, num_slices=2), mixed)
    assert [{device.process_index for device in replica.flat} for replica in mesh] == [{0}, {1}]


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        (MeshConfig(data=1, fsdp=16, tensor=4), tpus((4, 4, 2), 2), "mesh.data 1 is not a multiple of 2 slices"),
        (MeshConfig(data=3, fsdp=8, tensor=2), tpus((4, 4, 2), 2), "uses 32, 16 devices of the slices"),
        (MeshConfig(data=4, fsdp=16, num_slices=4), tpus((4, 4, 2), 2), "num_slices is 4, but the devices are in 2"),
        (MeshConfig(data=2, fsdp=16, num_slices=2), tpus((4, 4, 2)), "num_slices is 2, but the devices are in 1"),
        (MeshConfig(data=4, fsdp=4, num_slices=4), gpus(2), "num_slices 4 does not divide the 16 devices"),
        (MeshConfig(data=3, fsdp=8, num_slices=2), gpus(3), "num_slices 2 does not divide the 24 devices"),
    ],
)
def test_impossible_meshes_are_refused(mesh, devices, expected):
    with pytest.raises(ConfigError, match=expected):
        arrange(mesh, devices[: mesh.data * mesh.fsdp * mesh.tensor])


def test_too_few_devices():
    with pytest.raises(ConfigError, match=r"data 1 x fsdp 16 x tensor 1 needs 16 devices but there are 8"):
        make_mesh(MeshConfig(data=1, fsdp=16, tensor=1), jax.devices()[:8])


DESCRIBED = """
import json, sys
from jax.experimental import topologies
from jaxcoder.config import MeshConfig
from jaxcoder.sharding.mesh import make_mesh
name, slices, *shape = json.loads(sys.argv[1])
extra = {"num_slices": slices} if slices > 1 else {}
devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices
mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]), devices).devices
print(json.dumps([[device.id, device.process_index, getattr(device, "slice_index", 0)] for device in mesh.flat]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra `plan`")
@pytest.mark.parametrize(
    "case",
    [("v5p:4x4x4", 1, 1, 16, 4), ("v5e:8x8", 1, 1, 32, 2), ("v5p:2x2x2", 2, 2, 4, 2), ("v4:2x2x2", 1, 1, 8, 2)],
    ids=str,
)
def test_described_tpus(case):
    """As libtpu describes pods: the same contiguous rows, one slice for each replica; v4 shows two devices a chip."""
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBED, json.dumps(case)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    devices = [Device(*found[:2], slice_index=found[2]) for found in json.loads(done.stdout.splitlines()[-1])]
    mesh = np.array(devices).reshape(case[2:])
    assert len(set(mesh.flat)) == mesh.size
    if case[0] != "v4:2x2x2":
        assert_contiguous_equal_parts(mesh)
    assert all(len({device.slice_index for device in replica.flat}) == 1 for replica in mesh)
