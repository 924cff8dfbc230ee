"""`jaxcoder bench parity HF_DIR`: our training against PyTorch's, from the same weights on the same batches.

The weights come through `jaxcoder/convert`; both sides train in fp32 without dropout. Loss and gradient norm of every
step are laid side by side, and how far the weights are apart after the last one. Exit code 1 above the tolerance.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

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
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager", help="PyTorch's")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="most for a loss (default %(default)s)")


class Curve(NamedTuple):
    """losses, grad_norms: one float a step; weights: name -> array after the last step, under Hugging Face's names."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Any]


def run(args: argparse.Namespace) -> Report:
    torch_reference.import_torch("`jaxcoder bench parity`")
    from jaxcoder import runtime

    runtime.initialize(debug=args.debug)
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
    ours = train_ours(model, config, batches, mesh)
    their_model = torch_reference.open_model(args.directory, attention=args.attention)
    results, weights = torch_reference.train(their_model, batches, config.optimizer)
    return _report(args, config, ours, Curve(*map(list, zip(*results, strict=True)), weights))


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


def train_ours(model, config: RunConfig, batches: Sequence, mesh) -> Curve:
    """The steps of `jaxcoder train` from `model`, whose arrays lie on `mesh`, on one batch after the other."""
    import jax

    from jaxcoder.train.inputs import place
    from jaxcoder.train.state import state_of
    from jaxcoder.train.step import make_train_step

    losses, norms = [], []
    # Accelerators would round the inputs of fp32 matmuls otherwise.
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        step, state = make_train_step(config), jax.jit(lambda model: state_of(model, config))(model)
        for batch in batches:
            state, metrics = step(state, place(batch, mesh))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    return Curve(losses, norms, their_tensors(state.model))


def their_tensors(model) -> dict[str, Any]:
    """The weights as numpy arrays under Hugging Face's names."""
    import numpy as np

    from jaxcoder.checkpoint.names import flatten_tree
    from jaxcoder.convert.hf_names import entries, to_hf_tensor

    flat = {name: np.asarray(array) for name, array in flatten_tree(model, "params/").items()}
    config = model.config
    return {e.hf_name: to_hf_tensor(e, [flat[name] for name in e.jax_dims], config) for e in entries(config)}


def _report(args: argparse.Namespace, config: RunConfig, ours: Curve, theirs: Curve) -> Report:
    import numpy as np

    apart = [abs(left - right) for left, right in zip(ours.losses, theirs.losses, strict=True)]
    worst = float(np.max(apart))  # NaN stays NaN, and is above any tolerance
    # A key's bias moves no softmax: its gradient is rounding, which Adam blows up on both sides.
    names = [name for name in ours.weights if not name.endswith("c_attn.bias")]
    difference = {name: float(np.abs(ours.weights[name] - theirs.weights[name]).max()) for name in names}
    furthest = max(names, key=difference.__getitem__)
    rows = [
        {
            "step": step,
            "ours": f"{ours.losses[step - 1]:.6f}",
            "theirs": f"{theirs.losses[step - 1]:.6f}",
            "apart": f"{apart[step - 1]:.1e}",
            "our_norm": f"{ours.grad_norms[step - 1]:.5f}",
            "their_norm": f"{theirs.grad_norms[step - 1]:.5f}",
        }
        for step in range(1, config.num_steps + 1)
    ]
    return Report(
        title=f"{config.num_steps} optimizer steps from the weights of {args.directory}, ours and PyTorch's",
        settings={
            "batch": f"{config.global_batch_size} x {config.model.max_seq_len}",
            "tokens": args.store or "random",
            "PyTorch's attention": args.attention,
            "worst difference of a loss": f"{worst:.1e}",
            "of a weight in the end": f"{difference[furthest]:.1e} ({furthest})",
        },
        columns={
            "step": "step",
            "ours": "our loss",
            "theirs": "PyTorch's",
            "apart": "apart",
            "our_norm": "our gradient norm",
            "their_norm": "PyTorch's",
        },
        rows=rows,
        targets={f"losses within {args.tolerance:g}": worst <= args.tolerance},
        environment=environment(["jax", "torch", "transformers"]),
        is_test=True,
    )
