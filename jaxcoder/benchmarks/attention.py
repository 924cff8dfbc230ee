"""Static cycles of our TPU attention kernels, from libtpu's own estimator, with no TPU at hand.

    jaxcoder bench attention --device v5p                            cost of a visit, forward and backward
    jaxcoder bench attention --device v6e --heads 16 --block-kv 1024 --edge-kv 512

The estimator walks the compiled bundles, but reads scalars from memory as 0. So the schedule of a causal sequence of
one document is computed from the grid's own indices, by shifts and comparisons, which it follows. The lengths that it
can walk give, by least squares, what a whole block costs and what a block of queries costs besides (its edges under the
mask, its loads and stores); from these follow the lengths that it can't. The residuals are part of the answer.
Each compilation is a process of its own, for the estimator ends the process on what it cannot model.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

from jaxcoder.errors import ConfigError
from jaxcoder.runtime import environment_with

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "7x": "tpu7x:2x2x1"}
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "7x": "TPU7x"}
"""As JAX names the devices."""
FLOP_PER_CYCLE = {"v4": 131072, "v5e": 131072, "v5p": 131072, "v6e": 524288, "7x": 524288}
"""bf16, of one core."""
LENGTHS = (1024, 2048, 4096)
FLOP = {"forward": 4, "backward": 10}
"""Per query, key, head and element of head_dim: two and five matmuls."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Cycles of one kernel; see `text` for what is derived."""

    device: str
    kernel: str
    length: int
    heads: int
    head_dim: int
    full: float
    rest: float
    residual: float
    fulls: int
    q_blocks: int
    block_q: int
    block_kv: int
    edge_kv: int

    @property
    def per_head(self) -> float:
        """Cycles of a causal sequence of one document, divided by the heads."""
        return (self.full * self.fulls + self.rest * self.q_blocks) / self.heads

    def of_peak(self, cycles: float, keys: float) -> float:
        return FLOP[self.kernel] * keys * self.head_dim / cycles / FLOP_PER_CYCLE[self.device]

    def text(self) -> str:
        rows = self.block_q * self.heads
        triangle = self.of_peak(self.per_head, self.length**2 / 2)
        return (
            f"{self.device:4} {self.kernel:8} a whole block {self.full:7.0f} cycles "
            f"({self.of_peak(self.full, rows * self.block_kv):.1%} of peak), {self.rest:.0f} a block of queries "
            f"besides, largest residual {self.residual:.1%}; {self.length} causal: {self.per_head:.0f} a head, "
            f"{triangle:.1%} useful"
        )


