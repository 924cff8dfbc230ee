"""XLA's descriptions of GPUs (GpuTargetConfigProto), with which it compiles without a card or driver.

Figures: the CUDA programming guide's table of compute capabilities, and NVIDIA's data sheets.
"""

_TEXT = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_of_core} shared_memory_per_block_optin: {shared_memory_of_block}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 {feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation"
  device_address_bits: 64 pcie_bandwidth: 34359738368 name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""

_HOPPER = dict(
    major=9, feature="feature_extension: ACCELERATED_FEATURES", cores=132, fpus=128, clock=1.98, l2=50 << 20,
    shared_memory_of_core=228 << 10, shared_memory_of_block=227 << 10,
)  # fmt: skip
_AMPERE = dict(
    major=8, feature="", cores=108, fpus=64, clock=1.41, l2=40 << 20,
    shared_memory_of_core=164 << 10, shared_memory_of_block=163 << 10,
)  # fmt: skip
_CARDS = {
    "NVIDIA H200": dict(_HOPPER, bandwidth=4_800_000_000_000, memory=141 << 30),
    "NVIDIA H100 80GB HBM3": dict(_HOPPER, bandwidth=3_350_000_000_000, memory=80 << 30),
    "NVIDIA A100-SXM4-80GB": dict(_AMPERE, bandwidth=2_039_000_000_000, memory=80 << 30),
}


def target_config(kind: str) -> str:
    """The text of the proto for a device kind of `topology.GPUS`."""
    return _TEXT.format(name=kind, **_CARDS[kind])
