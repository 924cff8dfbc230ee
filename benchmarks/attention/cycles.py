"""Static cycles of one TPU kernel from libtpu's own estimator; no TPU is needed.

A case is traced, its Pallas call is extracted from the trace, and that call alone is compiled for a described chip.
What XLA adds around a kernel (copies, reductions) is not counted, and the estimator aborts on some of it. Every case
runs in its own process, because the estimator aborts the process on what it cannot model; the case is then compiled
again without the estimator, so that the result still has its fast memory.

Limits: the estimator simulates the compiled bundles of the whole grid but reads scalars from memory as 0, so trip
counts must follow from the grid's indices by shifts, additions and comparisons (every case here ensures it). A figure
above the chip's peak is an artefact and reported as one. Cycles are those of one core, without contention.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

from benchmarks.command import run_module
from jaxcoder.errors import ConfigError
from jaxcoder.io.atomic import atomic_path


@dataclass(frozen=True, kw_only=True)
class TpuTarget:
    topology: str
    kind: str
    """As JAX names the device."""

    @property
    def cores(self) -> int:
        return self._known.cores

    @property
    def flop_per_cycle(self) -> int:
        """bf16, of one core's matrix units."""
        return round(self._known.peak_flops / self._known.clock / self._known.cores)

    @property
    def _known(self):
        from jaxcoder.train.devices import find_chip  # imports JAX

        return find_chip(self.kind)


DEVICES = {
    "v4": TpuTarget(topology="v4:2x2x1", kind="TPU v4"),
    "v5e": TpuTarget(topology="v5e:2x2", kind="TPU v5 lite"),
    "v5p": TpuTarget(topology="v5p:2x2x1", kind="TPU v5"),
    "v6e": TpuTarget(topology="v6e:2x2", kind="TPU v6 lite"),
    "7x": TpuTarget(topology="tpu7x:2x2x1", kind="TPU7x"),
}

COUNTED_CALL = "counted_call"
"""Name of the kernel in the compiled program."""


def implementation(name: str) -> ModuleType:
    """A module with `trace(case) -> (function, arguments, regex of the Pallas call's name)`."""
    module = {"jaxcoder": "flash_tpu", "splash": "splash", "tokamax": "tokamax", "matmul": "matmul"}[name]
    return importlib.import_module(f"benchmarks.attention.{module}")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape. settings: the implementation's own block sizes and switches.

    kernel `both` (jaxcoder, compiled only): the public function and its gradients, with what XLA adds around them.
    """

    device: str
    implementation: str
    kernel: str
    length: int
    heads: int
    groups: int = 1
    """Key/value heads."""
    head_dim: int = 128
    settings: tuple[tuple[str, int], ...] = ()
    document: int | None = None
    """Tokens of each document, a power of two; None: the sequence is one document."""
    segments: bool = False
    """A mask of segment ids besides the causal one, where that is not the same thing to the kernel."""
    dropout_rate: float = 0.0
    batch: int = 1
    is_estimated: bool = True
    """False: compile only, with the real schedule, which the estimator cannot follow."""

    @property
    def chip(self) -> TpuTarget:
        return DEVICES[self.device]

    def option(self, name: str) -> int:
        return dict(self.settings)[name]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """cycles: None where the estimator gave none. vmem: bytes of fast cache, None where the case does not compile.

    error: what went wrong; with cycles beside it, the compiler stumbled after the estimate was complete.
    """

    cycles: int | None
    vmem: int | None
    seconds: float
    error: str = ""

    @property
    def compiles(self) -> bool:
        return self.vmem is not None


def estimate(case: Case, *, timeout: float = 900.0, cache: "EstimateCache | None" = None) -> Estimate:
    """The estimate of a case, from `cache` if it is there, else from a subprocess of at most `timeout` seconds."""
    if cache is not None and (known := cache.get(case)) is not None:
        return known
    found = _in_a_process(case, timeout)
    if case.is_estimated and not found.compiles:
        bare = _in_a_process(replace(case, is_estimated=False), timeout)
        # The real schedule compiles the same code; only the estimate is missing.
        found = replace(found, vmem=bare.vmem, error=found.error if bare.compiles else bare.error)
    if cache is not None:
        cache.put(case, found)
    return found


class EstimateCache:
    """Estimates in a JSON file, keyed by case, versions and jaxcoder's kernel source, so that sweeps resume."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, dict] = {}
        with contextlib.suppress(FileNotFoundError):
            self.known = json.loads(path.read_text(encoding="utf-8"))

    def get(self, case: Case) -> Estimate | None:
        found = self.known.get(_key(case))
        return Estimate(**found) if found else None

    def put(self, case: Case, found: Estimate) -> None:
        if found.error.startswith("timeout"):  # a busy machine, not a fact about the case
            return
        self.known[_key(case)] = asdict(found)
        with atomic_path(self.path) as new:
            new.write_text(json.dumps(self.known, indent=0) + "\n", encoding="utf-8")


def versions(implementation: str) -> dict[str, str]:
    """Versions of the packages that determine an estimate."""
    packages = ["jax", "libtpu", *(["tokamax"] if implementation == "tokamax" else [])]
    return {name: _version(name) for name in packages}


