"""`jaxcoder bench cross-entropy`: loss and both gradients on a mesh, as compiled for TPUs that need not be there.

    jaxcoder bench cross-entropy --device v5p --mesh 8x1 2x4 1x8
    jaxcoder bench cross-entropy --device v6e --embed-dim 2048 --chunks 1024 4096

Every way (cross_entropy_ways.py) and chunk is compiled alone for 8 described chips, in a process of its own: its
temporary memory, the FLOPs of its matmuls with the trips of its loops, the compiler's estimate of its cycles (matmuls
and what is fused with them; no transfers between chips), and what it sends. Sequences, one a device along fsdp, are
split over `tensor` and the vocabulary too, as in training. Needs libtpu.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxcoder.benchmarks.attention_cycles import CHIPS
from jaxcoder.benchmarks.measure import Report, environment
from jaxcoder.errors import ConfigError
from jaxcoder.runtime import environment_with

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "7x": "tpu7x:2x2x1"}
"""Of eight devices each."""
COLUMNS = {
    "mesh": "fsdp x tensor", "way": "way", "chunk": "chunk", "temporaries": "MiB", "matmuls": "matmuls",
    "cycles": "Mcycles", "of_peak": "% of peak, 3 matmuls", "collectives": "collectives", "sent": "MiB sent",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=TOPOLOGIES, default="v5p", help="TPU generation (default %(default)s)")
    parser.add_argument("--mesh", nargs="+", default=["8x1", "2x4", "1x8"], help="fsdp x tensor, of eight")
    parser.add_argument("--tokens", type=int, default=8192, help="of a sequence, one a device along fsdp")
    parser.add_argument("--embed-dim", type=int, default=6144, help="default %(default)s")
    parser.add_argument("--vocab-size", type=int, default=49152, help="default %(default)s")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens or rows")
    parser.add_argument("--ways", nargs="+", help="some of the ways (default: all)")


def run(args: argparse.Namespace) -> Report:
    from jaxcoder.benchmarks.cross_entropy_ways import WAYS

    _libtpu_version()
    rows = []
    for mesh in args.mesh:
        fsdp, _, tensor = mesh.partition("x")
        if not (fsdp.isdigit() and tensor.isdigit() and int(fsdp) * int(tensor) == 8):
            raise ConfigError(f"--mesh takes sizes of fsdp and tensor whose product is 8, as 2x4, and got `{mesh}`.")
        for way in args.ways or WAYS:
            if way not in WAYS:
                raise ConfigError(f"--ways takes some of {', '.join(WAYS)}, and got `{way}`.")
            most = args.vocab_size // int(tensor) if way.startswith("vocabulary") else args.tokens
            chunks = [most] if way == "whole" else sorted({min(chunk, most) for chunk in args.chunks})
            rows += [_row(args, way, int(fsdp), int(tensor), chunk) for chunk in chunks]
    settings = dict(tokens=args.tokens, embed=args.embed_dim, vocabulary=args.vocab_size)
    versions = environment(("jax",)) | {"libtpu": _libtpu_version()}
    return Report(f"Cross-entropy on {args.device}", settings, COLUMNS, rows, {}, versions)


def _libtpu_version() -> str:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("bench cross-entropy needs libtpu, which compiles: pip install 'jaxcoder[tpu]'.") from None


def _row(args: argparse.Namespace, way: str, fsdp: int, tensor: int, chunk: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        case = [args.device, way, fsdp, tensor, args.tokens, args.embed_dim, args.vocab_size, chunk, str(answer)]
        code = f"import json, sys; from {__name__} import _compile; _compile(*json.loads(sys.argv[1]))"
        settings = dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
        command = [sys.executable, "-c", code, json.dumps(case)]
        done = subprocess.run(command, env=environment_with(settings), capture_output=True, text=True)
        if not answer.exists():
            raise ConfigError(f"The compiler gave no program for {case[:-1]}; it ended with {done.stderr[-300:]!r}.")
        found = json.loads(answer.read_text())
    one_matmul = 2 * args.tokens * args.embed_dim * args.vocab_size / tensor
    peak = CHIPS[args.device].flop_per_cycle * CHIPS[args.device].cores
    cycles, counts = found["cycles"], found["collectives"]
    return {
        "mesh": f"{fsdp} x {tensor}",
        "way": way,
        "chunk": chunk,
        "temporaries": found["temporaries"] / 2**20,
        "matmuls": found["flops"] / one_matmul,
        "cycles": cycles and cycles / 1e6,
        "of_peak": cycles and 100 * 3 * one_matmul / peak / cycles,
        "collectives": ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none",
        "sent": found["sent"] / 2**20,
    }


def _compile(device, way, fsdp, tensor, tokens, embed_dim, vocab_size, chunk, answer) -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device]).devices
    found = figures(devices, way, fsdp, tensor, tokens, embed_dim, vocab_size, chunk)
    Path(answer).write_text(json.dumps(found))


def figures(devices, way, fsdp, tensor, tokens, embed_dim, vocab_size, chunk) -> dict:
    """What the compiled program of a way needs and does, on one of eight devices, which may be described only."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from jaxcoder.benchmarks.cross_entropy_ways import WAYS
    from jaxcoder.config import MeshConfig
    from jaxcoder.plan.hlo import Program
    from jaxcoder.sharding.mesh import make_mesh
    from jaxcoder.sharding.rules import ShardingRules

    mesh, rules = make_mesh(MeshConfig(data=1, fsdp=fsdp, tensor=tensor), devices), ShardingRules()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):

        def array(dtype, shape, *dims):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, rules.spec(*dims)))

        arrays = (
            array(jnp.bfloat16, (fsdp, tokens, embed_dim), "batch", "seq", None),
            array(jnp.float32, (vocab_size, embed_dim), "vocab", "embed"),
            array(jnp.int32, (fsdp, tokens), "batch", None),
            array(jnp.float32, (fsdp, tokens), "batch", None),
        )

        def loss(*arrays):
            return WAYS[way](*arrays, chunk_size=chunk, rules=rules)

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()
    program, counts, sent = Program(compiled.as_text()), {}, 0.0
    for collective in program.collectives(dict(mesh.shape)):
        counts[collective.kind] = counts.get(collective.kind, 0) + collective.count
        sent += collective.bytes
    return dict(
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        flops=program.matmul_flops(),
        cycles=program.estimated_cycles(),
        collectives=counts,
        sent=sent,
    )
