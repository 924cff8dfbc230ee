"""`jaxcoder bench train`: tokens per second of the training step, next to PyTorch's GPTBigCode.

Both start from the same weights, read the same random tokens and do the complete step: forward, backward, clipping,
AdamW with fp32 weights and moments; dropout is off. On GPUs PyTorch's best is `torch.compile` with SDPA under autocast.
Model FLOPs (convention: `jaxcoder/models/flops.py`) are also given as a share of a bare matmul's rate. Each candidate
runs in its own process, in turns.

Shapes: B batch, S sequence.
"""

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from jaxcoder.benchmarks import torch_reference
from jaxcoder.benchmarks.measure import (
    Report,
    add_clock_argument,
    add_runs_argument,
    check_at_least,
    clock_name,
    clock_of,
    environment,
    time_in_turns,
)
from jaxcoder.config import RunConfig
from jaxcoder.errors import install_command

JAXCODER = "jaxcoder"
REPEATS = 2
"""Measurements in each process."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="tiny_starcoder_py", help="a run's model (default %(default)s, 164M)")
    parser.add_argument("--batch-size", type=int, default=1, help="windows of a step (default %(default)s)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a window (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPUs, else bfloat16")
    parser.add_argument(
        "--remat", choices=("none", "minimal", "offload", "block"), default="none",
        help="what jaxcoder's backward pass recomputes (default %(default)s, as PyTorch does)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="a row of `torch.compile` on CPUs too")
    parser.add_argument("--matmul-size", type=int, help="of the bare matmul (default: 4096 on CPUs, else 8192)")
    parser.add_argument("--peak-tflops", type=float, help="the device's peak, for MFU: 989 for an H200 in bf16")
    add_runs_argument(parser)
    add_clock_argument(parser)


def run(args: argparse.Namespace) -> Report:
    config = run_config(args)
    first = _alone(JAXCODER, args)  # reports the platform, and fills the compilation cache
    platform = first["platform"]
    device = torch_reference.device(platform)
    candidates = [JAXCODER, *(_torch_ways(device, args.compile) if device else {})]
    products = ["matmul, JAX", *(["matmul, PyTorch"] if device else [])]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*candidates, *products)}
    for _ in range(args.runs):
        for name, results in found.items():
            results.append(_alone(name, args))
    seconds = {name: statistics.median(result["seconds"] for result in results) for name, results in found.items()}
    losses = {name: found[name][0]["loss"] for name in candidates}
    size = _matmul_size(args, platform)
    rates = {name: 2 * size**3 / seconds[name] for name in products}
    return _report(args, config, {name: seconds[name] for name in candidates}, losses, rates, size, first["devices"])


def _alone(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """`_measure` in a process of its own: candidates do not share memory and threads."""
    plain = argparse.Namespace(**{key: value for key, value in vars(args).items() if key != "output"})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, name, plain).result()


def _measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of one training step, or of one matmul, after one to warm up."""
    from jaxcoder import runtime

    runtime.initialize(debug=args.debug, share_accelerator=True)
    import jax

    from jaxcoder.benchmarks import peak

    platform = jax.default_backend()
    config = run_config(args, platform)
    device = torch_reference.device(platform) if name != JAXCODER else None
    steps, times = (1, 1) if platform == "cpu" else (10, 50)  # in one call, to amortize the synchronization
    if name.startswith("matmul"):
        size = _matmul_size(args, platform)
        call, steps = peak.matmuls(size, config.compute.dtype, times, device)[name], times
    else:
        call = (
            _JaxStep(config, steps) if name == JAXCODER else _torch_step(name, config, str(device), steps, args.compile)
        )
    seconds = time_in_turns({name: call}, runs=REPEATS, clock=clock_of(args))
    return {
        "seconds": seconds[name] / steps,
        "loss": getattr(call, "first_loss", None),
        "platform": platform,
        "devices": peak.devices(),
    }


def _matmul_size(args: argparse.Namespace, platform: str) -> int:
    return args.matmul_size or (4096 if platform == "cpu" else 8192)


def run_config(args: argparse.Namespace, platform: str = "cpu") -> RunConfig:
    """The run of --config with the batch of the options, no dropout and a small learning rate."""
    from jaxcoder.config.load import load_run

    base = load_run(args.config)
    check_at_least(1, batch_size=args.batch_size, seq_len=args.seq_len, runs=args.runs)
    return replace(
        base,
        model=replace(
            base.model, max_seq_len=args.seq_len, embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0
        ),
        global_batch_size=args.batch_size,
        microbatch_size=None,
        num_steps=1000,
        compute=replace(
            base.compute, dtype=args.dtype or ("float32" if platform == "cpu" else "bfloat16"), remat=args.remat
        ),
        optimizer=replace(base.optimizer, peak_learning_rate=1e-5, final_learning_rate=1e-6, warmup_steps=10),
    )


def windows(config: RunConfig):
    """Random tokens (B, S + 1) int32, the same for both candidates."""
    import numpy as np

    shape = (config.global_batch_size, config.model.max_seq_len + 1)
    return np.random.default_rng(config.seed).integers(0, config.model.vocab_size, shape, dtype=np.int32)


