"""The model that `jaxcoder quickstart` trains: small enough for two CPU cores and a few minutes."""

from jaxcoder.config import (
    CheckpointConfig,
    ComputeConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)


def quickstart() -> RunConfig:
    """A StarCoder of 3.9M parameters: multi-query attention, FIM, 256 tokens of context. `jaxcoder quickstart`.

    Dropout is off: it reads no file twice. On accelerators set compute.dtype to bfloat16.
    """
    model = ModelConfig(
        num_layers=4,
        embed_dim=256,
        num_heads=4,
        head_dim=64,
        mlp_dim=1024,
        vocab_size=4096,
        max_seq_len=256,
        embed_dropout=0.0,
        residual_dropout=0.0,
        attention_dropout=0.0,
        init_std=0.02,
    )
    return RunConfig(
        name="quickstart",
        model=model,
        num_steps=600,
        global_batch_size=16,
        compute=ComputeConfig(dtype="float32", loss_chunk_size=4096),
        mesh=MeshConfig(),
        optimizer=OptimizerConfig(
            peak_learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=30, beta2=0.98, weight_decay=0.1
        ),
        checkpoint=CheckpointConfig(save_every_steps=100, save_every_seconds=20.0, keep_last=2),
        eval=EvalConfig(every_steps=150, num_windows=1024),
    )
