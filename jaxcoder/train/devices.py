"""Chips: peak FLOP/s, memory and bandwidths; and the memory in use.

All figures are per JAX device. A TPU7x chip is two devices, a v4 or v5p chip one (megacore). Source, unless a field
names another: the manufacturers' data sheets (Google Cloud TPU documentation, pages "TPU v4" to "TPU7x"; NVIDIA product
briefs).
"""

from dataclasses import dataclass

import jax

GB = 10**9
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator. `jaxcoder plan` needs all fields; training does not."""

    name: str
    peak_flops: float
    """Dense bf16 FLOP/s."""
    memory: int | None = None
    """Bytes that a program may use. TPUs: the limit that libtpu 0.0.52 reports for a program that does not fit."""
    memory_bandwidth: float | None = None
    """Bytes/s between the chip and its memory."""
    links: int = 0
    """TPUs: number of ICI links. GPUs: 1, to the node's NVSwitch."""
    link_bandwidth: float | None = None
    """Bytes/s of one link in one direction."""
    network_bandwidth: float | None = None
    """Bytes/s in one direction: one device's share of the network between slices or nodes."""
    host_bandwidth: float | None = None
    """Bytes/s between a device and its host's memory. TPUs: "How to Scale Your Model"; TPU7x as v6e."""
    devices_per_chip: int = 1
    clock: float | None = None
    """TPUs: cycles/s of a core = peak FLOP/s / FLOP per cycle (131,072 a core; 524,288 on v6e and 7x)."""
    cores: int = 1
    """Cores that run one device's program."""


_V4 = Chip(
    name="TPU v4", peak_flops=275e12, memory=int(30.75 * GIB), memory_bandwidth=1228 * GB, links=6,
    link_bandwidth=50 * GB, network_bandwidth=6.25 * GB, host_bandwidth=16 * GB, clock=275e12 / 2 / 131072, cores=2,
)  # fmt: skip
_V5E = Chip(
    name="TPU v5e", peak_flops=197e12, memory=int(15.75 * GIB), memory_bandwidth=819 * GB, links=4,
    link_bandwidth=50 * GB, network_bandwidth=3.125 * GB, host_bandwidth=16 * GB, clock=197e12 / 131072,
)  # fmt: skip
_V5P = Chip(
    name="TPU v5p", peak_flops=459e12, memory=int(95.73 * GIB), memory_bandwidth=2765 * GB, links=6,
    link_bandwidth=100 * GB, network_bandwidth=6.25 * GB, host_bandwidth=16 * GB, clock=459e12 / 2 / 131072, cores=2,
)  # fmt: skip
_V6E = Chip(
    name="TPU v6e", peak_flops=918e12, memory=int(31.24 * GIB), memory_bandwidth=1638 * GB, links=4,
    link_bandwidth=100 * GB, network_bandwidth=12.5 * GB, host_bandwidth=32 * GB, clock=918e12 / 524288,
)  # fmt: skip
_V7X = Chip(
    name="TPU7x", peak_flops=1153.5e12, memory=int(94.74 * GIB), memory_bandwidth=3690 * GB, links=6,
    link_bandwidth=50 * GB, network_bandwidth=6.25 * GB, host_bandwidth=16 * GB, devices_per_chip=2,
    clock=1153.5e12 / 524288,
)  # fmt: skip
"""Each of the chip's two devices has half of its links and network."""


def _gpu(name: str, tflops: float, memory: float, bandwidth: float, nvlink: float, network: float) -> Chip:
    """memory: GB. bandwidth: TB/s. nvlink, network: GB/s in one direction, per GPU of a DGX node.

    95 % of the memory is usable (JAX preallocates 75 % by default).
    """
    return Chip(
        name=name, peak_flops=tflops * 1e12, memory=int(0.95 * memory * GB), memory_bandwidth=bandwidth * 1e12, links=1,
        link_bandwidth=nvlink * GB, network_bandwidth=network * GB,
    )  # fmt: skip


_CHIPS = (  # (substring of the device kind, chip); the first match counts
    ("tpu v6 lite", _V6E),
    ("tpu v6e", _V6E),
    ("tpu7x", _V7X),
    ("tpu v5 lite", _V5E),
    ("tpu v5e", _V5E),
    ("tpu v5", _V5P),
    ("tpu v4 lite", Chip(name="TPU v4i", peak_flops=138e12)),
    ("tpu v4", _V4),
    ("tpu v3", Chip(name="TPU v3 core", peak_flops=61.5e12, devices_per_chip=2)),
    ("gb200", _gpu("GB200", 2500, 186, 8.0, 900, 50)),
    ("b200", _gpu("B200", 2250, 180, 7.7, 900, 50)),
    ("h200", _gpu("H200", 989, 141, 4.8, 450, 50)),
    ("h100 pcie", Chip(name="H100 PCIe", peak_flops=756e12)),
    ("h100 nvl", Chip(name="H100 NVL", peak_flops=835e12)),
    ("h100", _gpu("H100", 989, 80, 3.35, 450, 50)),
    ("a100", _gpu("A100", 312, 80, 2.04, 300, 25)),
    ("v100", Chip(name="V100 (fp16)", peak_flops=125e12)),
    ("l40s", Chip(name="L40S", peak_flops=362e12)),
    ("l4", Chip(name="L4", peak_flops=121e12)),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None if its peak is unknown (CPUs, other GPUs)."""
    kind = device_kind.lower()
    return next((chip for part, chip in _CHIPS if part in kind), None)


def device_memory() -> dict[str, int]:
    """Bytes in use now and at the peak, on the fullest device of this process; empty if JAX does not report them."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if not stats:
        return {}
    return {
        "device_memory": max(found["bytes_in_use"] for found in stats),
        "device_memory_peak": max(found.get("peak_bytes_in_use", found["bytes_in_use"]) for found in stats),
    }
