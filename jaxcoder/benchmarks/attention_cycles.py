"""Static cycles of one TPU kernel, from libtpu's own estimator, with no TPU at hand.

A case is traced, its Pallas call is taken out of the trace, and that call alone is compiled for a described chip: what
XLA puts around a kernel (copies, reductions) is not counted, and the estimator aborts on some of it. Every case is a
process of its own, because the estimator ends the process on what it cannot model; the case is then compiled once
more without it, so that the answer still says that it compiles and what fast memory it takes.

When to believe it: the estimator walks the compiled bundles of the whole grid, but reads scalars from memory as 0, so
trip counts must follow from the grid's indices by shifts, additions and comparisons (every case here sees to it); and
a figure above the chip's peak is an artefact, reported as one. Cycles are one core's, without contention.
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

from jaxcoder.errors import ConfigError
from jaxcoder.runtime import environment_with


@dataclass(frozen=True, kw_only=True)
class Chip:
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


CHIPS = {
    "v4": Chip(topology="v4:2x2x1", kind="TPU v4"),
    "v5e": Chip(topology="v5e:2x2", kind="TPU v5 lite"),
    "v5p": Chip(topology="v5p:2x2x1", kind="TPU v5"),
    "v6e": Chip(topology="v6e:2x2", kind="TPU v6 lite"),
    "7x": Chip(topology="tpu7x:2x2x1", kind="TPU7x"),
}

CONTESTANTS = {
    "ours": "jaxcoder.benchmarks.attention_ours",
    "splash": "jaxcoder.benchmarks.attention_splash",
    "tokamax": "jaxcoder.benchmarks.attention_tokamax",
    "matmul": "jaxcoder.benchmarks.attention_matmul",
}
"""Name -> module with `trace(case) -> (function, arguments, regex of the Pallas call's name)`."""


COUNTED_CALL = "counted_call"
"""What the compiled program calls the kernel."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape. settings: the contestant's own block sizes and switches.

    kernel `both` (ours, not walked): the whole public function and its gradients, with what XLA puts around them.
    """

    device: str
    contestant: str
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
    is_walked: bool = True
    """False: compile only, with the real schedule, which the estimator can't follow."""

    @property
    def chip(self) -> Chip:
        return CHIPS[self.device]

    def option(self, name: str) -> int:
        return dict(self.settings)[name]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """cycles: None where the estimator gave none. vmem: bytes of fast memory, None where the case does not compile.

    error: what went wrong; with cycles beside it, the compiler stumbled after the estimate was complete.
    """

    cycles: int | None
    vmem: int | None
    seconds: float
    error: str = ""

    @property
    def compiles(self) -> bool:
        return self.vmem is not None


def estimate(case: Case, *, timeout: float = 900.0, memory: "Memory | None" = None) -> Estimate:
    """The estimate of a case, from `memory` if it is there, else from a process of its own of at most `timeout` s."""
    if memory is not None and (known := memory.get(case)) is not None:
        return known
    found = _in_a_process(case, timeout)
    if case.is_walked and not found.compiles:
        bare = _in_a_process(replace(case, is_walked=False), timeout)
        # The real schedule compiles the same code; what is missing is only the walk.
        found = replace(found, vmem=bare.vmem, error=found.error if bare.compiles else bare.error)
    if memory is not None:
        memory.put(case, found)
    return found


class Memory:
    """Estimates in a JSON file, keyed by case, versions and (of ours) the kernels' source, so that a sweep resumes."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, dict] = {}
        with contextlib.suppress(FileNotFoundError):
            self.known = json.loads(path.read_text(encoding="utf-8"))

    def get(self, case: Case) -> Estimate | None:
        found = self.known.get(_key(case))
        return Estimate(**found) if found else None

    def put(self, case: Case, found: Estimate) -> None:
        if found.error.startswith("not in"):  # a busy machine, not a fact about the case
            return
        self.known[_key(case)] = asdict(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_name(self.path.name + ".new")
        whole.write_text(json.dumps(self.known, indent=0) + "\n", encoding="utf-8")
        whole.replace(self.path)


def versions(contestant: str) -> dict[str, str]:
    """Of what decides an estimate."""
    packages = ["jax", "libtpu", *(["tokamax"] if contestant == "tokamax" else [])]
    return {name: _version(name) for name in packages}


def of_peak(case: Case, flop: float, cycles: float) -> float:
    """Share of the chip's matrix peak that `flop` in `cycles` comes to; above 1 it is an artefact of the estimator."""
    return flop / cycles / case.chip.flop_per_cycle


