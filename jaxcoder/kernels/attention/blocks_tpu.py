"""Block shapes of flash_tpu by TPU generation, chosen by the compiler's static cycle estimates.

With a matrix unit 128 wide (v5e, v5p) query blocks have 128 queries, which wastes less at document borders, and 24
heads to fill the rows. With one 256 wide, narrower blocks cost more than they save.
"""

from dataclasses import replace

from jaxcoder.kernels.attention.schedule import Blocks

WIDE = Blocks(block_q=256, heads=16, block_kv=1024, edge_kv=256, vmem_mib=48)
BACKWARD = Blocks(block_q=256, heads=8, block_kv=512, edge_kv=256, vmem_mib=48)
TALL = Blocks(block_q=128, heads=24, chunk_heads=2, block_kv=1024, edge_kv=256, least_rows=1024, vmem_mib=48)
TALL_BACKWARD = replace(TALL, block_kv=512, edge_kv=128)
SMALL = Blocks(block_q=128, heads=8, block_kv=512, edge_kv=256, span_kv=4096, cores=2, vmem_mib=15)

TABLE: dict[str, tuple[Blocks, Blocks]] = {
    "TPU v4": (SMALL, replace(SMALL, span_kv=2048)),  # 16 MiB of VMEM
    "TPU v5 lite": (TALL, TALL_BACKWARD),
    "TPU v5": (replace(TALL, cores=2), replace(TALL_BACKWARD, cores=2)),
    # The matrix unit is 256 wide: with a head_dim of 128 it has free columns for row sums.
    "TPU v6 lite": (
        replace(WIDE, sums_by_matmul=True, vmem_mib=64),
        replace(BACKWARD, heads=16, vmem_mib=64),
    ),
    "TPU7x": (replace(WIDE, sums_by_matmul=True), BACKWARD),
}
"""Device kind -> blocks of the forward and of the backward kernel."""

ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}

MOST_HEAD_DIM = 256
"""With more, the kernels exceed the VMEM of a v5p."""


def has_kernels(device_kind: str) -> bool:
    """Whether the kernels have been compiled for this kind of device."""
    return ALIASES.get(device_kind, device_kind) in TABLE


def for_device(device_kind: str) -> tuple[Blocks, Blocks]:
    """Blocks for a `jax.Device.device_kind`, such as "TPU v5 lite" or "TPU v5"; those of v5e for unknown kinds."""
    return TABLE.get(ALIASES.get(device_kind, device_kind), TABLE["TPU v5 lite"])
