"""`jaxcoder bench decode`: new tokens per second, greedily, beside `generate` of transformers with a KV cache.

The same random weights and prompts on both sides. A step of a small batch reads all weights once and does little else,
so the floor is what a bare product of as few rows needs to read a matrix: its bytes per second are in the table.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxcoder.benchmarks import torch_reference
from jaxcoder.benchmarks.measure import (
    Report,
    Reports,
    add_clock_argument,
    clock_name,
    clock_of,
    environment,
    side_by_side,
)
from jaxcoder.config import ComputeConfig, ModelConfig
from jaxcoder.errors import ConfigError

_OURS = "jaxcoder"
_SEED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="tiny_starcoder_py", help="a run's model (default %(default)s, 164M)")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[1, 8], help="prompts that run together (default 1 8)"
    )
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that follow (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPUs, else bfloat16")
    parser.add_argument("--matrix-size", type=int, help="of the bare product (default: 6144 on CPUs, else 16384)")
    parser.add_argument("--runs", type=int, default=5, help="the median of so many counts (default %(default)s)")
    add_clock_argument(parser)


def run(args: argparse.Namespace) -> Reports:
    from jaxcoder import runtime

    runtime.initialize(debug=args.debug, share_accelerator=True)
    import jax

    from jaxcoder.config.load import load_run

    given = {"--batch-size": min(args.batch_size), "--prompt-len": args.prompt_len, "--runs": args.runs}
    for option, value in given.items():
        if value < 1:
            raise ConfigError(f"{option} is {value}: give at least 1.")
    if args.new_tokens < 2:
        raise ConfigError(f"--new-tokens is {args.new_tokens}: give at least 2.")
    on_cpu = jax.default_backend() == "cpu"
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    size = args.matrix_size or (6144 if on_cpu else 16384)
    # The position table ends with the answer, as short as it may be.
    architecture = replace(load_run(args.config).model, max_seq_len=max(1024, args.prompt_len + args.new_tokens))
    model = _random_model(architecture, dtype)
    device = torch_reference.device(jax.default_backend())
    their_model = None if device is None else _their_model(model, dtype, device)
    return Reports([_batch(args, rows, size, model, their_model, device) for rows in args.batch_size])


def _random_model(config: ModelConfig, dtype: str):
    import jax

    from jaxcoder.models.protocol import make_model

    return jax.jit(lambda: make_model(config, ComputeConfig(dtype=dtype), seed=_SEED))()


def _their_model(model, dtype: str, device: str):
    """PyTorch's, with the weights in the compute dtype, as ours has them when it decodes."""
    from jaxcoder.benchmarks.parity import their_tensors
    from jaxcoder.convert.hf_config import hf_config

    torch, _ = torch_reference.import_torch("this benchmark")
    keys = hf_config(model.config, end_of_text=0)
    theirs = torch_reference.make_model(keys, their_tensors(model), attention="sdpa", device=device)
    return theirs.to(getattr(torch, dtype)).eval()


def _batch(args, rows: int, size: int, model, their_model, device: str | None) -> Report:
    import numpy as np

    from jaxcoder.benchmarks import bare
    from jaxcoder.models.flops import num_parameters

    prompts = np.random.default_rng(_SEED).integers(1, model.config.vocab_size, (rows, args.prompt_len))
    generators = {_OURS: _our_generator(model, prompts)}
    if their_model is not None:
        generators["PyTorch, sdpa"] = _their_generator(their_model, prompts, device)
    answers = {name: generate(args.new_tokens) for name, generate in generators.items()}
    dtype, width = model.compute.dtype, np.dtype(np.float32).itemsize if model.compute.dtype == "float32" else 2
    times = 8
    products = bare.matvecs(rows, size, dtype, times, device)
    contestants: dict[str, Callable[[], object]] = dict(products)
    for name, generate in generators.items():
        contestants[name] = lambda generate=generate: generate(args.new_tokens)
        contestants[f"{name}: one token"] = lambda generate=generate: generate(1)
    seconds = side_by_side(contestants, runs=args.runs, least_seconds=0.0, clock=clock_of(args))

    read = {name: size**2 * width * times / seconds[name] for name in products}
    weights = width * (num_parameters(model.config) - model.config.max_seq_len * model.config.embed_dim)
    table: list[dict[str, Any]] = []
    for name in generators:
        first, whole = seconds[f"{name}: one token"], seconds[name]
        step = (whole - first) / (args.new_tokens - 1)
        table.append(
            {
                "way": name,
                "tokens": rows * args.new_tokens / whole,
                "first": 1e3 * first,
                "step": 1e3 * step,
                "read": weights / step / 1e9,
                "share": f"{100 * weights / step / max(read.values()):.0f} %",
            }
        )
    table += [{"way": f"{name}, {size} x {size}", "read": rate / 1e9} for name, rate in read.items()]
    if their_model is None:
        table.append({"way": "PyTorch: left out, `pip install 'jaxcoder[bench]'`"})
    settings = {"model": args.config, "new tokens": args.new_tokens, "runs": args.runs, "seconds": clock_name(args)}
    if their_model is not None:
        same = np.mean([np.array_equal(*pair) for pair in zip(*(np.array(a) for a in answers.values()), strict=True)])
        settings["prompts with the same answer"] = f"{100 * same:.0f} %"
    return Report(
        title=f"Greedy decoding, {num_parameters(model.config) / 1e6:,.0f}M parameters, {dtype}: "
        f"{rows} {'prompts' if rows > 1 else 'prompt'} of {args.prompt_len} tokens",
        settings=settings,
        columns={
            "way": "way",
            "tokens": "new tokens/s",
            "first": "ms to the first",
            "step": "ms/step after it",
            "read": "GB/s of weights",
            "share": "of the best bare",
        },
        rows=table,
        targets={"ahead of PyTorch": table[0]["tokens"] >= table[1]["tokens"]} if their_model is not None else {},
        environment=environment(["jax"] + (["torch", "transformers"] if their_model is not None else []))
        | bare.devices(),
    )


def _our_generator(model, prompts) -> Callable[[int], list[list[int]]]:
    from jaxcoder.inference.decode import generate_tokens, in_compute_dtype

    model, rows = in_compute_dtype(model), [prompt.tolist() for prompt in prompts]

    def generate(new_tokens: int) -> list[list[int]]:
        return [answer.tokens for answer in generate_tokens(model, rows, max_new_tokens=new_tokens)]

    return generate


def _their_generator(model, prompts, device: str) -> Callable[[int], list[list[int]]]:
    torch, _ = torch_reference.import_torch("this benchmark")
    ids = torch.from_numpy(prompts).to(device)
    settings = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}

    def generate(new_tokens: int) -> list[list[int]]:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **settings)
        return out[:, ids.shape[1] :].tolist()

    return generate
