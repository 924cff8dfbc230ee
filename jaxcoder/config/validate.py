"""Validation of a run before a device is used. All problems are reported at once.

Each problem names the field, its value and the way out. Constraints on one field are in its metadata (schema.py,
fields.py); this module has the constraints between fields, and
mesh.py those of the mesh.
"""

from collections.abc import Iterator

from jaxcoder.config import fields, mesh
from jaxcoder.config.schema import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxcoder.errors import ConfigError


def validate(config: RunConfig, num_devices: int) -> None:
    """Raises ConfigError that lists every problem of `config` on `num_devices` devices."""
    problems = fields.type_problems(config)
    if not problems:  # the other checks compare values
        problems = [*fields.value_problems(config), *_model(config.model), *_data(config.data)]
        problems += [*_optimizer(config.optimizer, config.num_steps), *_batch(config)]
        mesh_problems = list(mesh.size_problems(config.mesh, num_devices))
        if not mesh_problems:
            rules = mesh.DimRules.for_heads(config.model.num_kv_heads)
            mesh_problems = list(mesh.shard_problems(config, mesh.resolve_mesh(config.mesh, num_devices), rules))
        problems += mesh_problems
    if problems:
        separator = " " if len(problems) == 1 else "\n  - "
        raise ConfigError("the run configuration is invalid:" + "".join(separator + problem for problem in problems))


def data_problems(data: DataConfig) -> list[str]:
    """The problems of a DataConfig without a run."""
    return [*fields.value_problems(data, "data."), *_data(data)]


def batch_sizes(config: RunConfig) -> dict[str, int]:
    """Every global batch size of a run by the name of its field."""
    sizes = {"global_batch_size": config.global_batch_size}
    for number, stage in enumerate(config.data.stages):
        if stage.global_batch_size is not None:
            sizes[f"data.stages.{number}.global_batch_size"] = stage.global_batch_size
    return sizes


def _model(model: ModelConfig) -> Iterator[str]:
    if model.embed_dim != model.num_heads * model.head_dim:
        yield (
            f"model.embed_dim is {model.embed_dim}, but must equal model.num_heads {model.num_heads} x model.head_dim "
            f"{model.head_dim} = {model.num_heads * model.head_dim}."
        )
    if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads {model.num_heads} is not a multiple of model.num_kv_heads {model.num_kv_heads}: "
            "use 1 (multi-query), model.num_heads (multi-head) or a divisor of it."
        )


def _data(data: DataConfig) -> Iterator[str]:
    if data.store and data.corpora:
        yield f"data.store is {data.store!r} and data.corpora has {len(data.corpora)} stores: give one or the other."
    weights = [corpus.weight for corpus in data.corpora if corpus.weight is not None]
    if weights and len(weights) < len(data.corpora):
        yield "data.corpora has a weight for some stores and None for others: give one to each, or to none."
    elif weights and not any(weights):
        yield _all_zero("data.corpora")
    for number, stage in enumerate(data.stages):
        start, before = stage.from_sample, data.stages[number - 1].from_sample
        if number == 0 and start != 0:
            yield f"data.stages.0.from_sample is {start}, but the first stage must begin at 0."
        if number > 0 and start <= before:
            yield (
                f"data.stages.{number}.from_sample is {start}, but the stage before it begins at {before}: "
                "sort the stages."
            )
        if stage.weights and len(stage.weights) != len(data.corpora):
            yield (
                f"data.stages.{number}.weights has {len(stage.weights)} weights for {len(data.corpora)} data.corpora: "
                "give one for each, or () for those of the corpora."
            )
        elif stage.weights and not any(stage.weights):
            yield _all_zero(f"data.stages.{number}")


def _all_zero(name: str) -> str:
    return f"the weights of {name} are all 0, so nothing would be read: give a corpus a larger weight."


def _optimizer(optimizer: OptimizerConfig, num_steps: int) -> Iterator[str]:
    if optimizer.final_learning_rate > optimizer.peak_learning_rate:
        yield (
            f"optimizer.final_learning_rate {optimizer.final_learning_rate} is above "
            f"optimizer.peak_learning_rate {optimizer.peak_learning_rate}: lower it."
        )
    for name, end in (("optimizer.decay_steps", optimizer.decay_steps), ("num_steps", num_steps)):
        if end is not None and optimizer.warmup_steps > end > 0:
            yield (
                f"optimizer.warmup_steps {optimizer.warmup_steps} is larger than {name} {end}: "
                "the learning rate would never reach its peak; lower the warm-up or raise the other."
            )


def _batch(config: RunConfig) -> Iterator[str]:
    micro = config.microbatch_size
    for name, size in batch_sizes(config).items():
        if micro is not None and micro > 0 and size % micro:
            yield f"microbatch_size {micro} does not divide {name} {size}: use a divisor."
