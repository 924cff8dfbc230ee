"""`jaxcoder bench attention`: wall-clock time of the attention backends that this machine can run.

Causal, one key/value head. On CPUs `blockwise` and `reference` in fp32, at most 1,024 tokens and 4 heads; on TPUs
`flash_tpu` and `blockwise`, on GPUs cuDNN and `blockwise`, in bf16 at the shape of the options.
"""

import argparse
import time

from jaxcoder.benchmarks.measure import Report, add_runs_argument, check_at_least, environment, time_in_turns

BACKENDS = {"cpu": ("blockwise", "reference"), "tpu": ("blockwise", "flash_tpu"), "gpu": ("blockwise", "cudnn")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", choices=("forward", "backward"), help="one of the two (default: both)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence (default %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="default %(default)s")
    parser.add_argument("--num-heads", type=int, default=48, help="query heads (default %(default)s)")
    add_runs_argument(parser)


def run(args: argparse.Namespace) -> Report:
    from jaxcoder import runtime

    runtime.initialize(debug=args.debug, share_accelerator=True)
    import jax
    import jax.numpy as jnp

    check_at_least(1, length=args.length, head_dim=args.head_dim, num_heads=args.num_heads, runs=args.runs)
    platform = jax.default_backend()
    on_cpu = platform == "cpu"
    length, heads = (min(args.length, 1024), min(args.num_heads, 4)) if on_cpu else (args.length, args.num_heads)
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    shapes = (1, length, heads, args.head_dim), (1, length, 1, args.head_dim), (1, length, 1, args.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    rows = []
    for kernel in [args.kernel] if args.kernel else ["forward", "backward"]:
        calls = {name: _call(name, kernel, inputs) for name in BACKENDS[platform]}
        seconds = time_in_turns(calls, runs=args.runs, min_seconds=0.2, clock=time.perf_counter)
        rows += [
            {"kernel": kernel, "name": name, "ms": 1e3 * taken, "ratio": taken / seconds["blockwise"]}
            for name, taken in seconds.items()
        ]
    return Report(
        title=f"Attention on {jax.devices()[0].device_kind}: {heads} heads, one key/value head, {length} causal tokens",
        settings={"dtype": dtype.dtype.name, "head_dim": args.head_dim, "runs": args.runs, "backward": "with forward"},
        columns={"kernel": "kernel", "name": "", "ms": "ms", "ratio": "x blockwise"},
        rows=rows,
        environment=environment(["jax", "jaxlib"]),
    )


def _call(name: str, kernel: str, inputs: list):
    from functools import partial

    import jax

    from jaxcoder.kernels.attention.api import attention

    forward = partial(attention, implementation=name)

    def forward_and_backward(q, k, v):
        out, pull = jax.vjp(forward, q, k, v)
        return pull(out)

    function = jax.jit(forward if kernel == "forward" else forward_and_backward)
    return lambda: jax.block_until_ready(function(*inputs))