def _key(case: Case) -> str:
    import jaxcoder

    source = ""
    if case.contestant == "ours":
        folder = Path(jaxcoder.__file__).parent / "kernels"
        files = [*folder.glob("attention/*tpu*.py"), folder / "attention/schedule.py", *folder.glob("dropout/*.py")]
        source = hashlib.sha256("".join(_code(file) for file in sorted(files)).encode()).hexdigest()[:12]
    return json.dumps([asdict(case), versions(case.contestant), source], sort_keys=True)


def _code(file: Path) -> str:
    """What a file says to Python: without comments, layout and docstrings."""
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


# --- the process -----------------------------------------------------------------------------------------------------


def _in_a_process(case: Case, timeout: float) -> Estimate:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_static_llo_profile_to={folder}" if case.is_walked else ""
        done = compile_case(case, flags, timeout)
        profiles = "".join(path.read_text(errors="replace") for path in Path(folder).glob("*.textproto"))
    seconds = time.perf_counter() - start
    if done is None:
        return Estimate(cycles=None, vmem=None, seconds=seconds, error=f"not in {timeout:.0f} s")
    answers = [line for line in done.stdout.splitlines() if line.startswith("COMPILED ")]
    vmem = json.loads(answers[0].removeprefix("COMPILED ")) if answers else None
    # Written once the walk is done: whole even where the compiler stumbles over something later.
    # A copy of a table before it is a program of its own, and not counted.
    cycles = [int(x) for x in re.findall(rf'"{COUNTED_CALL}[^"]*"\s+estimated_cycles: (\d+)', profiles)]
    error = "" if answers else _reason(done)
    if case.is_walked and len(cycles) != 1:
        error = error or f"the estimator saw {len(cycles)} programs where one was due"
    return Estimate(cycles=cycles[0] if len(cycles) == 1 else None, vmem=vmem, seconds=seconds, error=error)


def compile_case(case: Case, flags: str, timeout: float) -> subprocess.CompletedProcess | None:
    """A process that compiles a case with flags of libtpu; None where it takes more than `timeout` seconds."""
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    variables |= {"JAX_ENABLE_COMPILATION_CACHE": "false", "LIBTPU_INIT_ARGS": flags}
    command = [sys.executable, "-m", __name__, json.dumps(asdict(case))]
    environment = environment_with(variables)
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None


def _reason(done: subprocess.CompletedProcess) -> str:
    patterns = (
        r"Static LLO profiling of .*? failed: (?:[A-Z_]+: )?([^\n]*)",
        r"\n(?:[\w.]*Error|[\w.]*Exception): ([^\n]*)",
        r"Check failed: ([^\n]*)",
        r"(Ran out of memory in memory space \w+[^\n]*?)(?:\. Exceeded|\n)",
    )
    for pattern in patterns:
        if found := re.findall(pattern, done.stderr):
            return found[-1].strip()[:240]
    return f"the process ended with {done.returncode} (out of memory?)" if done.returncode < 0 else done.stderr[-240:]


def main(text: str) -> None:
    """Compiles a case, given as JSON, and prints the fast memory that its kernel takes, in bytes."""
    fields = json.loads(text)
    case = Case(**(fields | {"settings": tuple((name, value) for name, value in fields["settings"])}))
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=case.chip.topology).devices[0]
    function, arguments, name = importlib.import_module(CONTESTANTS[case.contestant]).trace(case)
    with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("x",)).abstract_mesh):
        is_whole = case.kernel == "both"
        call, shapes = (function, arguments) if is_whole else pallas_call(function, arguments, name)
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
