"""Fine-tune weights on Python or any other store, and compare every language's held-out loss before and after.

    <dir>/before.json      held-out metrics of the initial weights
    <dir>/checkpoints/     with config.json and metrics.jsonl beside: <dir> is the training run's directory too
    <dir>/retention.json   every language's bits per byte before and after, on the same windows
    <dir>/retention.txt    the same as a table

The schedule is StarCoder's for Python (`configs/finetune.py`), with a fresh optimizer. Every stage writes its result
atomically, so the same command resumes after any interruption.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxcoder.config import Corpus, DataConfig, RunConfig
from jaxcoder.config.load import load_run
from jaxcoder.config.mesh import resolve_mesh
from jaxcoder.config.overrides import apply_overrides
from jaxcoder.config.serialize import fingerprint
from jaxcoder.config.validate import validate
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import ConfigError
from jaxcoder.io.atomic import write_text
from jaxcoder.recipes.pretrain import pretrain
from jaxcoder.recipes.start import open_weights
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
"""The run of configs/ whose schedule a fine-tune takes."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LanguageChange:
    """Bits per byte of a language's held-out text before and after; tokens: how many they were measured on."""

    name: str
    is_trained_on: bool
    tokens: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """Relative: -0.1 is a tenth fewer bits."""
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
    """Evaluates the weights, trains them on, evaluates again; returns and writes the change of each language.

    Args:
        base: a jaxcoder run or checkpoint, or a directory in PyTorch format.
        store: token store of what is trained on. held_out: token stores of held-out documents in several languages.
        num_steps: default the schedule's 8,500. overrides: of the run's config, as `jaxcoder train` takes them.
    Raises JaxcoderError for invalid arguments, before anything is computed; Interrupted as `train` does.
    """
    weights = open_weights(base)
    config = make_config(
        weights, base, store=store, held_out=held_out, output_dir=output_dir, num_steps=num_steps, overrides=overrides
    )
    validate(config, len(jax.devices()))
    trained_on = check_stores(weights, store, held_out)
    root = Path(output_dir)
    is_shared = (root / "before.json").exists()
    RunDirectory.of(config).claim(config, accept_config_change=accept_config_change, is_shared=is_shared)
    with acquire_run_lock(str(root), lock=LOCK):
        before = measured_before(config, weights, root / "before.json")
        result = pretrain(config, accept_config_change=accept_config_change, directory_is_shared=True)
        result.raise_late_stop()
        languages = compare(before, result.eval_metrics, trained_on)
        write_report(root, base, languages, before, result.eval_metrics)
        return languages


def make_config(
    weights: InitialWeights,
    base: str,
    *,
    store: str,
    held_out: Sequence[str],
    output_dir: str,
    num_steps: int | None,
    overrides: Sequence[str],
) -> RunConfig:
    """The fine-tune's schedule around the architecture and the dropout of the weights.

    The held-out stores have weight 0 in the mixture: they are read for evaluation only.
    """
    if not held_out:
        raise ConfigError("there is no held-out store: give `--held-out STORE`, once or for each of several.")
    schedule = load_run(SCHEDULE)
    steps = schedule.num_steps if num_steps is None else num_steps
    if steps < 1:
        raise ConfigError(f"--steps is {steps}: give 1 or more.")
    evaluated = tuple(Corpus(store=path, weight=0.0, eval_store=path) for path in held_out)
    warmup = min(schedule.optimizer.warmup_steps, steps // 10)
    is_cpu = jax.devices()[0].platform == "cpu"
    config = dataclasses.replace(
        schedule,
        name="finetune",
        model=weights.model,
        num_steps=steps,
        output_dir=output_dir,
        init_from=base,
        data=DataConfig(corpora=(Corpus(store=store, weight=1.0), *evaluated)),
        optimizer=dataclasses.replace(schedule.optimizer, warmup_steps=warmup),
        compute=dataclasses.replace(schedule.compute, dtype="float32" if is_cpu else schedule.compute.dtype),
    )
    return apply_overrides(config, overrides, prog="jaxcoder finetune")


def check_stores(weights: InitialWeights, store: str, held_out: Sequence[str]) -> set[str]:
    """The languages in `store`. Raises JaxcoderError unless all stores are there, in the tokenizer of the weights."""
    import pyarrow.compute as pc

    opened = [TokenStore.open(path) for path in (store, *held_out)]
    for one in opened:
        check_tokenizer(weights.path, weights.tokenizer, one.tokenizer())
    return set(pc.unique(opened[0].documents["lang"]).to_pylist())


def measured_before(config: RunConfig, weights: InitialWeights, path: Path) -> dict[str, float]:
    """Held-out metrics of the initial weights, read from `path` if it exists."""
    settings = {"init_from": config.init_from, "windows": config.eval.num_windows, "model": fingerprint(config.model)}
    settings["stores"] = [corpus.eval_store for corpus in config.data.corpora if corpus.eval_store]
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return found["metrics"]
    mesh = make_mesh(resolve_mesh(config.mesh, len(jax.devices())))
    with jax.set_mesh(mesh):
        _, streams, _ = open_streams(config)
        model = weights.load(jax.eval_shape(lambda: initial_state(config)).model)
        metrics = HeldOut(config, streams, mesh)(model)
    logger.info(f"Before: {metrics['eval/bits_per_byte']:.4f} bits per byte of all held-out text.")
    write_text(path, json.dumps({"settings": settings, "metrics": metrics}, indent=1) + "\n")
    return metrics


def compare(before: dict[str, float], after: dict[str, float], trained_on: set[str]) -> list[LanguageChange]:
    """Every language of both, what was trained on first, then by what it lost."""
    bits_before, bits_after = languages_of(before), languages_of(after)
    languages = [
        LanguageChange(
            name=name,
            is_trained_on=name in trained_on,
            tokens=int(before[f"{LANGUAGE_PREFIX}{name}/tokens"]),
            before=bits,
            after=bits_after[name],
        )
        for name, bits in bits_before.items()
        if bits > 0
    ]
    return sorted(languages, key=lambda language: (not language.is_trained_on, -language.change))


def table(languages: Sequence[LanguageChange]) -> list[str]:
    """The report's lines: bits per byte before and after, side by side."""
    width = max(len("language"), *(len(language.name) + 1 for language in languages))
    lines = [f"{'language':<{width}}  {'tokens':>12}  {'before':>8}  {'after':>8}  {'change':>8}"]
    for language in languages:
        name = language.name + "*" * language.is_trained_on
        lines.append(
            f"{name:<{width}}  {language.tokens:>12,}  {language.before:>8.4f}  {language.after:>8.4f}  "
            f"{language.change:>+8.1%}"
        )
    lines.append("Bits per byte of the same held-out windows; fewer is better. * trained on.")
    others = [language for language in languages if not language.is_trained_on]
    if others:
        worst = max(others, key=lambda language: language.change)
        lost = sum(language.change > 0 for language in others)
        lines.append(
            f"Of {len(others)} other language{'s' * (len(others) > 1)}, {lost} became worse; "
            f"the one that changed for the worst is {worst.name}, by {worst.change:+.1%}."
        )
    return lines


def write_report(root: Path, base: str, languages: Sequence[LanguageChange], before: dict, after: dict) -> None:
    """retention.json and retention.txt, the table of `table`."""
    report = {
        "base": base,
        "languages": [dataclasses.asdict(language) | {"change": language.change} for language in languages],
        "before": before,
        "after": after,
    }
    write_text(root / "retention.json", json.dumps(report, indent=1) + "\n")
    write_text(root / "retention.txt", "\n".join(table(languages)) + "\n")
