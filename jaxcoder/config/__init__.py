"""Frozen dataclasses for a run; loading, overriding and validating them."""

from jaxcoder.config.schema import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)

__all__ = [
    "CheckpointConfig",
    "ComputeConfig",
    "DataConfig",
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
]
