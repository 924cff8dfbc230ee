"""The initial state of a run: its latest checkpoint, other weights (`init_from`), or random ones.

Weights of `init_from` are opened and compared with the run before anything is computed. Only the weights are used:
optimizer, step, data and schedule start from zero. jaxcoder checkpoints are opened here; for other formats `train`
takes an opener (`jaxcoder/recipes/initial_weights.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from etils import epath
from jax.sharding import Mesh

from jaxcoder.checkpoint import arrays as array_files
from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.checkpoint.discover import is_checkpoint, open_checkpoint, steps_in
from jaxcoder.checkpoint.manifest import TOKENIZER
from jaxcoder.checkpoint.names import check_arrays, flatten_tree, unflatten_tree
from jaxcoder.config import ModelConfig, RunConfig
from jaxcoder.errors import CheckpointError
from jaxcoder.models.protocol import Model
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.train.state import TrainState, abstract_state, flatten_state, initial_state, state_of, unflatten_state

ARCHITECTURE = (
    "num_layers", "embed_dim", "num_heads", "head_dim", "mlp_dim", "num_kv_heads", "vocab_size", "max_seq_len",
    "activation", "layer_norm_epsilon",
)  # fmt: skip
"""Fields of ModelConfig that weights depend on: all but dropout and the initial standard deviation."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights on disk, opened but not yet read."""

    path: str
    model: ModelConfig
    tokenizer: Tokenizer | None
    """Saved with the weights."""
    load: Callable[[Model], Model]
    """Loads the weights in the shapes, dtypes and shardings of an abstract model, whose mesh is in scope."""


OpenWeights = Callable[[str], InitialWeights]


def open_checkpoint_weights(path: str) -> InitialWeights:
    """The latest complete checkpoint of the run, or the single checkpoint, at `path`. Raises CheckpointError."""
    if not is_checkpoint(path):
        problem = "holds no checkpoint of jaxcoder" if epath.Path(path).exists() else "does not exist"
        raise CheckpointError(
            f"init_from is `{path}`, which {problem}: give a run's directory or one of its checkpoints; weights in "
            "PyTorch format become one with `jaxcoder convert from-hf`."
        )
    directory, manifest = open_checkpoint(path)

    def load(abstract: Model) -> Model:
        saved = {name: info for name, info in manifest.arrays.items() if name.startswith("params/")}
        targets = flatten_tree(abstract, "params/")
        check_arrays(targets, saved, f"the checkpoint {directory}")
        return unflatten_tree(abstract, array_files.load(directory, targets), "params/")

    return InitialWeights(path=str(directory), model=manifest.model, tokenizer=saved_tokenizer(directory), load=load)


def initial_weights(
    config: RunConfig, tokenizer: Tokenizer | None, checkpoints: str, open_weights: OpenWeights
) -> InitialWeights | None:
    """The weights of `config.init_from`; None if it is empty or the run already has checkpoints.

    tokenizer: of the run's data, None if synthetic. Raises CheckpointError that names every field that differs.
    """
    if not config.init_from or steps_in(checkpoints):
        return None
    weights = open_weights(config.init_from)
    check_model(weights.path, weights.model, config)
    check_tokenizer(weights.path, weights.tokenizer, tokenizer)
    return weights


def check_model(path: str, model: ModelConfig, config: RunConfig) -> None:
    """Raises CheckpointError unless the run's model has the architecture `model` of the weights at `path`."""
    given, wanted = ({name: getattr(m, name) for name in ARCHITECTURE} for m in (model, config.model))
    different = [name for name in ARCHITECTURE if given[name] != wanted[name]]
    if different:
        fields = "; ".join(f"model.{name} is {wanted[name]}, of the weights {given[name]}" for name in different)
        options = " ".join(f"--model.{name.replace('_', '-')} {given[name]}" for name in different)
        raise CheckpointError(
            f"the run cannot be initialized from `{path}`, whose model differs: {fields}. "
            f"Give other weights, or `{options}`."
        )


def check_tokenizer(path: str, saved: Tokenizer | None, used: Tokenizer | None) -> None:
    """Raises CheckpointError unless the run's data was encoded with the ids that the weights at `path` were trained on.

    saved: of the weights. used: of the run's data. None: no tokenizer (synthetic data, weights alone).
    """
    if saved is None or used is None or saved.fingerprint == used.fingerprint or _ids(saved) == _ids(used):
        return
    raise CheckpointError(
        f"the weights of `{path}` were trained with another tokenizer (fingerprint {saved.fingerprint[:12]}, "
        f"{saved.vocab_size} ids) than the run's token store was built with ({used.fingerprint[:12]}, "
        f"{used.vocab_size} ids): build the store again with the tokenizer in the directory of the weights "
        "(`jaxcoder data build --tokenizer`), or give other weights."
    )


def saved_tokenizer(directory: epath.PathLike) -> Tokenizer | None:
    """The tokenizer that was saved with a checkpoint."""
    path = epath.Path(directory) / TOKENIZER
    return Tokenizer.load(str(path)) if (path / "tokenizer.json").exists() else None


def initialize_from(config: RunConfig, weights: InitialWeights) -> TrainState:
    """The state of step 0 with these weights and a new optimizer state. Call with the run's mesh in scope."""
    model = weights.load(jax.eval_shape(lambda: initial_state(config)).model)
    return jax.jit(lambda model: state_of(model, config), donate_argnums=0)(model)


def restore_or_initialize(
    config: RunConfig,
    mesh: Mesh,
    checkpointer: Checkpointer,
    weights: InitialWeights | None,
    tokenizer: Tokenizer | None,
) -> tuple[TrainState, int, int]:
    """(state, step, samples) from the latest complete checkpoint, on this mesh whatever mesh wrote it; else from
    `weights`; else random."""
    step = checkpointer.latest_step()
    if step is None and weights is not None:
        return initialize_from(config, weights), 0, 0
    if step is None and config.init_from:
        raise CheckpointError(
            f"no checkpoint in `{checkpointer.directory}` is complete: delete that directory to start again from the "
            f"weights of `{config.init_from}`."
        )
    if step is None:
        return jax.jit(lambda: initial_state(config))(), 0, 0
    saved = checkpointer.directory / str(step)
    check_tokenizer(str(saved), saved_tokenizer(saved), tokenizer)
    abstract = abstract_state(config, mesh)
    samples = checkpointer.manifest(step).metadata["samples"]
    return unflatten_state(abstract, checkpointer.restore(step, flatten_state(abstract))), step, samples


def _ids(tokenizer: Tokenizer) -> list[tuple[bool, bytes] | None]:
    """The bytes of every id: two different files may define the same tokenizer."""
    used = tokenizer.valid_ids(tokenizer.vocab_size)
    return [
        (tokenizer.is_special(id_), tokenizer.decode_bytes([id_])) if is_used else None
        for id_, is_used in enumerate(used)
    ]
