"""What the devices can do at most, and how full they are.

Peaks are dense bf16 FLOP/s of one JAX device, from the makers' data sheets (Google Cloud TPU documentation, NVIDIA
product briefs). A TPU7x chip is two devices.
"""

from dataclasses import dataclass

import jax


@dataclass(frozen=True, kw_only=True)
class Chip:
    """name: as people say it. peak_flops: dense bf16 FLOP/s of one JAX device."""

    name: str
    peak_flops: float


_CHIPS = (  # (part of the device kind, chip); the first that fits counts
    ("tpu v6 lite", Chip(name="TPU v6e", peak_flops=918e12)),
    ("tpu v6e", Chip(name="TPU v6e", peak_flops=918e12)),
    ("tpu7x", Chip(name="TPU7x", peak_flops=1153.5e12)),
    ("tpu v5 lite", Chip(name="TPU v5e", peak_flops=197e12)),
    ("tpu v5e", Chip(name="TPU v5e", peak_flops=197e12)),
    ("tpu v5", Chip(name="TPU v5p", peak_flops=459e12)),
    ("tpu v4 lite", Chip(name="TPU v4i", peak_flops=138e12)),
    ("tpu v4", Chip(name="TPU v4", peak_flops=275e12)),
    ("tpu v3", Chip(name="TPU v3 core", peak_flops=61.5e12)),
    ("gb200", Chip(name="GB200", peak_flops=2500e12)),
    ("b200", Chip(name="B200", peak_flops=2250e12)),
    ("h200", Chip(name="H200", peak_flops=989e12)),
    ("h100 pcie", Chip(name="H100 PCIe", peak_flops=756e12)),
    ("h100 nvl", Chip(name="H100 NVL", peak_flops=835e12)),
    ("h100", Chip(name="H100", peak_flops=989e12)),
    ("a100", Chip(name="A100", peak_flops=312e12)),
    ("v100", Chip(name="V100 (fp16)", peak_flops=125e12)),
    ("l40s", Chip(name="L40S", peak_flops=362e12)),
    ("l4", Chip(name="L4", peak_flops=121e12)),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip behind `jax.Device.device_kind`; None where the peak is not known (CPUs, other cards)."""
    kind = device_kind.lower()
    return next((chip for part, chip in _CHIPS if part in kind), None)


def device_memory() -> dict[str, int]:
    """Bytes in use and their maximum so far, on the fullest device of this process; empty where JAX does not say."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if not stats:
        return {}
    return {
        "device_memory": max(found["bytes_in_use"] for found in stats),
        "device_memory_peak": max(found.get("peak_bytes_in_use", found["bytes_in_use"]) for found in stats),
    }
