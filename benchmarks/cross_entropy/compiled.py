"""Cross-entropy loss and both gradients on a mesh of eight TPUs, as compiled; no TPU is needed, libtpu is.

    python -m benchmarks.cross_entropy.compiled --device v5p --mesh 8x1 2x4 1x8
    python -m benchmarks.cross_entropy.compiled --device v6e --embed-dim 2048 --chunks 1024 4096

Every variant (variants.py) and chunk size is compiled in its own process for 8 described chips: temporary memory, FLOPs
of the matmuls with the trip counts of their loops, the compiler's cycle estimate (matmuls and what is fused with them;
no collectives), and bytes sent. Sequences, one a device along fsdp, are sharded over `tensor`, as is the vocabulary.
"""

import argparse
import importlib.metadata
import json
import sys

from benchmarks import command
from benchmarks.attention.cycles import DEVICES
from jaxcoder.benchmarks.measure import Report, environment
from jaxcoder.errors import ConfigError, JaxcoderError

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "7x": "tpu7x:2x2x1"}
"""Of eight devices each."""
COLUMNS = {
    "mesh": "fsdp x tensor", "variant": "variant", "chunk": "chunk", "temporaries": "MiB", "matmuls": "matmuls",
    "cycles": "Mcycles", "of_peak": "% of peak, 3 matmuls", "collectives": "collectives", "sent": "MiB sent",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=TOPOLOGIES, default="v5p", help="TPU generation (default %(default)s)")
    parser.add_argument("--mesh", nargs="+", default=["8x1", "2x4", "1x8"], help="fsdp x tensor, of eight")
    parser.add_argument("--tokens", type=int, default=8192, help="of a sequence, one a device along fsdp")
    parser.add_argument("--embed-dim", type=int, default=6144, help="default %(default)s")
    parser.add_argument("--vocab-size", type=int, default=49152, help="default %(default)s")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens or rows")
    parser.add_argument("--variants", nargs="+", help="some of the variants (default: all)")


def run(args: argparse.Namespace) -> Report:
    from benchmarks.cross_entropy.variants import VARIANTS

    _libtpu_version()
    rows = []
    for mesh in args.mesh:
        fsdp, _, tensor = mesh.partition("x")
        if not (fsdp.isdigit() and tensor.isdigit() and int(fsdp) * int(tensor) == 8):
            raise ConfigError(f"--mesh takes sizes of fsdp and tensor whose product is 8, as 2x4, and got `{mesh}`.")
        for variant in args.variants or VARIANTS:
            if variant not in VARIANTS:
                raise ConfigError(f"--variants takes some of {', '.join(VARIANTS)}, and got `{variant}`.")
            most = args.vocab_size // int(tensor) if variant.startswith("vocabulary") else args.tokens
            chunks = [most] if variant == "whole" else sorted({min(chunk, most) for chunk in args.chunks})
            rows += [_row(args, variant, int(fsdp), int(tensor), chunk) for chunk in chunks]
    settings = dict(tokens=args.tokens, embed=args.embed_dim, vocabulary=args.vocab_size)
    versions = environment(("jax",)) | {"libtpu": _libtpu_version()}
    return Report(
        title=f"Cross-entropy on {args.device}", columns=COLUMNS, rows=rows, settings=settings, environment=versions
    )


def _libtpu_version() -> str:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("this needs libtpu, which compiles: pip install 'jaxcoder[tpu]'.") from None


def _row(args: argparse.Namespace, variant: str, fsdp: int, tensor: int, chunk: int) -> dict:
    case = [args.device, variant, fsdp, tensor, args.tokens, args.embed_dim, args.vocab_size, chunk]
    settings = dict(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    done = command.run_module("benchmarks.cross_entropy.compiled", "--case", json.dumps(case), variables=settings)
    answers = [line for line in done.stdout.splitlines() if line.startswith("COMPILED ")]
    if not answers:
        raise JaxcoderError(f"the compiler gave no program for {case}: {done.stderr[-300:]}")
    found = json.loads(answers[0].removeprefix("COMPILED "))
    one_matmul = 2 * args.tokens * args.embed_dim * args.vocab_size / tensor
    peak = DEVICES[args.device].flop_per_cycle * DEVICES[args.device].cores
    cycles, counts = found["cycles"], found["collectives"]
    return {
        "mesh": f"{fsdp} x {tensor}",
        "variant": variant,
        "chunk": chunk,
        "temporaries": found["temporaries"] / 2**20,
        "matmuls": found["flops"] / one_matmul,
        "cycles": cycles and cycles / 1e6,
        "of_peak": cycles and 100 * 3 * one_matmul / peak / cycles,
        "collectives": ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none",
        "sent": found["sent"] / 2**20,
    }


def compile_case(device: str, *case) -> None:
    """Prints the figures of a case; runs in a process of its own."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device]).devices
    print("COMPILED", json.dumps(figures(devices, *case)), flush=True)


def figures(devices, variant, fsdp, tensor, tokens, embed_dim, vocab_size, chunk) -> dict:
    """What the compiled program of a variant needs and does, on one of eight devices, which may be described only."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from benchmarks.cross_entropy.variants import VARIANTS
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
            return VARIANTS[variant](*arrays, chunk_size=chunk, rules=rules)

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


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        compile_case(*json.loads(sys.argv[2]))
    else:
        sys.exit(command.main(sys.modules[__name__]))
