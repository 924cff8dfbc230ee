"""`jaxcoder bench decode`: new tokens per second of greedy decoding, next to transformers' `generate`.

Both have the same random weights and prompts. A decoding step of a small batch is bound by reading all weights once, so
the table has the bytes per second of a bare matrix product with as few rows.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jaxcoder.benchmarks import torch_reference
from jaxcoder.benchmarks.measure import (
    Report,
    Reports,
    add_clock_argument,
    add_runs_argument,
    check_at_least,
    clock_name,
    clock_of,
    environment,
    time_in_turns,
)
from jaxcoder.config import ComputeConfig, ModelConfig
from jaxcoder.config.schema import Dtype
from jaxcoder.errors import install_command

JAXCODER = "jaxcoder"
SEED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="tiny_starcoder_py", help="a run's model (default %(default)s, 164M)")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[1, 8], help="prompts that run together (default 1 8)"
    )
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that follow (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPUs, else bfloat16")
    parser.add_argument("--matrix-size", type=int, help="of the bare product (default: 6144 on CPUs, else 16384)")
    add_runs_argument(parser)
    add_clock_argument(parser)


def run(args: argparse.Namespace) -> Reports:
    from jaxcoder import runtime

    runtime.initialize(debug=args.debug, share_accelerator=True)
    import jax

    from jaxcoder.config.load import load_run

    check_at_least(1, batch_size=min(args.batch_size), prompt_len=args.prompt_len, runs=args.runs)
    check_at_least(2, new_tokens=args.new_tokens)
    on_cpu = jax.default_backend() == "cpu"
    dtype: Dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    size = args.matrix_size or (6144 if on_cpu else 16384)
    # A short position table: it is not read as a whole, and does not count as weights.
    architecture = replace(load_run(args.config).model, max_seq_len=max(1024, args.prompt_len + args.new_tokens))
    model = _random_model(architecture, dtype)
    device = torch_reference.device(jax.default_backend())
    torch_model = None if device is None else _torch_model(model, dtype, device)
    return Reports([_batch(args, rows, size, model, torch_model, device) for rows in args.batch_size])


def _random_model(config: ModelConfig, dtype: Dtype):
    import jax

    from jaxcoder.models.protocol import make_model

    return jax.jit(lambda: make_model(config, ComputeConfig(dtype=dtype), seed=SEED))()


def _torch_model(model, dtype: str, device: str):
    """PyTorch's model with the weights in the compute dtype, as jaxcoder decodes."""
    from jaxcoder.convert.hf_config import hf_config

    torch, _ = torch_reference.import_torch("this benchmark")
    keys = hf_config(model.config, end_of_text=0)
    model_of_torch = torch_reference.make_model(
        keys, torch_reference.hf_tensors(model), attention="sdpa", device=device
    )
    return model_of_torch.to(getattr(torch, dtype)).eval()


def _batch(args, rows: int, size: int, model, torch_model, device: str | None) -> Report:
    import numpy as np

    from jaxcoder.benchmarks import peak
    from jaxcoder.models.flops import num_parameters

    prompts = np.random.default_rng(SEED).integers(1, model.config.vocab_size, (rows, args.prompt_len))
    generators = {JAXCODER: _jax_generator(model, prompts)}
    if torch_model is not None and device is not None:
        generators["PyTorch, sdpa"] = _torch_generator(torch_model, prompts, device)
    completions = {name: generate(args.new_tokens) for name, generate in generators.items()}
    dtype, width = model.compute.dtype, np.dtype(np.float32).itemsize if model.compute.dtype == "float32" else 2
    times = 8
    products = peak.matvecs(rows, size, dtype, times, device)
    calls: dict[str, Callable[[], object]] = dict(products)
    for name, generate in generators.items():
        calls[name] = partial(generate, args.new_tokens)
        calls[f"{name}: one token"] = partial(generate, 1)
    seconds = time_in_turns(calls, runs=args.runs, clock=clock_of(args))

    read = {name: size**2 * width * times / seconds[name] for name in products}
    weights = width * (num_parameters(model.config) - model.config.max_seq_len * model.config.embed_dim)
    table: list[dict[str, Any]] = []
    for name in generators:
        first, total = seconds[f"{name}: one token"], seconds[name]
        step = (total - first) / (args.new_tokens - 1)
        table.append(
            {
                "name": name,
                "tokens": rows * args.new_tokens / total,
                "first": 1e3 * first,
                "step": 1e3 * step,
                "read": weights / step / 1e9,
                "share": f"{100 * weights / step / max(read.values()):.0f} %",
            }
        )
    table += [{"name": f"{name}, {size} x {size}", "read": rate / 1e9} for name, rate in read.items()]
    if torch_model is None:
        table.append({"name": f"PyTorch: left out, `{install_command('bench')}`"})
    settings = {"model": args.config, "new tokens": args.new_tokens, "runs": args.runs, "seconds": clock_name(args)}
    if torch_model is not None:
        same = np.mean(
            [np.array_equal(*pair) for pair in zip(*(np.array(a) for a in completions.values()), strict=True)]
        )
        settings["prompts with the same completion"] = f"{100 * same:.0f} %"
    return Report(
        title=f"Greedy decoding, {num_parameters(model.config) / 1e6:,.0f}M parameters, {dtype}: "
        f"{rows} {'prompts' if rows > 1 else 'prompt'} of {args.prompt_len} tokens",
        settings=settings,
        columns={
            "name": "",
            "tokens": "new tokens/s",
            "first": "ms to the first",
            "step": "ms/step after it",
            "read": "GB/s of weights",
            "share": "of the best bare product",
        },
        rows=table,
        targets={"ahead of PyTorch": table[0]["tokens"] >= table[1]["tokens"]} if torch_model is not None else {},
        environment=environment(["jax"] + (["torch", "transformers"] if torch_model is not None else []))
        | peak.devices(),
    )


def _jax_generator(model, prompts) -> Callable[[int], list[list[int]]]:
    from jaxcoder.inference.decode import generate_tokens, in_compute_dtype

    model, rows = in_compute_dtype(model), [prompt.tolist() for prompt in prompts]

    def generate(new_tokens: int) -> list[list[int]]:
        return [completion.tokens for completion in generate_tokens(model, rows, max_new_tokens=new_tokens)]

    return generate


def _torch_generator(model, prompts, device: str) -> Callable[[int], list[list[int]]]:
    torch, _ = torch_reference.import_torch("this benchmark")
    ids = torch.from_numpy(prompts).to(device)
    settings = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}

    def generate(new_tokens: int) -> list[list[int]]:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **settings)
        return out[:, ids.shape[1] :].tolist()

    return generate
