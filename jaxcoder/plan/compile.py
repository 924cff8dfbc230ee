"""The training step compiled for a topology that need not be attached, and the compiler's figures.

The compiler runs in a process of its own, because libtpu aborts the process on what it cannot compile and XLA reads its
options once. Results are cached per user, keyed by the run, the topology, the package versions and the code.

    python -m jaxcoder.plan.compile REQUEST ANSWER        (files; the process that `compile_step` starts)
"""

import contextlib
import dataclasses
import hashlib
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcoder.config import CheckpointConfig, DataConfig, EvalConfig, RunConfig
from jaxcoder.config.serialize import from_json, to_dict
from jaxcoder.errors import ConfigError, JaxcoderError, MissingExtraError
from jaxcoder.plan.hlo import Collective, Program
from jaxcoder.plan.topology import TPUS, Topology
from jaxcoder.runtime import environment_with, user_cache

if TYPE_CHECKING:
    import jax

    from jaxcoder.data.loader import Batch
    from jaxcoder.train.state import TrainState

COMPILER = (sys.executable, "-m", "jaxcoder.plan.compile")
"""The command of the compiler's process."""
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the devices are described, not attached
    "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a second process ends at libtpu's lock file
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
# Source files that a result depends on.
_SOURCES = (
    "config/**/*.py", "kernels/**/*.py", "models/**/*.py", "sharding/**/*.py", "train/**/*.py", "plan/compile.py",
    "plan/hlo.py",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiler's figures for one training step on one topology. Bytes and FLOPs are per device."""

    fits: bool
    lower_seconds: float
    compile_seconds: float
    state_bytes: int
    """Shards of the weights and the optimizer state."""
    batch_bytes: int
    temporary_bytes: int | None = None
    """Gradients, activations, gathered weights, buffers of transfers. None if it does not fit."""
    output_bytes: int | None = None
    """Results that do not reuse the memory of an argument."""
    code_bytes: int | None = None
    needed_bytes: int | None = None
    """If it does not fit: the memory that the compiler asks for, if it reports it."""
    limit_bytes: int | None = None
    """If it does not fit: the available memory that the compiler reports."""
    refusal: str = ""
    matmul_flops: float = 0.0
    """Of all matmuls of a step, recomputation included, without attention kernels."""
    estimated_cycles: float | None = None
    """The TPU compiler's estimate, without kernels and transfers."""
    collectives: tuple[Collective, ...] = ()
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    shardings: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of an array -> its shape and PartitionSpec."""
    options: dict[str, bool | int | str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def peak_bytes(self) -> int | None:
        """None only if it does not fit and the compiler does not report the memory it needs."""
        if not self.fits:
            return self.needed_bytes
        program = (self.temporary_bytes or 0) + (self.output_bytes or 0) + (self.code_bytes or 0)
        return self.state_bytes + self.batch_bytes + program

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Compiled":
        plain = json.loads(text)
        collectives = (Collective(**c | {"axes": tuple(c["axes"])}) for c in plain.pop("collectives"))
        return cls(**plain, collectives=tuple(collectives))


def compile_step(
    config: RunConfig,
    topology: Topology,
    *,
    use_cache: bool = True,
    on_wait: Callable[[float], object] = lambda seconds: None,
    time_limit: float | None = None,
) -> Compiled:
    """Compiles the training step of a run whose mesh is resolved, or reads the cached result.

    on_wait: called about twice a second with the elapsed seconds. time_limit: seconds, then JaxcoderError.
    MissingExtraError or ConfigError if the compiler is not installed, JaxcoderError if it fails.
    """
    check_compiler(topology)
    request = _request(config, topology)
    entry = _entry(request)
    if use_cache and entry.exists():
        return Compiled.from_json(entry.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        request_file, answer, log = (Path(folder, name) for name in ("request", "answer", "log"))
        request_file.write_text(request, encoding="utf-8")
        code = _run([*COMPILER, str(request_file), str(answer)], log, on_wait, time_limit)
        if not answer.exists():
            raise JaxcoderError(_failure(code, log.read_text(encoding="utf-8", errors="replace"), topology, time_limit))
        text = answer.read_text(encoding="utf-8")
    if use_cache:
        with contextlib.suppress(OSError):  # the result is valid without a cache
            entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = entry.with_suffix(".part")
            part.write_text(text, encoding="utf-8")
            part.replace(entry)
    return Compiled.from_json(text)


def is_cached(config: RunConfig, topology: Topology) -> bool:
    return _entry(_request(config, topology)).exists()


def check_compiler(topology: Topology) -> None:
    """MissingExtraError or ConfigError if this installation has no compiler for the topology."""
    if topology.platform == "cuda":
        packages: tuple[str, ...] = ("jax_cuda13_plugin", "jax_cuda12_plugin")
        extra, wheels, machines = "cuda", "XLA for CUDA (no GPU)", ["x86_64", "aarch64"]
    else:
        packages, extra, wheels, machines = ("libtpu",), "plan", "libtpu", ["x86_64"]
    if any(find_spec(name) for name in packages):
        return
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in machines:
        raise ConfigError(
            f"compiling for {topology.name} needs {wheels}, which has wheels for Linux on {' and '.join(machines)} "
            f"only, and this is {system} on {machine}: "
            "plan on such a machine, or use --no-compile for modelled figures."
        )
    raise MissingExtraError(f"compiling for {topology.name}", extra)


def versions() -> dict[str, str]:
    """Package -> version of what the compiled program depends on."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"python": platform.python_version()}


def _request(config: RunConfig, topology: Topology) -> str:
    """JSON of what the compiled program depends on; runs that differ elsewhere share a cache entry."""
    config = dataclasses.replace(
        config,
        name="plan", output_dir="", init_from="", tensorboard=False, log_every_steps=1,
        data=DataConfig(store="synthetic", document_mask=config.data.document_mask),
        checkpoint=CheckpointConfig(), eval=EvalConfig(),
    )  # fmt: skip
    topology = dataclasses.replace(topology, network_bandwidth=None)
    return json.dumps({"config": to_dict(config), "topology": dataclasses.asdict(topology)})


def _entry(request: str) -> Path:
    """The cache file of a request."""
    package = Path(__file__).parents[1]
    code = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in package.glob(pattern)):
        code.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    key = "\0".join((request, json.dumps(versions(), sort_keys=True), code.hexdigest()))
    return user_cache("plan") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _run(command: list[str], log: Path, on_wait: Callable[[float], object], time_limit: float | None) -> int | None:
    """The exit code; None at the time limit. Kills the process if it is interrupted."""
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment_with(_ENVIRONMENT)
        )
        try:
            while process.poll() is None:
                elapsed = time.monotonic() - start
                if time_limit is not None and elapsed > time_limit:
                    return None
                on_wait(elapsed)
                time.sleep(0.5 if elapsed > 2 else 0.1)
            return process.returncode
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _failure(code: int | None, log: str, topology: Topology, time_limit: float | None) -> str:
    if code is None:
        return f"compiling for {topology} exceeded {time_limit:.0f} seconds: raise the limit with --minutes."
    if code in (-9, 137):
        return f"compiling for {topology} was killed, probably out of host memory: use a machine with 16 GB."
    errors = [line.strip() for line in log.splitlines() if re.match(r"[\w.]*(Error|Exception)\b.*:|F\d{4} ", line)]
    return (
        f"compiling for {topology} failed (exit code {code}): {errors[-1] if errors else log.strip()[-300:]!r}. "
        "`--no-compile` gives modelled figures."
    )


