"""Training curves of jaxcoder and PyTorch, from the same weights on the same batches.

    python -m benchmarks.training.parity HF_DIR

The weights are read by `jaxcoder/convert`; both train in fp32 without dropout. The report has loss and gradient norm of
every step, and the largest difference of a weight after the last. The exit code is 1 above the tolerance.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import command
from jaxcoder.benchmarks import torch_reference
from jaxcoder.benchmarks.measure import Report, environment
from jaxcoder.config import ComputeConfig, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxcoder.errors import ConfigError, ConversionError

_NO_DROPOUT = {"embed_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="HF_DIR", help="GPTBigCode weights that transformers can open")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a step (default %(default)s)")
    parser.add_argument("--seq-len", type=int, help="tokens of a window (default: the model's, at most 256)")
    parser.add_argument("--store", help="token store to read, with FIM; by default the tokens are random")
    parser.add_argument("--seed", type=int, default=1, help="of the batches (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its peak (default %(default)s)")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager", help="attention of PyTorch")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest difference of a loss (default %(default)s)"
    )


class Curve(NamedTuple):
    """losses, grad_norms: one float a step; weights: name -> array after the last step, under Hugging Face's names."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Any]


def run(args: argparse.Namespace) -> Report:
    torch_reference.import_torch("this comparison")
    from jaxcoder import runtime

    runtime.initialize()
    from jaxcoder.convert.hf_weights import is_hf_directory
    from jaxcoder.inference.load import load_model
    from jaxcoder.sharding.mesh import single_device_mesh

    if not is_hf_directory(Path(args.directory)):
        raise ConversionError(
            f"{args.directory} is no directory that transformers can open: give one with config.json and weights "
            "(`jaxcoder convert to-hf` writes it from a checkpoint)."
        )
    mesh = single_device_mesh()
    model, architecture, _ = load_model(args.directory, compute=ComputeConfig(dtype="float32"), mesh=mesh)
    config = _config(args, architecture)
    batches = make_batches(config)
    own = train_jaxcoder(model, config, batches, mesh)
    hf_model = torch_reference.open_model(args.directory, attention=args.attention)
    results, weights = torch_reference.train(hf_model, batches, config.optimizer)
    return _report(args, config, own, Curve(*map(list, zip(*results, strict=True)), weights))


def _config(args: argparse.Namespace, architecture: ModelConfig) -> RunConfig:
    from jaxcoder.config.validate import validate

    seq_len = min(256, architecture.max_seq_len) if args.seq_len is None else args.seq_len
    if not 1 <= seq_len <= architecture.max_seq_len:
        raise ConfigError(
            f"--seq-len is {seq_len}: {args.directory} has positions for 1 to {architecture.max_seq_len}."
        )
    if args.tolerance < 0:
        raise ConfigError(f"--tolerance is {args.tolerance}: give a number of at least 0.")
    rate = args.learning_rate
    config = RunConfig(
        name="parity",
        model=replace(architecture, max_seq_len=seq_len, **_NO_DROPOUT),
        num_steps=args.steps,
        global_batch_size=args.batch_size,
        seed=args.seed,
        compute=ComputeConfig(dtype="float32"),
        data=DataConfig(store=args.store or "synthetic"),
        optimizer=OptimizerConfig(
            peak_learning_rate=rate, final_learning_rate=rate / 10, warmup_steps=min(3, max(args.steps - 1, 0))
        ),
    )
    validate(config, 1)
    return config


def make_batches(config: RunConfig) -> list:
    """The first `num_steps` batches of the run's stream, on the host."""
    from jaxcoder.data.loader import batches
    from jaxcoder.train.inputs import open_streams

    stream, _, _ = open_streams(config)
    with batches(stream, global_batch_size=config.global_batch_size, first_sample=0) as source:
        return [next(source) for _ in range(config.num_steps)]


def train_jaxcoder(model, config: RunConfig, batches: Sequence, mesh) -> Curve:
    """The steps of `jaxcoder train` from `model`, whose arrays lie on `mesh`, on one batch after the other."""
    import jax

    from jaxcoder.train.inputs import shard_batch
    from jaxcoder.train.state import state_of
    from jaxcoder.train.step import make_train_step

    losses, norms = [], []
    # Accelerators would round the inputs of fp32 matmuls otherwise.
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        step, state = make_train_step(config), jax.jit(lambda model: state_of(model, config))(model)
        for batch in batches:
            state, metrics = step(state, shard_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    return Curve(losses, norms, torch_reference.hf_tensors(state.model))


def _report(args: argparse.Namespace, config: RunConfig, own: Curve, torch: Curve) -> Report:
    import numpy as np

    apart = [abs(left - right) for left, right in zip(own.losses, torch.losses, strict=True)]
    worst = float(np.max(apart))  # NaN stays NaN, and is above any tolerance
    # A key's bias moves no softmax: its gradient is rounding, which Adam blows up on both sides.
    names = [name for name in own.weights if not name.endswith("c_attn.bias")]
    difference = {name: float(np.abs(own.weights[name] - torch.weights[name]).max()) for name in names}
    furthest = max(names, key=difference.__getitem__)
    rows = [
        {
            "step": step,
            "own": f"{own.losses[step - 1]:.6f}",
            "torch": f"{torch.losses[step - 1]:.6f}",
            "apart": f"{apart[step - 1]:.1e}",
            "own_norm": f"{own.grad_norms[step - 1]:.5f}",
            "torch_norm": f"{torch.grad_norms[step - 1]:.5f}",
        }
        for step in range(1, config.num_steps + 1)
    ]
    return Report(
        title=f"{config.num_steps} optimizer steps from the weights of {args.directory}, jaxcoder and PyTorch",
        settings={
            "batch": f"{config.global_batch_size} x {config.model.max_seq_len}",
            "tokens": args.store or "random",
            "PyTorch's attention": args.attention,
            "worst difference of a loss": f"{worst:.1e}",
            "of a weight in the end": f"{difference[furthest]:.1e} ({furthest})",
        },
        columns={
            "step": "step",
            "own": "jaxcoder loss",
            "torch": "PyTorch loss",
            "apart": "difference",
            "own_norm": "jaxcoder gradient norm",
            "torch_norm": "PyTorch loss",
        },
        rows=rows,
        targets={f"losses within {args.tolerance:g}": worst <= args.tolerance},
        environment=environment(["jax", "torch", "transformers"]),
        is_test=True,
    )


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
