"""A run of a few seconds that tests an installation."""

from jaxcoder.config import ModelConfig, OptimizerConfig, RunConfig


def smoke() -> RunConfig:
    """Twenty steps of a model of 0.1M parameters.

        jaxcoder train smoke --data synthetic

    Cost: a few seconds anywhere.
    """
    model = ModelConfig(
        num_layers=2, embed_dim=64, num_heads=4, head_dim=16, mlp_dim=256, vocab_size=512, max_seq_len=64
    )
    return RunConfig(
        name="smoke",
        model=model,
        num_steps=20,
        global_batch_size=8,
        optimizer=OptimizerConfig(peak_learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=2),
    )