def of_peak(case: Case, flop: float, cycles: float) -> float:
    """Share of the chip's matrix peak that `flop` in `cycles` comes to; above 1 it is an artefact of the estimator."""
    return flop / cycles / case.chip.flop_per_cycle


def _key(case: Case) -> str:
    import jaxcoder

    source = ""
    if case.implementation == "jaxcoder":
        folder = Path(jaxcoder.__file__).parent / "kernels"
        files = [*folder.glob("attention/*tpu*.py"), folder / "attention/schedule.py", *folder.glob("dropout/*.py")]
        source = hashlib.sha256("".join(_code(file) for file in sorted(files)).encode()).hexdigest()[:12]
    return json.dumps([asdict(case), versions(case.implementation), source], sort_keys=True)


def _code(file: Path) -> str:
    """A file's syntax tree, without comments, layout and docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [x for x in node.body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
    return ast.dump(tree)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


# --- the subprocess --------------------------------------------------------------------------------------------------


def _in_a_process(case: Case, timeout: float) -> Estimate:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}" if case.is_estimated else ""
        done = compile_case(case, flags, timeout)
        profiles = "".join(path.read_text(errors="replace") for path in Path(folder).glob("*.textproto"))
    seconds = time.perf_counter() - start
    if done is None:
        return Estimate(cycles=None, vmem=None, seconds=seconds, error=f"timeout after {timeout:.0f} s")
    answers = [line for line in done.stdout.splitlines() if line.startswith("COMPILED ")]
    vmem = json.loads(answers[0].removeprefix("COMPILED ")) if answers else None
    # The profile is written when the simulation ends, so it is complete even if the compiler fails later.
    # A copy of a table before the kernel is a program of its own and not counted.
    cycles = [int(x) for x in re.findall(rf'"{COUNTED_CALL}[^"]*"\s+estimated_cycles: (\d+)', profiles)]
    error = "" if answers else _reason(done)
    if case.is_estimated and len(cycles) != 1:
        error = error or f"the estimator saw {len(cycles)} programs instead of one"
    return Estimate(cycles=cycles[0] if len(cycles) == 1 else None, vmem=vmem, seconds=seconds, error=error)


def compile_case(case: Case, flags: str, timeout: float) -> subprocess.CompletedProcess | None:
    """A process that compiles a case with flags of libtpu; None where it takes more than `timeout` seconds."""
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    variables |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "LIBTPU_INIT_ARGS": flags}
    try:
        return run_module("benchmarks.attention.cycles", json.dumps(asdict(case)), variables=variables, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None


def _reason(done: subprocess.CompletedProcess) -> str:
    patterns = (
        r"Static LLO profiling of .*? failed: (?:[A-Z_]+: )?([^\n]*)",
        r"\n(?:[\w.]*Error|[\w.]*Exception): ([^\n]*)",
        r"Check failed: ([^\n]*)",
        r"(Ran out of cache in cache space \w+[^\n]*?)(?:\. Exceeded|\n)",
    )
    for pattern in patterns:
        if found := re.findall(pattern, done.stderr):
            return found[-1].strip()[:240]
    return f"the process ended with {done.returncode} (out of memory?)" if done.returncode < 0 else done.stderr[-240:]


def main(text: str) -> None:
    """Compiles a case, given as JSON, and prints the fast cache that its kernel takes, in bytes."""
    fields = json.loads(text)
    case = Case(**(fields | {"settings": tuple((name, value) for name, value in fields["settings"])}))
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=case.chip.topology).devices[0]
    function, arguments, name = implementation(case.implementation).trace(case)
    with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("x",)).abstract_mesh):
        call, shapes = (function, arguments) if case.kernel == "both" else pallas_call(function, arguments, name)
        sharding = SingleDeviceSharding(device)
        shapes = [jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding) for shape in shapes]
        compiled = jax.jit(call).lower(*shapes).compile()
    used = re.findall(
        r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', compiled.as_text()
    )
    print("COMPILED", max(map(int, used), default=0))


def pallas_call(function: Callable, arguments: tuple, name: str) -> tuple[Callable, list]:
    """The one Pallas call in a function's trace whose name matches: a function of its operands, and their shapes.

    arguments: as the function takes them, `jax.ShapeDtypeStruct`s. Raises ConfigError where none or several match.
    """
    import jax

    calls = [e for e in _pallas_calls(jax.make_jaxpr(function)(*arguments).jaxpr) if re.search(name, _name(e))]
    if len(calls) != 1:
        raise ConfigError(f"The trace has {len(calls)} Pallas calls whose name matches {name!r}, and one was expected.")
    (one,) = calls

    def call(*operands):
        return one.primitive.bind(*operands, **one.params)

    call.__name__ = COUNTED_CALL
    return call, [variable.aval for variable in one.invars]


def _name(equation) -> str:
    return str(equation.params.get("name_and_src_info") or equation.params.get("name"))


def _pallas_calls(jaxpr):
    import jax

    def is_jaxpr(x) -> bool:
        return hasattr(x, "eqns") or hasattr(x, "jaxpr")

    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from _pallas_calls(inner if hasattr(inner, "eqns") else inner.jaxpr)


if __name__ == "__main__":
    main(sys.argv[1])