class _JaxStep:
    """A call runs `steps` steps of `jaxcoder train` on one device."""

    def __init__(self, config: RunConfig, steps: int):
        import jax

        from jaxcoder.data.loader import make_batch
        from jaxcoder.sharding.mesh import single_device_mesh
        from jaxcoder.train.inputs import shard_batch
        from jaxcoder.train.state import initial_state
        from jaxcoder.train.step import make_train_step

        self._steps, self._mesh = steps, single_device_mesh()
        batch = make_batch(windows(config), end_id=None, pad_id=None, document_mask=False)
        with jax.set_mesh(self._mesh):
            self.state = jax.jit(lambda: initial_state(config))()
            self._batch = shard_batch(batch, self._mesh)
            self._step = make_train_step(config)
        self.first_loss: float | None = None

    def __call__(self) -> None:
        import jax

        with jax.set_mesh(self._mesh):
            for _ in range(self._steps):
                self.state, metrics = self._step(self.state, self._batch)
                if self.first_loss is None:
                    self.first_loss = float(metrics["loss"])
        jax.block_until_ready((self.state, metrics))


class _TorchStep:
    """A call runs as many steps of PyTorch."""

    def __init__(self, trainer: torch_reference.TorchTrainer, config: RunConfig, device: str, steps: int):
        torch, _ = torch_reference.import_torch("this benchmark")
        ids = torch.from_numpy(windows(config).astype("int64")).to(device)
        self._batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(ids[:, 1:].shape, device=device)
        self._trainer, self._device, self._steps = trainer, device, steps
        self.first_loss: float | None = None

    def __call__(self) -> None:
        for _ in range(self._steps):
            loss, _ = self._trainer(*self._batch, 1e-6)
            if self.first_loss is None:
                self.first_loss = float(loss)
        torch_reference.wait(self._device)


def _torch_ways(device: str, with_compile: bool) -> dict[str, tuple[str, bool]]:
    """Name -> (attention, whether `torch.compile` is used): PyTorch's best ones on the device."""
    ways = [("sdpa", False), ("eager", False)] if device == "cpu" else [("sdpa", True), ("sdpa", False)]
    ways += [("sdpa", True)] if device == "cpu" and with_compile else []
    return {f"PyTorch, {'torch.compile, ' if compiled else ''}{how}": (how, compiled) for how, compiled in ways}


def _torch_step(name: str, config: RunConfig, device: str, steps: int, with_compile: bool) -> _TorchStep:
    """PyTorch's step, from jaxcoder's initial weights."""
    from jaxcoder.convert.hf_config import hf_config

    attention, compiled = _torch_ways(device, with_compile)[name]
    keys, tensors = (
        hf_config(config.model, end_of_text=0),
        torch_reference.hf_tensors(_JaxStep(config, steps).state.model),
    )
    model = torch_reference.make_model(keys, tensors, attention=attention, device=device)
    trainer = torch_reference.TorchTrainer(model, config.optimizer, dtype=config.compute.dtype, compiled=compiled)
    return _TorchStep(trainer, config, device, steps)


def _report(
    args: argparse.Namespace,
    config: RunConfig,
    seconds: dict[str, float],
    losses: dict[str, float],
    rates: dict[str, float],
    size: int,
    devices: dict[str, Any],
) -> Report:
    from jaxcoder.models.flops import num_parameters, training_flops_per_token

    tokens = config.global_batch_size * config.model.max_seq_len
    flops = tokens * training_flops_per_token(config.model, config.model.max_seq_len)
    best_rate = max(rates.values())
    of_torch = [taken for name, taken in seconds.items() if name != JAXCODER]
    rows: list[dict[str, Any]] = []
    for name, taken in seconds.items():
        row = {
            "name": name,
            "ms": 1e3 * taken,
            "tokens": tokens / taken,
            "tflops": flops / taken / 1e12,
            "share": f"{100 * flops / taken / best_rate:.1f} %",
            "ratio": min(of_torch) / taken if of_torch else None,
            "loss": f"{losses[name]:.4f}",
        }
        if args.peak_tflops:
            row["mfu"] = f"{100 * flops / taken / (args.peak_tflops * 1e12):.1f} %"
        rows.append(row)
    rows += [{"name": f"{name}, {size} x {size}", "tflops": rate / 1e12} for name, rate in rates.items()]
    if not of_torch:
        rows.append({"name": f"PyTorch: left out, `{install_command('bench')}`"})
    columns = {"name": "", "ms": "ms/step", "tokens": "tokens/s", "tflops": "TFLOP/s", "share": "of the best matmul"}
    columns |= {"mfu": f"MFU of {args.peak_tflops:g} TFLOP/s"} if args.peak_tflops else {}
    return Report(
        title=f"Training step of {num_parameters(config.model) / 1e6:,.0f}M parameters, "
        f"{config.global_batch_size} x {config.model.max_seq_len} tokens, {config.compute.dtype}",
        settings={
            "model": args.config,
            "key/value heads": config.model.num_kv_heads,
            "remat": config.compute.remat,
            "GFLOP/token": round(flops / tokens / 1e9, 3),
            "runs": args.runs,
            "seconds": clock_name(args),
        },
        columns=columns | {"ratio": "x PyTorch's best", "loss": "first loss"},
        rows=rows,
        targets={"ahead of PyTorch's best": seconds[JAXCODER] <= min(of_torch)} if of_torch else {},
        environment=environment(["jax", "flax", "optax"] + (["torch", "transformers"] if of_torch else [])) | devices,
    )