# --- in the compiler's process ---------------------------------------------------------------------------------------


def _compile(config: RunConfig, topology: Topology) -> Compiled:
    import jax

    from jaxcoder.train.step import compiler_options, make_train_step

    mesh = _described_mesh(config, topology)
    start = time.monotonic()
    state, batch = _abstract_arguments(config, mesh)
    device = mesh.devices.flat[0]
    step: Any = make_train_step(config, device)
    options = compiler_options(config, device)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # The platform of a described GPU is `gpu`, for which JAX wants an attached device; `cuda` lowers without one.
        lowered = step.trace(state, batch).lower(lowering_platforms=(topology.platform,))
        lowered_at = time.monotonic()
        # Weights in memory, with layers stacked.
        weights = jax.tree_util.tree_flatten_with_path(state.model)[0]
        known: dict[str, Any] = dict(
            lower_seconds=lowered_at - start,
            state_bytes=_bytes(state),
            batch_bytes=_bytes(batch),
            shardings={
                jax.tree_util.keystr(path): f"{leaf.shape} {tuple(leaf.sharding.spec)}" for path, leaf in weights
            },
            options=options,
            versions=versions(),
        )
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed, limit = _memory_in_error(str(error))
            return Compiled(
                fits=False, compile_seconds=time.monotonic() - lowered_at, needed_bytes=needed, limit_bytes=limit,
                refusal=str(error).splitlines()[0][:400], **known,
            )  # fmt: skip
    compile_seconds = time.monotonic() - lowered_at
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    return Compiled(
        fits=True,
        compile_seconds=compile_seconds,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        code_bytes=memory.generated_code_size_in_bytes,
        matmul_flops=program.matmul_flops(),
        estimated_cycles=program.estimated_cycles(),
        collectives=tuple(program.collectives(dict(mesh.shape))),
        kernels=program.kernels(),
        **known,
    )


