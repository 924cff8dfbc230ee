"""The ablations of the papers: runs that differ in one setting.

    jaxcoder train compare_mqa --data STORE --output-dir runs/mqa
    jaxcoder train compare_mha --data STORE --output-dir runs/mha

Attention and FIM rates are compared as for SantaCoder: 1.1B parameters, 300,000 steps (1.18e11 tokens) of a schedule of
600,000. Smaller comparisons give both runs the same overrides, such as `--num-steps 20000 --optimizer.decay-steps 40000
--optimizer.warmup-steps 800 --model.num-layers 12`.
"""

from dataclasses import replace

from jaxcoder_configs.starcoder import santacoder, starcoderbase_1b

from jaxcoder.config import EvalConfig, RunConfig


def compare_mqa() -> RunConfig:
    """Multi-query attention: one key/value head for 16 query heads. Compare with compare_mha.

        jaxcoder train compare_mqa --data STORE --output-dir runs/mqa

    Cost: half of SantaCoder's, about 7,100 V100 hours.
    """
    return _santacoder("compare_mqa")


def compare_mha() -> RunConfig:
    """Multi-head attention: 16 key/value heads. Compare with compare_mqa.

        jaxcoder train compare_mha --data STORE --output-dir runs/mha

    All widths are unchanged, so the model has 189M more parameters (1.31B) and the difference in loss is an upper bound
    of the effect of the heads. The papers do not state the size of this run.

    Cost: about 8,400 V100 hours (estimated: SantaCoder's, scaled by parameters).
    """
    run = _santacoder("compare_mha")
    return replace(run, model=replace(run.model, num_kv_heads=run.model.num_heads))


def compare_fim_0() -> RunConfig:
    """No fill-in-the-middle: the baseline of the left-to-right loss.

        jaxcoder train compare_fim_0 --data STORE --output-dir runs/fim-0

    Cost: half of SantaCoder's, about 7,100 V100 hours.
    """
    return _with_fim_rate(0.0, "compare_fim_0")


def compare_fim_50() -> RunConfig:
    """FIM rate 0.5, as for SantaCoder and StarCoder.

        jaxcoder train compare_fim_50 --data STORE --output-dir runs/fim-50

    Cost: half of SantaCoder's, about 7,100 V100 hours.
    """
    return _with_fim_rate(0.5, "compare_fim_50")


def compare_fim_90() -> RunConfig:
    """FIM rate 0.9.

        jaxcoder train compare_fim_90 --data STORE --output-dir runs/fim-90

    Cost: half of SantaCoder's, about 7,100 V100 hours.
    """
    return _with_fim_rate(0.9, "compare_fim_90")


def compare_2k() -> RunConfig:
    """2,048 tokens of context, 1.05M tokens per step. Compare with compare_8k.

        jaxcoder train compare_2k --data STORE --output-dir runs/2k

    Both train and evaluate on the same number of tokens in the same number of steps; this run has four times as many
    windows of a quarter of the length. The StarCoder paper evaluates one model with 2K and 8K of context; this pair
    compares training with both. It is not in the papers: the settings are StarCoderBase-1B's for a tenth of the steps.

    Cost: about 2,300 A100 hours (estimated).
    """
    run = compare_8k()
    windows = 4 * run.global_batch_size
    return replace(
        run,
        name="compare_2k",
        model=replace(run.model, max_seq_len=run.model.max_seq_len // 4),
        global_batch_size=windows,
        eval=replace(run.eval, num_windows=4 * run.eval.num_windows),
    )


def compare_8k() -> RunConfig:
    """8,192 tokens of context, 1.05M tokens per step. Compare with compare_2k.

        jaxcoder train compare_8k --data STORE --output-dir runs/8k

    Cost: about 2,300 A100 hours plus the longer attention (estimated).
    """
    evaluation = EvalConfig(every_steps=2500, num_windows=256)
    return replace(starcoderbase_1b(), name="compare_8k", num_steps=100_000, eval=evaluation)


def _santacoder(name: str) -> RunConfig:
    run = santacoder()
    return replace(run, name=name, num_steps=300_000, optimizer=replace(run.optimizer, decay_steps=600_000))


def _with_fim_rate(rate: float, name: str) -> RunConfig:
    run = _santacoder(name)
    return replace(run, data=replace(run.data, fim_rate=rate))
