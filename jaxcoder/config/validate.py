"""Everything that can be wrong with a run before a device is touched, all of it said at once.

Every problem names the field, its value and the way out. `resolve_mesh` fills in the one mesh axis that may be -1.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Sequence

from jaxcoder.config import fields
from jaxcoder.config.schema import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxcoder.errors import ConfigError
from jaxcoder.formatting import plural

_SMALLEST = 2.0**-126  # smaller numbers of fp32 are flushed to zero by most devices
_MOST_STEPS = 2**31 - 1


def validate(config: RunConfig, num_devices: int) -> None:
    """Raises ConfigError that lists every problem of `config` on `num_devices` devices."""
    problems = fields.type_problems(config)
    if not problems:  # comparing values of a wrong type would only raise
        problems = [*_finite(config), *_sizes(config), *_model(config.model), *_data(config.data)]
        problems += [*_optimizer(config.optimizer, config.num_steps), *_batch(config)]
        mesh_problems = list(_mesh(config.mesh, num_devices))
        problems += mesh_problems
        if not mesh_problems:
            problems += _on_mesh(config, resolve_mesh(config.mesh, num_devices))
    if len(problems) == 1:
        raise ConfigError(f"this run cannot work: {problems[0]}")
    if problems:
        raise ConfigError("this run cannot work:" + "".join(f"\n  - {problem}" for problem in problems))


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """The mesh with its -1 replaced by the number of devices that the other axes leave."""
    problems = list(_mesh(mesh, num_devices))
    if problems:
        raise ConfigError(" ".join(problems))
    sizes = _axes(mesh)
    given = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: num_devices // given if size == -1 else size for axis, size in sizes.items()}
    return dataclasses.replace(mesh, **filled)


def data_problems(data: DataConfig) -> list[str]:
    """Everything wrong with a DataConfig by itself, for those who read data without a run."""
    return [*_finite(data, "data."), *_data(data)]


def _fp32(value: float) -> float:
    """The nearest number that fp32 has: what the devices compute with."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def _finite(config: RunConfig | DataConfig, prefix: str = "") -> Iterator[str]:
    for name, value in fields.leaves(config, prefix):
        if not fields.is_finite(value):
            yield f"{name} is {value}: give a finite number."
        elif isinstance(value, float) and not math.isfinite(_fp32(value)):
            yield f"{name} is {value}, which is infinite in fp32: give a smaller number."


def _sizes(config: RunConfig) -> Iterator[str]:
    """Fields that are counts and cannot be zero or negative; None where the schema allows it."""
    positive = (
        "num_steps", "global_batch_size", "microbatch_size", "log_every_steps",
        "model.num_layers", "model.embed_dim", "model.num_heads", "model.head_dim", "model.mlp_dim",
        "model.num_kv_heads", "model.vocab_size", "model.max_seq_len", "model.layer_norm_epsilon", "model.init_std",
        "compute.loss_chunk_tokens", "mesh.num_slices", "optimizer.decay_steps", "optimizer.epsilon",
        "optimizer.max_grad_norm", "checkpoint.save_every_steps", "checkpoint.save_every_seconds",
        "checkpoint.keep_last", "checkpoint.keep_every_steps", "eval.every_steps", "eval.num_windows",
        "optimizer.max_skipped_steps", "optimizer.skip_grad_norm_above", "watchdog.step_seconds",
        "watchdog.start_seconds",
    )  # fmt: skip
    values = dict(fields.leaves(config))
    for name in positive:
        if values[name] is not None and values[name] <= 0:
            yield f"{name} is {values[name]}: it has to be larger than 0."
    for name in ("model.layer_norm_epsilon", "optimizer.epsilon"):
        if values[name] > 0 and _fp32(values[name]) < _SMALLEST:
            yield f"{name} is {values[name]}, which is nothing in fp32: give {_SMALLEST:.1e} or more."
    if config.num_steps > _MOST_STEPS:
        yield f"num_steps is {config.num_steps}: steps are counted in 32 bits, to {_MOST_STEPS}."
    if config.eval.infill_gaps < 0:
        yield f"eval.infill_gaps is {config.eval.infill_gaps}: it has to be 0 or larger."
    if not 0 <= config.seed < 2**63:
        yield f"seed is {config.seed}: it has to be from 0 to 2**63 - 1."
    if not config.name:
        yield 'name is "": give the run a name; its default output directory is runs/<name>.'


