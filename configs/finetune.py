"""The published fine-tunes of StarCoderBase, and the Python one for the 1B model.

    jaxcoder train starcoder --data PYTHON_STORE --init-from BASE --output-dir runs/python

BASE is a run, a checkpoint or a directory in Hugging Face format (`starcoderbase` as downloaded). Optimizer state and
schedule are new, as in the originals (whose step counter continued from 250,000 to 258,500; here it starts at 0). FIM
rate, dropout, betas and weight decay are those of pre-training. `jaxcoder finetune` also measures the other languages.
"""

from dataclasses import replace

from jaxcoder_configs.starcoder import starcoderbase, starcoderbase_1b

from jaxcoder.config import CheckpointConfig, EvalConfig, OptimizerConfig, RunConfig


def starcoder() -> RunConfig:
    """StarCoder: StarCoderBase for 8,500 steps on Python, 35.65e9 tokens, two epochs.

        jaxcoder train starcoder --data PYTHON_STORE --init-from BASE --output-dir runs/python

    The warm-up is 500 steps as in the original's script (its paper states 1,000). The original's interval of saves is
    not published: 500 here.

    Cost: 512 A100 80 GB, 11,208 GPU hours.
    """
    return _python(starcoderbase(), "starcoder")


def starcoderbase_1b_python() -> RunConfig:
    """StarCoderBase-1B on Python with StarCoder's schedule; not a published run.

        jaxcoder train starcoderbase_1b_python --data PYTHON_STORE --init-from BASE --output-dir runs/1b-python

    Cost: about 800 A100 hours (estimated: parameters x tokens at the rate of the 15B run).
    """
    return _python(starcoderbase_1b(), "starcoderbase_1b_python")


def starcoderplus() -> RunConfig:
    """StarCoderPlus: StarCoderBase for 150,000 steps on English web text, StarCoderData and Wikipedia, 629e9 tokens.

        jaxcoder train starcoderplus --data STORE --init-from BASE --output-dir runs/plus

    The mixture weights are not published: set `data.corpora` in your own function.

    Cost: 512 A100 80 GB; about 192,000 GPU hours (estimated).
    """
    return replace(
        starcoderbase(),
        name="starcoderplus",
        num_steps=150_000,
        optimizer=OptimizerConfig(peak_learning_rate=1e-4, final_learning_rate=1e-5, warmup_steps=1000),
    )


def _python(base: RunConfig, name: str) -> RunConfig:
    batch = 512
    return replace(
        base,
        name=name,
        num_steps=8500,
        global_batch_size=batch,
        optimizer=OptimizerConfig(peak_learning_rate=5e-5, final_learning_rate=5e-6, warmup_steps=500),
        checkpoint=CheckpointConfig(save_every_steps=500),
        eval=EvalConfig(every_steps=100, num_windows=10 * batch),
    )
