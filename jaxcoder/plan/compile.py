"""The real training step, compiled for a topology that need not be there, and what the compiler says of it.

The compiler works in a process of its own: libtpu ends the process on what it cannot do, and XLA's options are read
once. The result is cached for the user under the versions, the run, the topology and the compiled code.

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

from jaxcoder.config import CheckpointConfig, DataConfig, EvalConfig, RunConfig
from jaxcoder.config.serialize import from_json, to_dict
from jaxcoder.errors import ConfigError, JaxcoderError, MissingExtraError
from jaxcoder.plan.hlo import Collective
from jaxcoder.plan.topology import Topology
from jaxcoder.runtime import environment_with, user_cache

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # the devices are described, not asked for
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a metadata server that is not there
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process ends at libtpu's lock file
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
_COMPILED = ("config", "kernels", "models", "sharding", "train")
_NOT_COMPILED = "train/plan/"
_READS_THE_PROGRAM = ("plan/compile.py", "plan/hlo.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of one training step on one topology. Bytes and FLOPs are of one device."""

    fits: bool
    lower_seconds: float
    compile_seconds: float
    state_bytes: int
    """Weights and Adam's moments, in their shards."""
    batch_bytes: int
    temporary_bytes: int | None = None
    """Gradients, activations, gathered weights, buffers of transfers. None where it does not fit."""
    output_bytes: int | None = None
    """Results that do not take the place of an argument."""
    code_bytes: int | None = None
    needed_bytes: int | None = None
    """Where it does not fit: what the compiler says it would need, if it says so."""
    limit_bytes: int | None = None
    """Where it does not fit: what the compiler says there is."""
    refusal: str = ""
    matmul_flops: float = 0.0
    """Of all matrix products of a step, recomputation included, attention kernels not."""
    estimated_cycles: float | None = None
    """Of everything but kernels and transfers, in the TPU compiler's own estimate."""
    collectives: tuple[Collective, ...] = ()
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    shardings: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of an array -> its shape and PartitionSpec."""
    options: dict[str, bool | int | str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def peak_bytes(self) -> int | None:
        """None only where it does not fit and the compiler does not say by how much."""
        if not self.fits:
            return self.needed_bytes
        return self.state_bytes + self.batch_bytes + self.temporary_bytes + self.output_bytes + (self.code_bytes or 0)

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
    waiting: Callable[[float], object] = lambda seconds: None,
    time_limit: float | None = None,
) -> Compiled:
    """Compiles the training step of a run whose mesh is resolved, or reads the cached result.

    waiting: called about twice a second with the seconds gone. time_limit: seconds after which it is given up.
    Raises MissingExtraError and ConfigError where the compiler is not installed, JaxcoderError where it gives up.
    """
    check_compiler(topology)
    request = _request(config, topology)
    entry = _entry(request)
    if use_cache and entry.exists():
        return Compiled.from_json(entry.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        asked, answer, log = (Path(folder, name) for name in ("request", "answer", "log"))
        asked.write_text(request, encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(asked), str(answer)]
        code = _run(command, log, waiting, time_limit)
        if not answer.exists():
            raise JaxcoderError(_why(code, log.read_text(encoding="utf-8", errors="replace"), topology, time_limit))
        text = answer.read_text(encoding="utf-8")
    found = Compiled.from_json(text)
    if use_cache:
        try:
            entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = entry.with_suffix(".part")
            part.write_text(text, encoding="utf-8")
            part.replace(entry)
        except OSError:
            pass  # a cache that cannot be written is no reason to lose the answer
    return found


def is_cached(config: RunConfig, topology: Topology) -> bool:
    """Whether `compile_step` would answer at once."""
    return _entry(_request(config, topology)).exists()


def relevant(config: RunConfig) -> RunConfig:
    """The run without what the compiled program does not depend on, so that equal programs are one cache entry."""
    return dataclasses.replace(
        config,
        name="plan", output_dir="", init_from="", tensorboard=False, log_every_steps=1,
        data=DataConfig(store="synthetic", document_mask=config.data.document_mask),
        checkpoint=CheckpointConfig(), eval=EvalConfig(),
    )  # fmt: skip


def check_compiler(topology: Topology) -> None:
    """Raises an error in one sentence where this installation has no compiler for the topology."""
    if topology.platform == "cuda":
        packages, extra, wheels = ("jax_cuda13_plugin", "jax_cuda12_plugin"), "cuda", "XLA for CUDA (no GPU)"
        machines = ("x86_64", "aarch64")
    else:
        packages, extra, wheels, machines = ("libtpu",), "plan", "libtpu", ("x86_64",)
    if any(find_spec(name) for name in packages):
        return
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in machines:
        raise ConfigError(
            f"compiling for {topology.name} needs {wheels}, which has wheels for Linux on {' and '.join(machines)} "
            f"only, and this is {system} on {machine}: "
            "plan on such a machine, or give --no-compile for a model's figures."
        )
    raise MissingExtraError(f"compiling for {topology.name}", extra)


def versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"python": platform.python_version()}


def code_fingerprint() -> str:
    """Of every source file that the compiled program may depend on."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for room in _COMPILED:
        for path in sorted((package / room).rglob("*.py")):
            name = path.relative_to(package).as_posix()
            if not name.startswith(_NOT_COMPILED) or name in _READS_THE_PROGRAM:
                digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _request(config: RunConfig, topology: Topology) -> str:
    described = dataclasses.replace(topology, network_bandwidth=None)  # of no concern to the compiler
    return json.dumps({"config": to_dict(relevant(config)), "topology": dataclasses.asdict(described)})


def _entry(request: str) -> Path:
    parts = request, json.dumps(versions(), sort_keys=True), code_fingerprint()
    return user_cache("plan") / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.json"


