"""`jaxcoder train --dry-run`: the size, cost, memory, data and output of a run, before it starts.

Nothing is compiled or written, and the devices of the mesh need not exist.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import replace

import jax
from etils import epath

from jaxcoder.checkpoint.discover import is_checkpoint, steps_in
from jaxcoder.checkpoint.inspect import choose
from jaxcoder.checkpoint.manifest import has_manifest, read_manifest
from jaxcoder.config import MeshConfig, ModelConfig, RunConfig
from jaxcoder.config.mesh import resolve_mesh
from jaxcoder.config.serialize import to_dict
from jaxcoder.config.validate import validate
from jaxcoder.data.open import SYNTHETIC, open_stream, store_paths
from jaxcoder.data.schedule import BatchSchedule
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import JaxcoderError
from jaxcoder.formatting import format_bytes, plural
from jaxcoder.models.flops import num_parameters, training_flops_per_token
from jaxcoder.train.devices import find_chip
from jaxcoder.train.inputs import held_out_stores
from jaxcoder.train.memory_estimate import estimate_memory, saved_bytes, shards_of
from jaxcoder.train.restore import OpenWeights, check_model, open_checkpoint_weights
from jaxcoder.train.run_directory import RunDirectory, changes, unexpected_entries

WIDTH = 112
_INDENT = " " * 14


def dry_run(
    config: RunConfig, *, num_devices: int, cost: str | None = None, open_weights: OpenWeights = open_checkpoint_weights
) -> Iterator[str]:
    """The lines of `jaxcoder train NAME --dry-run`. Raises ConfigError with every problem of an invalid run.

    num_devices: of this machine; the mesh may need more. cost: the cost that the run's docstring states.
    """
    planned = planned_devices(config.mesh, num_devices)
    validate(config, planned)
    config = replace(config, mesh=resolve_mesh(config.mesh, planned))
    yield f"Dry run of {config.name}: nothing is computed or written."
    yield ""
    yield from _configuration(config)
    yield ""
    yield from _work(config, cost)
    yield ""
    yield from _memory(config, planned, num_devices)
    yield ""
    yield from _data(config)
    yield from _initial_weights(config, open_weights)
    yield ""
    yield from _directory(config)


def planned_devices(mesh: MeshConfig, num_devices: int) -> int:
    """Number of devices of the mesh: the product of its axes; if one of them is -1, the devices of this machine, or as
    many as the other axes need."""
    given = mesh.num_devices
    return num_devices if -1 in mesh.sizes.values() and num_devices % given == 0 else given


def num_samples(config: RunConfig) -> int:
    """Number of windows that the run reads."""
    return BatchSchedule.of(config.global_batch_size, config.data).samples_of(config.num_steps)[0]


def _configuration(config: RunConfig) -> Iterator[str]:
    plain = to_dict(config)
    sections = {name: value for name, value in plain.items() if isinstance(value, dict)}
    yield from row("run", _fields({name: value for name, value in plain.items() if name not in sections}))
    for name, section in sections.items():
        yield from row(name, _fields(section))


def _fields(values: dict) -> str:
    return " ".join(f"{name}={value!r}" for name, value in values.items())


def _work(config: RunConfig, cost: str | None) -> Iterator[str]:
    flops = training_flops_per_token(config.model, config.model.max_seq_len)
    samples = num_samples(config)
    tokens = samples * config.model.max_seq_len
    yield from row("parameters", f"{num_parameters(config.model):,}")
    windows = f"{samples:,} windows of {config.model.max_seq_len:,}"
    yield from row("tokens", f"{tokens:,} in {plural(config.num_steps, 'step')}; {windows}")
    yield from row(
        "FLOPs",
        f"{flops:.4g} a token, {flops * tokens:.4g} in all (a multiply-add is 2, attention its causal half, a step 3 "
        "forward passes, recomputation not counted)",
    )
    hours = flops * tokens / 1e14 / 3600
    yield from row("time", f"{hours:,.3g} device hours at 100 TFLOP/s each: scale it to your devices")
    if cost is not None:
        yield from row("cost", f"{cost.rstrip('.')} (of the unchanged configuration)")


def _memory(config: RunConfig, planned: int, num_devices: int) -> Iterator[str]:
    mesh = config.mesh
    yield from row("mesh", f"{mesh}: {plural(planned, 'device')} ({num_devices} here)")
    estimate = estimate_memory(config)
    chip = find_chip(jax.devices()[0].device_kind)
    available = f" of the {format_bytes(chip.memory)} of a {chip.name}" if chip and chip.memory else ""
    yield from row(
        "memory", f"about {format_bytes(estimate.total)}{available} on each device; an estimate, not compiled"
    )
    parts = {
        "weights, fp32": estimate.weights,
        f"optimizer ({config.optimizer.name}), fp32": estimate.optimizer_state,
        "gradients, fp32": estimate.gradients,
        f"saved activations ({config.compute.remat})": estimate.saved_activations,
        "backward pass of a block, or the loss": estimate.working,
        "all-gathered copies": estimate.gathered,
    }
    for name, size in parts.items():
        yield f"{_INDENT}{name:<38}{format_bytes(size):>10}"
    smaller = _smaller_microbatch(config)
    if smaller is not None and estimate.saved_activations > estimate.weights:
        total = format_bytes(estimate_memory(replace(config, microbatch_size=smaller)).total)
        yield from row("", f"with --microbatch-size {smaller}: about {total}")
    if config.compute.remat != "block":
        in_blocks = replace(config, compute=replace(config.compute, remat="block"))
        yield from row("", f"with --compute.remat block: about {format_bytes(estimate_memory(in_blocks).total)}")


def _smaller_microbatch(config: RunConfig) -> int | None:
    """One window per batch shard, if that is smaller than now and divides every batch size."""
    smallest = shards_of(config)("batch")
    sizes = BatchSchedule.of(config.global_batch_size, config.data).batch_sizes
    now = config.microbatch_size or config.global_batch_size
    return smallest if smallest < now and not any(size % smallest for size in sizes) else None


def _data(config: RunConfig) -> Iterator[str]:
    if config.data.store == SYNTHETIC:
        yield from row("data", "synthetic: random tokens, no files")
        return
    try:
        stream = open_stream(config)
    except (JaxcoderError, OSError, ImportError) as error:
        yield from row("data", f"NOT READY: {error}")
    else:
        given = stream.mixture.counts(num_samples(config))
        for path, store, windows, count in zip(store_paths(config), stream.stores, stream.windows, given, strict=True):
            epochs = count / windows.windows_per_epoch
            yield from row("data", f"{path}: {_size(store)}; the run reads {epochs:.3g} epochs of it")
    for name, path in held_out_stores(config.data):
        try:
            size = _size(TokenStore.open(path))
        except (JaxcoderError, OSError, ImportError) as error:
            size = f"NOT READY: {error}"
        yield from row("held out", f"{name}, {path}: {size}")


def _size(store: TokenStore) -> str:
    return f"{store.num_tokens:,} tokens, {plural(store.num_documents, 'document')}"


def _initial_weights(config: RunConfig, open_weights: OpenWeights) -> Iterator[str]:
    if not config.init_from:
        return
    try:
        path, model = _initial_model(config.init_from, open_weights)
        check_model(path, model, config)
        yield from row("init from", f"the weights of {path}, with a new optimizer state")
    except (JaxcoderError, OSError, ImportError) as error:
        yield from row("init from", f"NOT READY: {error}")


def _initial_model(path: str, open_weights: OpenWeights) -> tuple[str, ModelConfig]:
    """The path and architecture of the weights; of a jaxcoder checkpoint only the manifest is read."""
    if is_checkpoint(path):
        directory = choose(path)
        return str(directory), read_manifest(directory).model
    weights = open_weights(path)
    return weights.path, weights.model


def _directory(config: RunConfig) -> Iterator[str]:
    directory, size = RunDirectory.of(config), saved_bytes(config)
    keep = config.checkpoint
    yield from row("writes to", directory.path)
    yield f"{_INDENT}config.json, metrics.jsonl" + (", tensorboard/" if config.tensorboard else "")
    permanent = f", and every {keep.keep_every_steps:,} steps permanently" if keep.keep_every_steps else ""
    saves = f"every {keep.save_every_steps:,} steps" + (
        f" or {keep.save_every_seconds:g} seconds" if keep.save_every_seconds else ""
    )
    yield from row(
        "", f"checkpoints/, {format_bytes(size)} each, {saves}, the last {keep.keep_last} retained{permanent}"
    )
    yield from row("", _directory_status(directory, config))


def _directory_status(directory: RunDirectory, config: RunConfig) -> str:
    path = epath.Path(directory.path)
    try:
        if path.exists() and not path.is_dir():
            return "CANNOT START: that is a file; give another --output-dir"
        others = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        if "config.json" not in others:
            unexpected = unexpected_entries(others)
            if unexpected:
                return f"CANNOT START: it already contains {', '.join(unexpected[:3])}; give another --output-dir"
            return "it is empty: the run starts at step 0"
        changed = changes(directory.read_config(), config)
    except (JaxcoderError, OSError, ImportError) as error:
        return f"NOT READABLE: {error}"
    if changed:
        return (
            f"it contains a run with another configuration: {'; '.join(changed)} (--accept-config-change continues it)"
        )
    checkpoints = epath.Path(directory.checkpoints)
    finished = [step for step in steps_in(checkpoints) if has_manifest(checkpoints / str(step))]
    if not finished:
        return "it contains this run without a checkpoint: the run starts at step 0"
    if finished[-1] >= config.num_steps:
        return f"it contains this run, finished at step {finished[-1]:,}"
    return f"it contains this run, which continues after step {finished[-1]:,}"


def row(title: str, text: str) -> list[str]:
    """A titled paragraph; lines after the first are indented."""
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False)
    wrapper.initial_indent = title.ljust(len(_INDENT))
    return wrapper.wrap(text)
