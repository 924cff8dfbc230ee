"""The pre-training runs of the published models.

    jaxcoder train starcoderbase_1b --data.store STORE --output-dir runs/1b

Every run trained on 1.0486e12 tokens with 8,192 of context (SantaCoder: 2.36e11 with 2,048), AdamW (0.9, 0.95, 1e-8),
weight decay 0.1, gradient clipping at 1.0, dropout 0.1, FIM rate 0.5, and a cosine schedule to a tenth of the peak.
These are the defaults of the fields that are not set here. Mesh and microbatch size are not set: they affect rounding
only. The originals had one window per GPU at a time (15B: tensor 4, pipeline 4, 32 replicas; 7B: tensor 2).

Estimated costs are 6 FLOPs x parameters x tokens at 84.7e12 FLOP/s per A100, the rate of the 15B run. `jaxcoder train
NAME --dry-run` prints the resources of a run.
"""

from jaxcoder.config import CheckpointConfig, EvalConfig, ModelConfig, OptimizerConfig, RunConfig


def starcoderbase() -> RunConfig:
    """StarCoderBase, 15.5B parameters: 250,000 steps of 4.2M tokens.

        jaxcoder train starcoderbase --data STORE --output-dir runs/15b

    Cost: 512 A100 80 GB for 26 days, 320,256 GPU hours.
    """
    model = ModelConfig(num_layers=40, embed_dim=6144, num_heads=48, head_dim=128, mlp_dim=24576, init_std=0.01275)
    return _starcoder("starcoderbase", model, num_steps=250_000, global_batch_size=512, rates=(3e-4, 3e-5))


def starcoderbase_7b() -> RunConfig:
    """StarCoderBase-7B: 250,000 steps of 4.2M tokens.

        jaxcoder train starcoderbase_7b --data STORE --output-dir runs/7b

    Cost: 512 A100 80 GB; about 151,000 GPU hours (estimated).
    """
    model = ModelConfig(num_layers=42, embed_dim=4096, num_heads=32, head_dim=128, mlp_dim=16384, init_std=0.015625)
    return _starcoder("starcoderbase_7b", model, num_steps=250_000, global_batch_size=512, rates=(3e-4, 3e-5))


def starcoderbase_3b() -> RunConfig:
    """StarCoderBase-3B: 500,000 steps of 2.1M tokens.

        jaxcoder train starcoderbase_3b --data STORE --output-dir runs/3b

    Cost: 256 A100 80 GB; about 63,000 GPU hours (estimated).
    """
    model = ModelConfig(num_layers=36, embed_dim=2816, num_heads=22, head_dim=128, mlp_dim=11264, init_std=0.01884)
    return _starcoder(
        "starcoderbase_3b", model, num_steps=500_000, global_batch_size=256, rates=(5e-4, 5e-5), every=5000
    )


def starcoderbase_1b() -> RunConfig:
    """StarCoderBase-1B: 1,000,000 steps of 1.05M tokens.

        jaxcoder train starcoderbase_1b --data STORE --output-dir runs/1b

    Cost: 128 A100 80 GB; about 23,500 GPU hours (estimated).
    """
    model = ModelConfig(num_layers=24, embed_dim=2048, num_heads=16, head_dim=128, mlp_dim=8192, init_std=0.02209)
    return _starcoder(
        "starcoderbase_1b", model, num_steps=1_000_000, global_batch_size=128, rates=(4e-4, 4e-5), every=10_000
    )


def tiny_starcoder_py() -> RunConfig:
    """tiny_starcoder_py, 164M, Python only: about 100e9 tokens in 50,000 steps.

        jaxcoder train tiny_starcoder_py --data STORE --output-dir runs/tiny

    Initialization, learning rate and batch size are not published. Here: the family's 1 / sqrt(embed_dim), those of the
    1B model, and 256 windows, which gives that number of tokens.

    Cost: 32 A100 for 18 hours, 576 GPU hours.
    """
    model = ModelConfig(num_layers=20, embed_dim=768, num_heads=12, head_dim=64, mlp_dim=3072, init_std=0.03608)
    return _starcoder("tiny_starcoder_py", model, num_steps=50_000, global_batch_size=256, rates=(4e-4, 4e-5))


def santacoder() -> RunConfig:
    """SantaCoder, 1.1B, Python, Java and JavaScript: 600,000 steps of 0.39M tokens.

        jaxcoder train santacoder --data STORE --output-dir runs/santa

    The final learning rate is not published: 0 here, Megatron's default. The original trained in fp16; here bf16.

    Cost: 96 V100 for 6.2 days, 14,300 GPU hours.
    """
    model = ModelConfig(
        num_layers=24,
        embed_dim=2048,
        num_heads=16,
        head_dim=128,
        mlp_dim=8192,
        vocab_size=49280,
        max_seq_len=2048,
        init_std=0.022,
    )
    return RunConfig(
        name="santacoder",
        model=model,
        num_steps=600_000,
        global_batch_size=192,
        optimizer=OptimizerConfig(peak_learning_rate=2e-4, final_learning_rate=0.0, warmup_steps=12_000),
        eval=EvalConfig(every_steps=200, num_windows=384),
    )


def _starcoder(
    name: str,
    model: ModelConfig,
    *,
    num_steps: int,
    global_batch_size: int,
    rates: tuple[float, float],
    every: int = 2500,
) -> RunConfig:
    """rates: peak and final learning rate. every: steps between saves, and between evaluations."""
    return RunConfig(
        name=name,
        model=model,
        num_steps=num_steps,
        global_batch_size=global_batch_size,
        optimizer=OptimizerConfig(peak_learning_rate=rates[0], final_learning_rate=rates[1]),
        checkpoint=CheckpointConfig(save_every_steps=every),
        eval=EvalConfig(every_steps=every, num_windows=2 * global_batch_size),
    )
