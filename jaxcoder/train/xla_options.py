"""XLA compiler options by accelerator: named bundles, each with its reason and public source.

They apply to the training step only (`compiler_options=`), not to the process's environment, and are part of the
compilation cache's key. `compute.xla_options = "none"` keeps XLA's defaults; `jaxcoder plan` prints the options in use.
Options that the installed compiler does not know are left out (`accepted`).

Source of most: MaxText, benchmarks/xla_flags_library.py, and its scripts for a chip, src/maxtext/configs/tpu/CHIP/*.sh
(github.com/AI-Hypercomputer/maxtext, e591f30).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Value = bool | int | str


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Options that are set together. why: their effect. source: where they were published."""

    name: str
    options: dict[str, Value]
    why: str
    source: str


ASYNC_ALL_GATHER = Bundle(
    name="overlapped all-gathers",
    options={"xla_enable_async_all_gather": True, "xla_tpu_overlap_compute_collective_tc": True},
    why="all-gathers of the next weights over `fsdp` overlap with the current matmul",
    source="MaxText, CF_FOR_ALL_GATHER; in its scripts for v4, v5e, v5p and v6e",
)
FUSED_ALL_GATHER = Bundle(
    name="fused all-gathers",
    options={
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    },
    why="an all-gather is split and fused with several matmuls; v5e only: libtpu 0.0.52 rejects it as unsupported on "
    "v4, v5p and v6e, although older recipes set it there",
    source="MaxText, CF_FOR_ALL_GATHER; src/maxtext/configs/tpu/v5e/*.sh",
)
DATA_PARALLEL_OVERLAP = Bundle(
    name="overlapped gradient all-reduce",
    options={
        "xla_tpu_enable_data_parallel_all_reduce_opt": True,
        "xla_tpu_data_parallel_opt_different_sized_ops": True,
    },
    why="all-reduces over `data`, on the slow network between slices, are spread over the backward pass",
    source="MaxText, DATA_PARALLEL_OVERLAP; in its scripts for v5e and v5p",
)
REDUCE_SCATTER = Bundle(
    name="reduce-scatter",
    options={
        "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
        "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
        "xla_tpu_assign_all_reduce_scatter_layout": True,
    },
    why="a sum of which each chip keeps a shard becomes a reduce-scatter, half the bytes of an all-reduce",
    source="MaxText, LAYOUT_FOR_ALL_REDUCE_SCATTER; in its recipes for v6e",
)
BACKWARD_PIPELINING = Bundle(
    name="prefetched all-gathers of the backward pass",
    options={
        "xla_tpu_enable_ag_backward_pipelining": True,
        "xla_enable_async_collective_permute": True,
        "xla_tpu_megacore_fusion_allow_ags": False,
    },
    why="all-gathers start one layer early and stay out of megacore fusions",
    source="MaxText, src/maxtext/configs/tpu/v5p/*.sh",
)
PLAIN_TENSOR_PARALLEL = Bundle(
    name="no collective matmul",
    options={"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000},
    why="a matmul with an all-gather stays one matmul: split into chunks it uses a 256-wide MXU poorly",
    source="MaxText, DISABLE_COLLECTIVE_MATMUL; in its recipes for v6e",
)
FAST_MEMORY_V6E = Bundle(
    name="VMEM limit, v6e",
    options={"xla_tpu_scoped_vmem_limit_kib": 98_304},
    why="96 of 128 MiB of VMEM for the running operation, the rest for prefetching: for compute-bound models",
    source="MaxText, DENSE_VMEM_LIMIT_FLAG",
)
GPU_OVERLAP = Bundle(
    name="overlapped collectives",
    options={
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
    why="layers are a loop: collectives of the next iteration overlap with this one only if both are unrolled",
    source="NVIDIA JAX-Toolbox, docs/GPU_performance.md; MaxText, src/maxtext/configs/gpu/a3/llama_2_7b/*.sh",
)
GPU_COMBINED = Bundle(
    name="combined collectives",
    options={
        "xla_gpu_all_gather_combine_threshold_bytes": 128 << 20,
        "xla_gpu_all_reduce_combine_threshold_bytes": 128 << 20,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 64 << 20,
    },
    why="one collective for all matrices of a layer: fewer and larger transfers",
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
    """The bundles for a `device_kind`; none for CPUs and devices without tuned options."""
    kind = device_kind.lower()
    return next((bundles for part, bundles in _BUNDLES if part in kind), ())


def options_for(device_kind: str) -> dict[str, Value]:
    """All options of a device."""
    return {name: value for bundle in bundles_for(device_kind) for name, value in bundle.options.items()}


def accepted(options: dict[str, Value], compile_with: Callable[[Any], object]) -> dict[str, Value]:
    """The options that the installed compiler knows. compile_with: compiles something small with the options."""
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
