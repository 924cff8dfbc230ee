"""`jaxcoder bench attention --device cpu|gpu`: time on the wall of the attention that this machine can run.

On CPUs `blockwise` beside `reference`, at a small shape in fp32; on GPUs `blockwise` beside cuDNN's flash attention
(`jax.nn.dot_product_attention`), causal, bf16, at the shape asked for. Medians of runs in which all take turns.
"""

import argparse
import time
from functools import partial

from jaxcoder.benchmarks.measure import Report, environment, side_by_side
from jaxcoder.errors import ConfigError, JaxcoderError

RUNS = 5


def run(args: argparse.Namespace) -> Report:
    import jax
    import jax.numpy as jnp

    from jaxcoder import runtime

    runtime.initialize()
    is_gpu = args.device == "gpu"
    if is_gpu and not any(device.platform == "gpu" for device in jax.devices()):
        raise JaxcoderError(
            f"bench attention --device gpu needs a GPU and JAX's CUDA plugin (`pip install 'jaxcoder[cuda]'`), and "
            f"JAX sees {jax.devices()[0].device_kind}: take --device cpu, or tpu:v5p for static cycles."
        )
    names = ["cudnn"] if args.against is None and is_gpu else [name for name in (args.against or "").split(",") if name]
    if any(name not in ("cudnn", "none") or not is_gpu for name in names):
        raise ConfigError("--against takes cudnn with --device gpu, and nothing with --device cpu.")
    length, heads = (args.length, args.num_heads) if is_gpu else (min(args.length, 1024), min(args.num_heads, 4))
    dtype = jnp.bfloat16 if is_gpu else jnp.float32
    others = ["cudnn"] if "cudnn" in names else [] if is_gpu else ["reference"]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, length, heads, args.head_dim), (1, length, 1, args.head_dim), (1, length, 1, args.head_dim)
    inputs = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    rows = []
    for kernel in [args.kernel] if args.kernel else ["forward", "backward"]:
        calls = {name: _timed(name, kernel, inputs) for name in ("blockwise", *others)}
        seconds = side_by_side(calls, runs=RUNS, least_seconds=0.2, clock=time.perf_counter)
        first = seconds["blockwise"]
        rows += [
            {"kernel": kernel, "who": name, "ms": 1e3 * second, "ratio": second / first}
            for name, second in seconds.items()
        ]
    return Report(
        title=f"Attention on {jax.devices()[0].device_kind}: {heads} heads, one key/value head, {length} causal tokens",
        settings={"dtype": jnp.dtype(dtype).name, "head_dim": args.head_dim, "runs": RUNS, "backward": "with forward"},
        columns={"kernel": "kernel", "who": "", "ms": "ms", "ratio": "x blockwise"},
        rows=rows,
        targets={},
        environment=environment(["jax", "jaxlib"]),
    )


def _timed(name: str, kernel: str, inputs: list):
    import jax

    from jaxcoder.kernels.attention.api import attention

    if name == "cudnn":
        forward = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    else:
        forward = partial(attention, implementation=name)

    def both(q, k, v):
        out, pull = jax.vjp(forward, q, k, v)
        return pull(out)

    function = jax.jit(forward if kernel == "forward" else both)
    return lambda: jax.block_until_ready(function(*inputs))
