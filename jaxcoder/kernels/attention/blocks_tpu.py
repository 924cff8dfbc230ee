"""Block shapes of flash_tpu by TPU generation, chosen by the compiler's static cycle estimates."""

from jaxcoder.kernels.attention.schedule import Blocks

TABLE: dict[str, tuple[Blocks, Blocks]] = {
    "default": (
        Blocks(block_q=128, chunk_heads=1, block_kv=1024, edge_kv=512, vmem_mib=40),
        Blocks(block_q=128, chunk_heads=2, block_kv=512, edge_kv=512, vmem_mib=48),
    ),
    "TPU v6 lite": (
        Blocks(block_q=128, chunk_heads=2, block_kv=1024, edge_kv=512, vmem_mib=40),
        Blocks(block_q=128, chunk_heads=2, block_kv=512, edge_kv=512, vmem_mib=48),
    ),
}
"""Device kind (or `default`) -> blocks of the forward and of the backward kernel."""

COMPILED = ("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")
"""Device kinds that the kernels were compiled for. On a v4 they want more fast memory than it has."""

MOST_HEAD_DIM = 256
"""Beyond, the kernels want more fast memory than a v5p has."""


def for_device(device_kind: str) -> tuple[Blocks, Blocks]:
    """Blocks for a device by the name JAX gives it, such as "TPU v5 lite" or "TPU v5"."""
    return TABLE.get(device_kind, TABLE["default"])
