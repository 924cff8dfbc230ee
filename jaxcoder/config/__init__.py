"""Frozen dataclasses for a run; loading, overriding and validating them."""

from jaxcoder.config.mesh import MeshConfig
from jaxcoder.config.schema import (
    CheckpointConfig,
    ComputeConfig,
    Corpus,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    Stage,
    WatchdogConfig,
)

__all__ = [
    "CheckpointConfig",
    "ComputeConfig",
    "Corpus",
    "DataConfig",
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "Stage",
    "WatchdogConfig",
]
