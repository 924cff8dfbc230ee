"""Writes tests/golden/plan/*.json: the compiled training step of a tiny model on two small topologies.

    python tests/golden/make_plan_golden.py        (Linux on x86_64, with libtpu; a minute or two)

Run it after an intended change of the compiled program, and review the difference: a new collective, an array that is
no longer sharded, another kernel. The test is tests/plan/test_plan_goldens.py.
"""

import json
from pathlib import Path

from jaxcoder.config import MeshConfig, ModelConfig, RunConfig
from jaxcoder.config.load import with_store
from jaxcoder.plan.compile import Compiled, compile_step
from jaxcoder.plan.topology import parse_topology

FOLDER = Path(__file__).parent / "plan"
TINY = ModelConfig(
    num_layers=3, embed_dim=512, num_heads=4, head_dim=128, mlp_dim=1024, vocab_size=1024, max_seq_len=512,
    attention_dropout=0.0,
)  # fmt: skip
CASES = {
    "v5e-fsdp2-tensor2": ("v5e:2x2", MeshConfig(data=1, fsdp=2, tensor=2)),
    "v5p-data2-fsdp2": ("v5p:2x2x1", MeshConfig(data=2, fsdp=2, tensor=1)),
}


def config_of(name: str) -> RunConfig:
    mesh = CASES[name][1]
    config = RunConfig(name="tiny", model=TINY, num_steps=10, global_batch_size=8, microbatch_size=4, mesh=mesh)
    return with_store(config, "synthetic")


def compiled(name: str, *, use_cache: bool = True) -> Compiled:
    return compile_step(config_of(name), parse_topology(CASES[name][0]), use_cache=use_cache)


def golden_of(found: Compiled) -> dict:
    """Figures that do not depend on XLA's scheduling: no names, order or fusions.

    Collectives over a kilobyte are summed by kind and axes, because XLA chooses their number.
    """
    sent: dict[str, float] = {}
    for collective in found.collectives:
        if collective.bytes > 1024 * collective.count:
            key = f"{collective.kind} over {'+'.join(collective.axes)}"
            sent[key] = sent.get(key, 0) + collective.bytes
    return {
        "versions": {name: found.versions[name] for name in ("jax", "libtpu")},
        "state_bytes": found.state_bytes,
        "peak_bytes": found.peak_bytes - found.code_bytes,
        "matmul_flops": found.matmul_flops,
        "kernels": dict(sorted(found.kernels.items())),
        "collective_bytes": dict(sorted(sent.items())),
        "shardings": found.shardings,
        "options": found.options,
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        golden = golden_of(compiled(name, use_cache=False))
        (FOLDER / f"{name}.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
        print(f"Wrote {FOLDER / name}.json")


if __name__ == "__main__":
    main()