@dataclass(frozen=True)
class AttentionReport:
    rows: list[Row]
    exit_code: int = 0

    def text(self) -> str:
        return "\n".join(row.text() for row in self.rows) or "No kernel could be estimated."

    def write(self, path) -> None:
        dicts = [{f.name: getattr(row, f.name) for f in fields(row)} | {"per_head": row.per_head} for row in self.rows]
        path.write_text(json.dumps(dicts, indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=TOPOLOGIES, default="v5p", help="TPU generation (default v5p)")
    parser.add_argument("--kernel", choices=FLOP, action="append", help="one of the two (default: both)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence (default 8192)")
    parser.add_argument("--head-dim", type=int, default=128, help="default 128")
    for name in ("heads", "chunk-heads", "block-q", "block-kv", "edge-kv"):
        parser.add_argument(f"--{name}", type=int, help="instead of the table's")


def run(args: argparse.Namespace) -> AttentionReport:
    rows = []
    for kernel in args.kernel or FLOP:
        chosen = ("heads", "chunk_heads", "block_q", "block_kv", "edge_kv")
        options = {name: value for name in chosen if (value := vars(args)[name]) is not None}
        rows.append(measure(args.device, kernel, args.length, args.head_dim, options))
    return AttentionReport(rows)


def measure(device: str, kernel: str, length: int, head_dim: int, options: dict[str, int]) -> Row:
    blocks = _blocks(device, kernel, options)
    lengths = [n for n in LENGTHS if n >= blocks.block_kv]
    counts = np.array([_causal_steps(blocks, n) for n in lengths], float)
    cycles = np.array([_cycles(device, kernel, n, head_dim, options) for n in lengths], float)
    # Weighted, so that every length counts by its relative error.
    full, rest = np.linalg.lstsq(counts / cycles[:, None], np.ones(len(lengths)), rcond=None)[0]
    fulls, q_blocks = _causal_steps(blocks, length)
    return Row(
        device=device, kernel=kernel, length=length, heads=blocks.heads, head_dim=head_dim, full=full, rest=rest,
        residual=float(abs(counts @ [full, rest] / cycles - 1).max()), fulls=fulls, q_blocks=q_blocks,
        block_q=blocks.block_q, block_kv=blocks.block_kv, edge_kv=blocks.edge_kv,
    )  # fmt: skip


def _blocks(device: str, kernel: str, options: dict[str, int]):
    from jaxcoder.kernels.attention.blocks_tpu import for_device

    return replace(for_device(KINDS[device])[0 if kernel == "forward" else 1], **options)


def _causal_steps(blocks, length: int) -> tuple[int, int]:
    """Whole steps and blocks of queries of a causal sequence, as the schedule has them."""
    import jax.numpy as jnp

    from jaxcoder.kernels.attention.schedule import Intervals, visits

    end = jnp.arange(1, length + 1, dtype=jnp.int32)[None]
    todo = visits(Intervals(jnp.zeros_like(end), end), blocks, -(-length // blocks.span_kv))
    return int(todo.fulls.sum()), length // blocks.block_q


def _cycles(device: str, kernel: str, length: int, head_dim: int, options) -> int:
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_static_llo_profile_to={folder}",
        )
        case = json.dumps([device, kernel, length, head_dim, options])
        command = [sys.executable, "-c", f"from {__name__} import _compile; _compile(*{case})"]
        done = subprocess.run(command, env=environment_with(environment), capture_output=True, text=True)
        profiles = "".join(path.read_text() for path in Path(folder).iterdir())
        if not (cycles := [int(x) for x in re.findall(r'"flash[^"]*"\s+estimated_cycles: (\d+)', profiles)]):
            raise ConfigError(f"The estimator gave no cycles for {case}; it ended with {done.stderr[-300:]!r}.")
        return sum(cycles)


def _compile(device: str, kernel: str, length: int, head_dim: int, options) -> None:
    """Compiles one kernel alone, with a schedule that the estimator can follow."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from jaxcoder.kernels.attention import flash_tpu_kernels as kernels
    from jaxcoder.kernels.attention.mask import AttentionSpec

    blocks = _blocks(device, kernel, options)
    blocks = blocks.fit(length, length, blocks.heads)
    kernels.read_visits = partial(_causal_visits, blocks)
    heads, spec = blocks.heads, AttentionSpec(causal=True, scale=head_dim**-0.5, dropout_rate=0.0)
    sizes = kernels.Sizes(spec, blocks, 1, heads, 1, length, length, head_dim, False)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device])
    target = SingleDeviceSharding(topology.devices[0])

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=target)

    table = shape(6 * length // blocks.block_q, dtype=jnp.int32)
    q, k, k_transposed = shape(1, length, heads * head_dim), shape(1, length, head_dim), shape(1, head_dim, length)
    statistics, seen = shape(1, heads, 1, length, dtype=jnp.float32), shape(1, 1, length, dtype=jnp.int32)
    if kernel == "forward":
        arrays = (table, q, k_transposed, k, seen, seen, None)
    else:
        arrays = (table, q, k, k_transposed, k, q, statistics, statistics, seen, seen, None)
    jax.jit(lambda *x: getattr(kernels, kernel)(sizes, *x)).lower(*arrays).compile()


def _causal_visits(blocks, table, grid, row, span, q_block):
    """What `schedule.visits` gives for one causal document, by shifts; block sizes are powers of two."""
    import jax
    import jax.numpy as jnp

    from jaxcoder.kernels.attention.schedule import Visits

    first, zero = q_block * blocks.block_q, jnp.int32(0)
    fulls = jax.lax.shift_right_logical(first + 1, blocks.block_kv.bit_length() - 1)
    edge_end = jax.lax.shift_right_logical(first + blocks.block_q + blocks.edge_kv - 1, blocks.edge_kv.bit_length() - 1)
    before = jnp.where(fulls > 0, zero, edge_end)
    edges = edge_end - fulls * (blocks.block_kv // blocks.edge_kv)
    return Visits(edge=zero, edges_before=before, edges=edges, full=zero, fulls=fulls, span=zero)
