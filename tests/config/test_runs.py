"""The runs of configs/: the figures that were published, what their docstrings promise, and what comparisons vary."""

import re

import pytest
from jaxcoder_configs import comparisons, finetune, starcoder

from jaxcoder.config import load as load_module
from jaxcoder.config.load import available_runs, load_run
from jaxcoder.config.serialize import diff
from jaxcoder.config.validate import validate

# steps, windows a step, peak and final learning rate, warm-up, save every, evaluate every, evaluation batches, devices
PUBLISHED = {
    "starcoderbase": (250_000, 512, 3e-4, 3e-5, 2000, 2500, 2500, 2, 512),
    "starcoderbase_7b": (250_000, 512, 3e-4, 3e-5, 2000, 2500, 2500, 2, 512),
    "starcoderbase_3b": (500_000, 256, 5e-4, 5e-5, 2000, 5000, 5000, 2, 256),
    "starcoderbase_1b": (1_000_000, 128, 4e-4, 4e-5, 2000, 10_000, 10_000, 2, 128),
    "santacoder": (600_000, 192, 2e-4, 0.0, 12_000, None, 200, 2, 64),
    "starcoder": (8500, 512, 5e-5, 5e-6, 500, None, 100, 10, 512),
    "starcoderplus": (150_000, 512, 1e-4, 1e-5, 1000, None, 2500, 2, 512),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    steps, batch, peak, final, warmup, save, evaluate, eval_batches, devices = PUBLISHED[name]
    run = load_run(name)
    assert (run.num_steps, run.global_batch_size) == (steps, batch)
    optimizer = run.optimizer
    assert optimizer.peak_learning_rate == peak and optimizer.final_learning_rate == pytest.approx(final)
    assert (optimizer.warmup_steps, optimizer.decay_steps) == (warmup, None)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.1, 1.0)
    assert save is None or run.checkpoint.save_every_steps == save
    assert (run.eval.every_steps, run.eval.num_windows) == (evaluate, eval_batches * batch)
    assert (run.seed, run.data.fim_rate, run.data.fim_spm_rate, run.compute.dtype) == (1234, 0.5, 0.5, "bfloat16")
    model = run.model
    assert model.embed_dropout == model.residual_dropout == model.attention_dropout == 0.1
    assert model.max_seq_len == (2048 if name == "santacoder" else 8192) and model.mlp_dim == 4 * model.embed_dim
    validate(run, devices)


def test_the_python_fine_tune_reads_what_was_published():
    run = finetune.starcoder()
    assert run.num_steps * run.global_batch_size * run.model.max_seq_len == pytest.approx(35.65e9, rel=1e-3)
    assert run.model == starcoder.starcoderbase().model


@pytest.mark.parametrize("name", available_runs())
def test_every_run_says_its_command_and_its_cost(name):
    docstring = load_module.docstring_of(name)
    assert re.search(rf"^ +jaxcoder train {name}( |$)", docstring, re.M), "no command"
    assert load_module.cost_of(docstring), "no cost"


PAIRS = {
    ("compare_mqa", "compare_mha"): ["model.num_kv_heads: 1 -> 16"],
    ("compare_fim_0", "compare_fim_50"): ["data.fim_rate: 0.0 -> 0.5"],
    ("compare_fim_50", "compare_fim_90"): ["data.fim_rate: 0.5 -> 0.9"],
    ("compare_mqa", "compare_fim_50"): [],
    # As many tokens a step and an evaluation, in windows of another length.
    ("compare_2k", "compare_8k"): [
        "model.max_seq_len: 2048 -> 8192",
        "global_batch_size: 512 -> 128",
        "eval.num_windows: 1024 -> 256",
    ],
}


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_partners_differ_in_one_thing(pair):
    one, other = map(load_run, pair)
    assert diff(one, other) == [f"name: {pair[0]} -> {pair[1]}", *PAIRS[pair]]


def test_a_context_is_compared_at_equal_tokens():
    tokens = {
        (run.global_batch_size * run.model.max_seq_len, run.eval.num_windows * run.model.max_seq_len)
        for run in (comparisons.compare_2k(), comparisons.compare_8k())
    }
    assert len(tokens) == 1
