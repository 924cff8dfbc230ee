"""XLA's compiler options by accelerator: named bundles, each with its reason and its public source.

They go to one executable, the training step (`compiler_options=`), and not into the process's environment, so that
nothing else changes and the compilation cache knows them. `compute.xla_options = "none"` leaves XLA at its defaults;
`jaxcoder plan` shows what is set. Options that the installed compiler does not know are left out (`accepted`).

Source of most: MaxText, benchmarks/xla_flags_library.py, and its scripts for a chip, src/maxtext/configs/tpu/CHIP/*.sh
(github.com/AI-Hypercomputer/maxtext, e591f30).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

Value = bool | int | str


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Options that belong together. why: what they do, and when it pays. source: who published them."""

    name: str
    options: dict[str, Value]
    why: str
    source: str


ASYNC_ALL_GATHER = Bundle(
    name="gathers beside matmuls",
    options={"xla_enable_async_all_gather": True, "xla_tpu_overlap_compute_collective_tc": True},
    why="the weights of the next matmul are gathered over `fsdp` while this one runs",
    source="MaxText, CF_FOR_ALL_GATHER; in its scripts for v4, v5e, v5p and v6e",
)
FUSED_ALL_GATHER = Bundle(
    name="gathers inside matmuls",
    options={
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    },
    why="a gather is cut up and fused with several matmuls; v5e only: for v4, v5p and v6e libtpu 0.0.52 refuses it as "
    "unsupported, although older recipes set it there",
    source="MaxText, CF_FOR_ALL_GATHER; src/maxtext/configs/tpu/v5e/*.sh",
)
DATA_PARALLEL_OVERLAP = Bundle(
    name="gradients beside the backward pass",
    options={
        "xla_tpu_enable_data_parallel_all_reduce_opt": True,
        "xla_tpu_data_parallel_opt_different_sized_ops": True,
    },
    why="sums over `data`, on the slow network between slices, are spread over the backward pass",
    source="MaxText, DATA_PARALLEL_OVERLAP; in its scripts for v5e and v5p",
)
REDUCE_SCATTER = Bundle(
    name="scattered sums",
    options={
        "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
        "xla_tpu_assign_all_reduce_scatter_layout": True,
    },
    why="a sum of which each chip keeps its part becomes a reduce-scatter, half the bytes of an all-reduce",
    source="MaxText, LAYOUT_FOR_ALL_REDUCE_SCATTER; in its recipes for v6e",
)
BACKWARD_PIPELINING = Bundle(
    name="gathers of the backward pass ahead",
    options={
        "xla_tpu_enable_ag_backward_pipelining": True,
        "xla_enable_async_collective_permute": True,
        "xla_tpu_megacore_fusion_allow_ags": False,
    },
    why="gathers begin a layer early, and are not drawn into fusions of both cores",
    source="MaxText, src/maxtext/configs/tpu/v5p/*.sh",
)
PLAIN_TENSOR_PARALLEL = Bundle(
    name="no collective matmul",
    options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    why="a matmul beside a gather stays one matmul: cut into pieces it fills a 256-wide MXU badly",
    source="MaxText, DISABLE_COLLECTIVE_MATMUL; in its recipes for v6e",
)
FAST_MEMORY_V6E = Bundle(
    name="fast memory, v6e",
    options={"xla_tpu_scoped_vmem_limit_kib": 98_304},
    why="96 of 128 MiB of VMEM for the running operation, the rest to fetch ahead: right where matmuls bound",
    source="MaxText, DENSE_VMEM_LIMIT_FLAG",
)
GPU_OVERLAP = Bundle(
    name="transfers beside matmuls",
    options={
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
    why="layers are a loop: transfers of the next turn overlap with this one only if both are in sight",
    source="NVIDIA JAX-Toolbox, docs/GPU_performance.md; MaxText, src/maxtext/configs/gpu/a3/llama_2_7b/*.sh",
)
GPU_COMBINED = Bundle(
    name="whole layers in one transfer",
    options={
        "xla_gpu_all_gather_combine_threshold_bytes": 128 << 20,
        "xla_gpu_all_reduce_combine_threshold_bytes": 128 << 20,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 64 << 20,
    },
    why="the matrices of a layer travel together: fewer, longer transfers",
    source="MaxText, src/maxtext/configs/gpu/a3/llama_2_7b/*.sh",
)

_TPU = (ASYNC_ALL_GATHER, DATA_PARALLEL_OVERLAP, REDUCE_SCATTER)
_BUNDLES: tuple[tuple[str, tuple[Bundle, ...]], ...] = (  # (part of the device kind, bundles); the first that fits
    ("tpu v6", (*_TPU, PLAIN_TENSOR_PARALLEL, FAST_MEMORY_V6E)),
    ("tpu7x", _TPU),
    ("tpu v5 lite", (*_TPU, FUSED_ALL_GATHER)),
    ("tpu v5e", (*_TPU, FUSED_ALL_GATHER)),
    ("tpu v5", (*_TPU, BACKWARD_PIPELINING)),
    ("tpu v4", _TPU),
    ("nvidia", (GPU_OVERLAP, GPU_COMBINED)),
)


def bundles_for(device_kind: str) -> tuple[Bundle, ...]:
    """The bundles of a device by the name JAX gives it; none for CPUs and devices that nobody tuned."""
    kind = device_kind.lower()
    return next((bundles for part, bundles in _BUNDLES if part in kind), ())


def options_for(device_kind: str) -> dict[str, Value]:
    """All options of a device."""
    return {name: value for bundle in bundles_for(device_kind) for name, value in bundle.options.items()}


def accepted(options: dict[str, Value], compile_with: Callable[[dict[str, Value]], object]) -> dict[str, Value]:
    """Those that the compiler knows. compile_with: compiles something small with the options."""
    options = dict(options)
    while options:
        try:
            compile_with(options)
        except Exception as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or unknown[1] not in options:
                raise
            del options[unknown[1]]
        else:
            break
    return options
