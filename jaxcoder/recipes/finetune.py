"""Fine-tune weights and compare held-out bits per byte of every language before and after.

    <dir>/before.json      held-out metrics of the initial weights
    <dir>/checkpoints/     <dir> is also the training run's directory, with config.json and metrics.jsonl
    <dir>/retention.json   bits per byte of every language before and after, on the same windows
    <dir>/retention.txt    the same as a table

The schedule is StarCoder's for Python (`configs/finetune.py`), with a new optimizer state. Each stage writes its result
atomically, so the same command resumes after an interruption.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from jaxcoder.config import Corpus, DataConfig, ModelConfig, RunConfig
from jaxcoder.config.load import load_run
from jaxcoder.config.mesh import resolve_mesh
from jaxcoder.config.overrides import apply_overrides
from jaxcoder.config.serialize import fingerprint
from jaxcoder.config.validate import validate
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import ConfigError
from jaxcoder.io.atomic import write_text
from jaxcoder.recipes.initial_weights import open_weights
from jaxcoder.recipes.pretrain import pretrain
from jaxcoder.record.alarms import LANGUAGE_PREFIX, languages_of
from jaxcoder.runtime import acquire_run_lock
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.train.evaluate import HeldOut
from jaxcoder.train.inputs import open_streams
from jaxcoder.train.restore import InitialWeights, check_tokenizer
from jaxcoder.train.run_directory import RunDirectory
from jaxcoder.train.state import initial_state

LOCK = ".finetune.lock"
SCHEDULE = "starcoder"
"""The run in configs/ whose schedule is used."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LanguageChange:
    """Held-out bits per byte of a language before and after, and the number of tokens evaluated."""

    name: str
    is_trained_on: bool
    tokens: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """Relative change: -0.1 is 10 % fewer bits."""
        return self.after / self.before - 1


def finetune(
    base: str,
    *,
    store: str,
    held_out: Sequence[str],
    output_dir: str,
    num_steps: int | None = None,
    overrides: Sequence[str] = (),
    accept_config_change: bool = False,
) -> list[LanguageChange]:
    """Evaluates the weights, fine-tunes them, evaluates again; writes and returns the change of every language.

    Args:
        base: a run, a checkpoint, or a directory in Hugging Face format.
        store: token store to train on. held_out: token stores of held-out documents in one or more languages.
        num_steps: default the schedule's 8,500. overrides: of the run's config, as in `jaxcoder train`.
    Raises JaxcoderError for invalid arguments, before anything is computed; Interrupted as `train` does.
    """
    if not held_out:
        raise ConfigError("there is no held-out store: give `--held-out STORE` one or more times.")
    weights = open_weights(base)
    evaluated = (Corpus(store=path, weight=0.0, eval_store=path) for path in held_out)  # weight 0: never trained on
    config = replace(
        finetune_config(weights.model, num_steps),
        output_dir=output_dir,
        init_from=base,
        data=DataConfig(corpora=(Corpus(store=store, weight=1.0), *evaluated)),
    )
    config = apply_overrides(config, overrides, prog="jaxcoder finetune")
    validate(config, len(jax.devices()))
    stores = [TokenStore.open(path) for path in (store, *held_out)]
    for opened in stores:
        check_tokenizer(weights.path, weights.tokenizer, opened.tokenizer())
    trained_on = set(stores[0].documents["lang"].unique().to_pylist())
    root = Path(output_dir)
    is_shared = (root / "before.json").exists()
    RunDirectory.of(config).claim(config, accept_config_change=accept_config_change, is_shared=is_shared)
    with acquire_run_lock(str(root), lock=LOCK):
        before = evaluate_base(config, weights, root / "before.json")
        result = pretrain(config, accept_config_change=accept_config_change, directory_is_shared=True)
        result.raise_late_stop()
        languages = compare(before, result.eval_metrics, trained_on)
        report = {
            "base": base,
            "languages": [dataclasses.asdict(language) | {"change": language.change} for language in languages],
            "before": before,
            "after": result.eval_metrics,
        }
        write_text(root / "retention.json", json.dumps(report, indent=1) + "\n")
        write_text(root / "retention.txt", "\n".join(table(languages)) + "\n")
        return languages


def finetune_config(model: ModelConfig, num_steps: int | None) -> RunConfig:
    """The schedule for `model`, in fp32 on CPUs. The warm-up is at most a tenth of the steps."""
    schedule = load_run(SCHEDULE)
    steps = schedule.num_steps if num_steps is None else num_steps
    if steps < 1:
        raise ConfigError(f"--steps is {steps}: give 1 or more.")
    dtype = "float32" if jax.devices()[0].platform == "cpu" else schedule.compute.dtype
    warmup = min(schedule.optimizer.warmup_steps, steps // 10)
    return replace(
        schedule,
        name="finetune",
        model=model,
        num_steps=steps,
        optimizer=replace(schedule.optimizer, warmup_steps=warmup),
        compute=replace(schedule.compute, dtype=dtype),
    )


def evaluate_base(config: RunConfig, weights: InitialWeights, path: Path) -> dict[str, float]:
    """Held-out metrics of the initial weights, cached in `path` for the same weights, windows and stores."""
    settings = {
        "init_from": config.init_from,
        "windows": config.eval.num_windows,
        "model": fingerprint(config.model),
        "stores": [corpus.eval_store for corpus in config.data.corpora if corpus.eval_store],
    }
    if path.exists():
        saved = json.loads(path.read_text())
        if saved["settings"] == settings:
            return saved["metrics"]
    mesh = make_mesh(resolve_mesh(config.mesh, len(jax.devices())))
    with jax.set_mesh(mesh):
        _, streams, _ = open_streams(config)
        model = weights.load(jax.eval_shape(lambda: initial_state(config)).model)
        metrics = HeldOut(config, streams, mesh)(model)
    logger.info(f"Before: {metrics['eval/bits_per_byte']:.4f} bits per byte of all held-out text.")
    write_text(path, json.dumps({"settings": settings, "metrics": metrics}, indent=1) + "\n")
    return metrics


def compare(before: dict[str, float], after: dict[str, float], trained_on: set[str]) -> list[LanguageChange]:
    """The change of every evaluated language: those trained on first, then by decreasing change."""
    bits_after = languages_of(after)
    languages = [
        LanguageChange(
            name=name,
            is_trained_on=name in trained_on,
            tokens=int(before[f"{LANGUAGE_PREFIX}{name}/tokens"]),
            before=bits,
            after=bits_after[name],
        )
        for name, bits in languages_of(before).items()
        if bits > 0
    ]
    return sorted(languages, key=lambda language: (not language.is_trained_on, -language.change))


def table(languages: Sequence[LanguageChange]) -> list[str]:
    """The lines of retention.txt."""
    width = max(len("language"), *(len(language.name) + 1 for language in languages))
    lines = [f"{'language':<{width}}  {'tokens':>12}  {'before':>8}  {'after':>8}  {'change':>8}"]
    for one in languages:
        name = one.name + "*" * one.is_trained_on
        lines.append(f"{name:<{width}}  {one.tokens:>12,}  {one.before:>8.4f}  {one.after:>8.4f}  {one.change:>+8.1%}")
    lines.append("Bits per byte of the same held-out windows; lower is better. * trained on.")
    if others := [language for language in languages if not language.is_trained_on]:
        worst = max(others, key=lambda language: language.change)
        lost = sum(language.change > 0 for language in others)
        lines.append(
            f"{lost} of {len(others)} other languages got worse; largest change: {worst.name}, {worst.change:+.1%}."
        )
    return lines
