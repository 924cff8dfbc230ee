"""Compile time of the training step, and the time to start a run with and without the compilation cache.

    python -m benchmarks.training.compile_step --start-dtype float32

The step is compiled from shapes alone, so 15.5B parameters need no memory. Each measurement has its own process, with
the compilation cache off. The second table starts `jaxcoder train` and waits for the first line of metrics.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import command
from jaxcoder.benchmarks.checkpoint import seconds_to_first_step
from jaxcoder.benchmarks.measure import Report, Reports, check_at_least, environment
from jaxcoder.config.load import load_run
from jaxcoder.errors import JaxcoderError
from jaxcoder.formatting import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", nargs="+", default=["tiny_starcoder_py", "starcoderbase"],
        help="runs whose step is compiled (default: 164M and 15.5B)",
    )  # fmt: skip
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], help="device counts (default 1 8)")
    parser.add_argument("--virtual", action="store_true", help="on virtual CPU devices in any case")
    parser.add_argument("--start", default="tiny_starcoder_py", metavar="CONFIG", help="run to start, or `none`")
    parser.add_argument("--start-seq-len", type=int, default=1024, help="of that run (default %(default)s)")
    parser.add_argument("--start-dtype", choices=("float32", "bfloat16"), help="its dtype (CPUs emulate bfloat16)")
    parser.add_argument("--runs", type=int, default=1, help="the best of so many (default %(default)s)")


def run(args: argparse.Namespace) -> Reports:
    check_at_least(1, devices=min(args.devices), runs=args.runs)
    for name in [*args.config, *([] if args.start == "none" else [args.start])]:
        load_run(name)  # a wrong name fails before the first subprocess
    reports = [_compiling(args)]
    if args.start != "none":
        reports.append(_starting(args))
    return Reports(reports)


# --- the step from shapes --------------------------------------------------------------------------------------------


def _compiling(args: argparse.Namespace) -> Report:
    rows = []
    for name in args.config:
        for count in args.devices:
            figures = [_in_a_process(name, count, args.virtual) for _ in range(args.runs)]
            rows.append(min(figures, key=lambda figure: figure["trace"] + figure["compile"]))
    return Report(
        title="Compiling the training step from shapes, without the cache",
        settings={"mesh": "all fsdp", "runs": args.runs},
        columns={
            "model": "model",
            "parameters": "parameters",
            "platform": "platform",
            "devices": "devices",
            "batch": "batch",
            "trace": "s to trace",
            "compile": "s to compile",
            "state": "GiB of state a device",
            "temporary": "GiB of temporaries",
        },
        rows=rows,
        environment=environment(["jax", "jaxlib", "flax"]),
    )


def _in_a_process(name: str, devices: int, virtual: bool) -> dict:
    variables = {"JAX_ENABLE_COMPILATION_CACHE": "false"} | ({"JAX_PLATFORMS": "cpu"} if virtual else {})
    done = command.run_module("benchmarks.training.compile_step", "--step", name, str(devices), variables=variables)
    if done.returncode:
        raise JaxcoderError(f"{name} on {devices} devices did not compile: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_step(name: str, devices: int) -> dict:
    """Seconds to trace and to compile the step of a run on so many devices, and what it needs of each, in GiB."""
    from jaxcoder import runtime

    runtime.initialize(num_cpu_devices=devices)
    import jax

    from jaxcoder.config import MeshConfig
    from jaxcoder.models.flops import num_parameters
    from jaxcoder.sharding.mesh import make_mesh
    from jaxcoder.train.state import abstract_state
    from jaxcoder.train.step import make_train_step

    config = load_run(name)
    # One window on each device: the program is the same for more, only longer loops run in it.
    config = replace(config, mesh=MeshConfig(data=1, fsdp=devices), global_batch_size=devices, microbatch_size=None)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = on_devices(abstract_state(config, mesh), mesh)
        batch = abstract_batch(config, mesh)
        start = time.perf_counter()
        lowered = make_train_step(config).lower(state, batch)
        traced = time.perf_counter()
        memory = lowered.compile().memory_analysis()
        compiled = time.perf_counter()
    gib = 2.0**30
    return {
        "model": name,
        "parameters": f"{num_parameters(config.model) / 1e6:,.0f}M",
        "platform": jax.default_backend(),
        "devices": devices,
        "batch": f"{devices} x {config.model.max_seq_len}",
        "trace": traced - start,
        "compile": compiled - traced,
        "state": memory.argument_size_in_bytes / gib,
        "temporary": memory.temp_size_in_bytes / gib,
    }


def on_devices(abstract, mesh):
    """Shapes whose shardings name the real devices of `mesh`."""
    import jax

    from jaxcoder.checkpoint.names import concrete

    with jax.set_mesh(mesh):
        return jax.tree.map(concrete, abstract)


def abstract_batch(config, mesh):
    """The shapes of a global batch, its rows split as in training."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxcoder.data.loader import Batch
    from jaxcoder.train.inputs import BATCH

    shape = (config.global_batch_size, config.model.max_seq_len)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH, None))
    ids, mask = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.int32, jnp.float32))
    return Batch(inputs=ids, targets=ids, loss_mask=mask, positions=ids, segment_ids=None)


# --- starting a run --------------------------------------------------------------------------------------------------


def _starting(args: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        cache = str(Path(temporary) / "cache")
        settings = ["--compute.dtype", args.start_dtype] if args.start_dtype else []
        with_cache = {"JAX_COMPILATION_CACHE_DIR": cache}
        starts = {
            "without the cache": {"JAX_ENABLE_COMPILATION_CACHE": "false"},
            "empty cache": with_cache,
            "cache filled by the previous run": with_cache,
        }
        rows = []
        for number, (name, variables) in enumerate(starts.items()):
            output = Path(temporary) / f"run{number}"
            seconds = seconds_to_first_step(args.start, args.start_seq_len, output, settings, variables)
            rows.append({"name": name, "seconds": seconds})
        stored = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    return Report(
        title=f"`jaxcoder train {args.start}` from process start to the metrics of its first step",
        settings={"batch": f"1 x {args.start_seq_len}", "cache": format_bytes(stored)},
        columns={"name": "", "seconds": "seconds"},
        rows=rows,
        environment=environment(["jax", "jaxlib", "flax"]),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        print(json.dumps(compile_step(sys.argv[2], int(sys.argv[3]))))
    else:
        sys.exit(command.main(sys.modules[__name__]))