def _described_mesh(config: RunConfig, topology: Topology) -> "jax.sharding.Mesh":
    """The run's mesh over devices that are described and not attached."""
    from jax.experimental import topologies

    from jaxcoder.plan.gpu_targets import target_config
    from jaxcoder.sharding.mesh import make_mesh

    shape = "x".join(map(str, topology.shape))
    if topology.platform == "cuda":
        described = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(topology.kind), topology=f"1x{shape}"
        )
        return make_mesh(config.mesh, described.devices)
    generation = next(g for g in TPUS.values() if g.kind == topology.kind)
    options: dict[str, Any] = {}
    if generation.chip_config is not None:
        options["chip_config_name"] = generation.chip_config
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.chips // topology.num_slices < 4:  # less than a host, which libtpu assumes by default
        options["chips_per_host_bounds"] = list(topology.shape) + [1] * (3 - len(topology.shape))
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{generation.library_name}:{shape}", **options
    )
    return make_mesh(config.mesh, described.devices)


def _abstract_arguments(config: RunConfig, mesh: "jax.sharding.Mesh") -> "tuple[TrainState, Batch]":
    """(state, batch) for `make_train_step` as shapes, dtypes and shardings; nothing is allocated."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxcoder.data.loader import Batch
    from jaxcoder.train.inputs import BATCH
    from jaxcoder.train.memory_estimate import abstract_state_on

    def on_mesh(leaf):
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def rows(dtype) -> Any:
        shape = config.global_batch_size, config.model.max_seq_len
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH, None)))

    state = jax.tree.map(on_mesh, abstract_state_on(config.mesh, config))
    ids = rows(jnp.int32)
    segments = ids if config.data.document_mask else None
    batch = Batch(inputs=ids, targets=ids, loss_mask=rows(jnp.float32), positions=ids, segment_ids=segments)
    return state, batch


def _bytes(tree: Any) -> int:
    """Of one device's shards."""
    import jax

    from jaxcoder.train.memory_estimate import shard_bytes

    return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _memory_in_error(message: str) -> tuple[int | None, int | None]:
    """(needed, available) bytes in a RESOURCE_EXHAUSTED error of the compiler."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern in (
        r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
        r"([\d.]+)([KMGT])i?B?\b.*? exceeds.*?([\d.]+)([KMGT])i?B?\b",
    ):
        if found := re.search(pattern, message, re.DOTALL):
            return int(float(found[1]) * units[found[2]]), int(float(found[3]) * units[found[4]])
    return None, None


def main(argv: list[str]) -> None:
    request_file, answer = map(Path, argv)
    request = json.loads(request_file.read_text(encoding="utf-8"))
    topology = Topology(**request["topology"] | {"shape": tuple(request["topology"]["shape"])})
    compiled = _compile(from_json(json.dumps(request["config"])), topology)
    answer.write_text(compiled.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