def _model(model: ModelConfig) -> Iterator[str]:
    if model.embed_dim != model.num_heads * model.head_dim:
        yield (
            f"model.embed_dim is {model.embed_dim}, but model.num_heads {model.num_heads} x model.head_dim "
            f"{model.head_dim} is {model.num_heads * model.head_dim}: in this family they are equal."
        )
    if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads {model.num_heads} is not a multiple of model.num_kv_heads {model.num_kv_heads}: "
            "use 1 (multi-query), model.num_heads (multi-head) or a divisor of it."
        )
    for name in ("embed_dropout", "residual_dropout", "attention_dropout"):
        rate = getattr(model, name)
        if not 0 <= rate or not _fp32(rate) < 1:
            yield f"model.{name} is {rate}: a dropout rate is at least 0 and below 1."


def _data(data: DataConfig) -> Iterator[str]:
    for name in ("fim_rate", "fim_spm_rate"):
        rate = getattr(data, name)
        if not 0 <= rate <= 1:
            yield f"data.{name} is {rate}: a share lies between 0 and 1."
    yield from _corpora(data)
    yield from _stages(data)


def _corpora(data: DataConfig) -> Iterator[str]:
    if data.store and data.corpora:
        yield f"data.store is {data.store!r} and data.corpora has {len(data.corpora)} stores: give one or the other."
    for number, corpus in enumerate(data.corpora):
        if not corpus.store:
            yield f'data.corpora.{number}.store is "": give the directory of a token store.'
        if corpus.max_epochs is not None and corpus.max_epochs <= 0:
            yield f"data.corpora.{number}.max_epochs is {corpus.max_epochs}: it has to be larger than 0."
    weights = [corpus.weight for corpus in data.corpora]
    if None in weights and any(weight is not None for weight in weights):
        yield "data.corpora has a weight for some stores and None for others: give one to each, or to none."
    elif None not in weights:
        yield from _weights("data.corpora.{}.weight", weights)


def _stages(data: DataConfig) -> Iterator[str]:
    starts = [stage.from_sample for stage in data.stages]
    if starts and starts[0] != 0:
        yield f"data.stages.0.from_sample is {starts[0]}: the first stage begins at 0."
    for number, (before, start) in enumerate(zip(starts, starts[1:], strict=False), 1):
        if start <= before:
            yield f"data.stages.{number}.from_sample is {start}, but the stage before it begins at {before}: sort them."
    for number, stage in enumerate(data.stages):
        if stage.weights and len(stage.weights) != len(data.corpora):
            yield (
                f"data.stages.{number}.weights has {len(stage.weights)} weights for {len(data.corpora)} data.corpora: "
                "give one for each, or () for their own."
            )
        elif stage.weights:
            yield from _weights(f"data.stages.{number}.weights[{{}}]", stage.weights)
        if stage.global_batch_size is not None and stage.global_batch_size <= 0:
            yield f"data.stages.{number}.global_batch_size is {stage.global_batch_size}: it has to be larger than 0."


def _weights(name: str, weights: Sequence[float]) -> Iterator[str]:
    """Problems of the weights of one mixture; `name` has a place for the number of one."""
    for number, weight in enumerate(weights):
        if weight < 0:
            yield f"{name.format(number)} is {weight}: a weight is 0 or larger."
    if weights and not any(weights):
        yield f"{name.format(f'0 to {len(weights) - 1}')} are all 0: nothing would be read, give one a larger weight."


def batch_sizes(config: RunConfig) -> dict[str, int]:
    """Every global batch size of a run by the name of its field."""
    sizes = {"global_batch_size": config.global_batch_size}
    for number, stage in enumerate(config.data.stages):
        if stage.global_batch_size is not None:
            sizes[f"data.stages.{number}.global_batch_size"] = stage.global_batch_size
    return sizes


