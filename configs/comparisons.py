"""The papers' comparisons, as runs that differ from one another in one thing.

    jaxcoder train compare_mqa --data STORE --output-dir runs/mqa
    jaxcoder train compare_mha --data STORE --output-dir runs/mha

Attention and FIM rates are compared as SantaCoder did: 1.1B parameters, 300,000 steps (1.18e11 tokens) of a schedule
made for 600,000. Smaller ones of the same kind take overrides on both sides, such as `--num-steps 20000
--optimizer.decay-steps 40000 --optimizer.warmup-steps 800 --model.num-layers 12`.
"""

from dataclasses import replace

from jaxcoder_configs.starcoder import santacoder, starcoderbase_1b

from jaxcoder.config import EvalConfig, OptimizerConfig, RunConfig


def compare_mqa() -> RunConfig:
    """Multi-query attention, one key/value head for 16 query heads: the partner of compare_mha.

        jaxcoder train compare_mqa --data STORE --output-dir runs/mqa

    Cost: half of SantaCoder's, about 7,100 V100 hours.
    """
    return _santacoder("compare_mqa")


def compare_mha() -> RunConfig:
    """Multi-head attention, a key/value head for each of 16: what it is better by is what multi-query attention costs.

        jaxcoder train compare_mha --data STORE --output-dir runs/mha

    All widths stay, so the model has 189M parameters more (1.31B): the difference is an upper bound of what the heads
    alone are worth. The papers' own size of this run is not known here.

    Cost: about 8,400 V100 hours (this figure is ours: SantaCoder's, by parameters).
    """
    run = _santacoder("compare_mha")
    return replace(run, model=replace(run.model, num_kv_heads=run.model.num_heads))


def compare_fim_0() -> RunConfig:
    """No fill-in-the-middle: what the left-to-right likelihood is without it.

        jaxcoder train compare_fim_0 --data STORE --output-dir runs/fim-0

    Cost: half of SantaCoder's, about 7,100 V100 hours.
    """
    return _with_fim_rate(0.0, "compare_fim_0")


def compare_fim_50() -> RunConfig:
    """Half of the pieces in fill-in-the-middle order, as SantaCoder and StarCoder were trained.

        jaxcoder train compare_fim_50 --data STORE --output-dir runs/fim-50

    Cost: half of SantaCoder's, about 7,100 V100 hours.
    """
    return _with_fim_rate(0.5, "compare_fim_50")


def compare_fim_90() -> RunConfig:
    """Nine tenths of the pieces in fill-in-the-middle order.

        jaxcoder train compare_fim_90 --data STORE --output-dir runs/fim-90

    Cost: half of SantaCoder's, about 7,100 V100 hours.
    """
    return _with_fim_rate(0.9, "compare_fim_90")


def compare_2k() -> RunConfig:
    """2,048 tokens of context at 1.05M tokens a step: the partner of compare_8k.

        jaxcoder train compare_2k --data STORE --output-dir runs/2k

    Both read the same number of tokens in the same number of steps, and are evaluated on as many; the windows of this
    one are a quarter as long and four times as many. StarCoder itself was compared by giving one model the last 2K or
    8K tokens of its context; that training at 8K pays for itself is what this pair shows. All its figures are ours:
    those of StarCoderBase-1B for a tenth of the steps.

    Cost: about 2,300 A100 hours (this figure is ours).
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
    """8,192 tokens of context at 1.05M tokens a step: the partner of compare_2k.

        jaxcoder train compare_8k --data STORE --output-dir runs/8k

    Cost: about 2,300 A100 hours, and the dearer attention (this figure is ours).
    """
    evaluation = EvalConfig(every_steps=2500, num_windows=256)
    return replace(starcoderbase_1b(), name="compare_8k", num_steps=100_000, eval=evaluation)


def _santacoder(name: str) -> RunConfig:
    run = santacoder()
    optimizer: OptimizerConfig = replace(run.optimizer, decay_steps=600_000)
    return replace(run, name=name, num_steps=300_000, optimizer=optimizer)


def _with_fim_rate(rate: float, name: str) -> RunConfig:
    run = _santacoder(name)
    return replace(run, data=replace(run.data, fim_rate=rate))