def _run(command: list[str], log: Path, waiting: Callable[[float], object], time_limit: float | None) -> int | None:
    """Exit code; None where the time ran out."""
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment_with(_ENVIRONMENT)
        )
        try:
            while process.poll() is None:
                gone = time.monotonic() - start
                if time_limit is not None and gone > time_limit:
                    return None
                waiting(gone)
                time.sleep(0.5 if gone > 2 else 0.1)
            return process.returncode
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _why(code: int | None, log: str, topology: Topology, time_limit: float | None) -> str:
    if code is None:
        return f"compiling for {topology} was given up after {time_limit:.0f} seconds: allow it more with --minutes."
    if code in (-9, 137):
        return f"compiling for {topology} was killed, for want of this machine's memory most likely: 16 GB suffice."
    said = [line.strip() for line in log.splitlines() if re.match(r"[\w.]*(Error|Exception)\b.*:|F\d{4} ", line)]
    return (
        f"the compiler gave up on {topology} (exit code {code}): {said[-1] if said else log.strip()[-300:]!r}. "
        "`--no-compile` gives the model's figures."
    )


# --- in the other process --------------------------------------------------------------------------------------------


def _answer(request: dict) -> Compiled:
    import jax

    topology = Topology(**request["topology"] | {"shape": tuple(request["topology"]["shape"])})
    config = from_json(json.dumps(request["config"]))
    mesh = described_mesh(config, topology)
    start = time.monotonic()
    from jaxcoder.train.step import compiler_options, make_train_step

    state, batch = abstract_arguments(config, mesh)
    device = mesh.devices.flat[0]
    step = make_train_step(config, device)
    options = compiler_options(config, device)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # JAX names the described device `gpu` and would look for one; `cuda` it lowers for without.
        lowered = step.trace(state, batch).lower(lowering_platforms=(topology.platform,))
        lowered_at = time.monotonic()
        common = dict(
            lower_seconds=lowered_at - start,
            state_bytes=_bytes(state),
            batch_bytes=_bytes(batch),
            shardings=_shardings(state),
            options=options,
            versions=versions(),
        )
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed, limit = _exhausted(str(error))
            return Compiled(
                fits=False, compile_seconds=time.monotonic() - lowered_at, needed_bytes=needed, limit_bytes=limit,
                refusal=str(error).splitlines()[0][:400], **common,
            )  # fmt: skip
    return _facts(compiled, dict(mesh.shape), time.monotonic() - lowered_at, common)


def _facts(compiled, mesh: dict[str, int], seconds: float, common: dict) -> Compiled:
    from jaxcoder.plan.hlo import Program

    memory = compiled.memory_analysis()
    program = Program(compiled.as_text())
    return Compiled(
        fits=True,
        compile_seconds=seconds,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        code_bytes=memory.generated_code_size_in_bytes,
        matmul_flops=program.matmul_flops(),
        estimated_cycles=program.estimated_cycles(),
        collectives=tuple(program.collectives(mesh)),
        kernels=program.kernels(),
        **common,
    )


def described_mesh(config: RunConfig, topology: Topology):
    """The run's mesh over devices that are described and not there."""
    from jax.experimental import topologies

    from jaxcoder.sharding.mesh import make_mesh

    if topology.platform == "cuda":
        from jaxcoder.plan.gpu_targets import target_config

        described = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(topology.kind),
            topology="x".join(map(str, (1, *topology.shape))),
        )  # fmt: skip
        return make_mesh(config.mesh, described.devices)
    from jaxcoder.plan.topology import TPUS

    generation = next(g for g in TPUS.values() if g.kind == topology.kind)
    extra: dict = {} if generation.chip_config is None else {"chip_config_name": generation.chip_config}
    if topology.num_slices > 1:
        extra["num_slices"] = topology.num_slices
    sides = "x".join(map(str, topology.shape))
    name = f"{generation.library_name}:{sides}"
    if topology.chips // topology.num_slices < 4:  # else libtpu asks for complete hosts
        extra["chips_per_host_bounds"] = list(topology.shape) + [1] * (3 - len(topology.shape))
    described = topologies.get_topology_desc(platform="tpu", topology_name=name, **extra)
    return make_mesh(config.mesh, described.devices)


def abstract_arguments(config: RunConfig, mesh):
    """(state, batch) of shapes, dtypes and shardings, as `make_train_step` takes them; nothing is allocated."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxcoder.data.loader import Batch
    from jaxcoder.train.inputs import BATCH
    from jaxcoder.train.memory_estimate import abstract_state_on

    def on_mesh(leaf):
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map(on_mesh, abstract_state_on(config.mesh, config))
    rows = NamedSharding(mesh, PartitionSpec(BATCH, None))
    shape = config.global_batch_size, config.model.max_seq_len
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    counts = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    segments = ids if config.data.document_mask else None
    return state, Batch(inputs=ids, targets=ids, loss_mask=counts, positions=ids, segment_ids=segments)


def _bytes(tree) -> int:
    import jax

    from jaxcoder.train.memory_estimate import shard_bytes

    return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _shardings(state) -> dict[str, str]:
    """Of the weights as they are in memory, layers stacked."""
    import jax

    leaves = jax.tree_util.tree_flatten_with_path(state.model)[0]
    return {jax.tree_util.keystr(path): f"{leaf.shape} {tuple(leaf.sharding.spec)}" for path, leaf in leaves}


def _exhausted(message: str) -> tuple[int | None, int | None]:
    """(needed, limit) bytes in the compiler's refusal."""
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
    request, answer = argv
    found = _answer(json.loads(Path(request).read_text(encoding="utf-8")))
    Path(answer).write_text(found.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