def _optimizer(optimizer: OptimizerConfig, num_steps: int) -> Iterator[str]:
    for name in ("peak_learning_rate", "final_learning_rate", "warmup_steps", "weight_decay"):
        value = getattr(optimizer, name)
        if value < 0:
            yield f"optimizer.{name} is {value}: it has to be 0 or larger."
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        if not 0 <= value or not _fp32(value) < 1:
            yield f"optimizer.{name} is {value}: it is at least 0 and below 1."
    if optimizer.final_learning_rate > optimizer.peak_learning_rate:
        yield (
            f"optimizer.final_learning_rate {optimizer.final_learning_rate} is above "
            f"optimizer.peak_learning_rate {optimizer.peak_learning_rate}: the cosine falls, lower the first."
        )
    for name, end in (("optimizer.decay_steps", optimizer.decay_steps), ("num_steps", num_steps)):
        if end is not None and optimizer.warmup_steps > end > 0:
            yield (
                f"optimizer.warmup_steps {optimizer.warmup_steps} is beyond {name} {end}: "
                "the learning rate would never reach its peak, lower the warm-up or raise the other."
            )


def _batch(config: RunConfig) -> Iterator[str]:
    micro = config.microbatch_size
    for name, size in batch_sizes(config).items():
        if micro is not None and micro > 0 and size % micro:
            yield f"microbatch_size {micro} does not divide {name} {size}: use a divisor."


def _axes(mesh: MeshConfig) -> dict[str, int]:
    return {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}


def _mesh(mesh: MeshConfig, num_devices: int) -> Iterator[str]:
    sizes = _axes(mesh)
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            yield f"mesh.{axis} is {size}: use 1 or more, or -1 for all the devices that the other axes leave."
            return
    said = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    free = [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        yield f"{' and '.join(free)} are both -1: at most one mesh axis can take the devices that are left."
    elif free and num_devices % given:
        yield (
            f"the mesh {said} does not fit {plural(num_devices, 'device')}: {num_devices} is not a multiple of "
            f"{given}, the product of the axes other than {free[0]}; change one of them to a divisor."
        )
    elif not free and given != num_devices:
        yield (
            f"the mesh {said} is {plural(given, 'device')}, but there {'is' if num_devices == 1 else 'are'} "
            f"{num_devices:,}: set one axis to -1 to take what is left, or change the sizes."
        )


def _on_mesh(config: RunConfig, mesh: MeshConfig) -> Iterator[str]:
    """Sizes that do not divide; `mesh` is resolved."""
    slices = mesh.num_slices
    if slices is not None and slices > 0 and mesh.data % slices:
        nearest = max(1, round(mesh.data / slices)) * slices
        yield (
            f"mesh.data {mesh.data} is not a multiple of mesh.num_slices {slices}: fsdp and tensor do not cross slices, "
            f"so use {nearest}."
        )
    model, batch_shards = config.model, mesh.data * mesh.fsdp
    split = [
        ("model.num_heads", model.num_heads, "mesh.tensor", mesh.tensor),
        ("model.mlp_dim", model.mlp_dim, "mesh.tensor", mesh.tensor),
        ("model.vocab_size", model.vocab_size, "mesh.tensor", mesh.tensor),
        ("model.max_seq_len", model.max_seq_len, "mesh.tensor", mesh.tensor),
        ("model.embed_dim", model.embed_dim, "mesh.fsdp", mesh.fsdp),
        *((name, size, "mesh.data x mesh.fsdp", batch_shards) for name, size in batch_sizes(config).items()),
    ]
    if model.num_kv_heads not in (1, 0):  # a single one is replicated
        split.append(("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", mesh.tensor))
    if config.microbatch_size is not None:
        split.append(("microbatch_size", config.microbatch_size, "mesh.data x mesh.fsdp", batch_shards))
    for name, size, axis, shards in split:
        if size > 0 and size % shards:
            nearest = max(1, round(size / shards)) * shards
            devices = plural(shards, "device")
            yield f"{name} {size} is not a multiple of {axis} ({devices}): use {nearest}, or another mesh."
