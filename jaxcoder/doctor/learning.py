"""Rules about how a run learns: loss, gradients, skipped steps."""

import math
from collections.abc import Iterator

import numpy as np

from jaxcoder.doctor.findings import Finding, changed, rate, trace_command
from jaxcoder.record.alarms import LossSpike
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.series import block_medians
from jaxcoder.record.summary import ranges, recent

_MOST_TRACED = 3


def loss_does_not_fall(record: RunRecord) -> Iterator[Finding]:
    """After 50 steps the loss is where it was, was far above that, has left its lowest level, or stands still."""
    losses = record.columns["loss"].finite()
    if len(losses) < 50:
        return
    levels = block_medians(losses, min(20, len(losses) // 25))
    now, lowest, highest = levels.last, int(levels.values.argmin()), int(levels.values.argmax())
    first, low, since = float(np.median(losses.values[:10])), float(levels.values[lowest]), levels.steps[-1]
    began = min(first, float(losses.values[0]))
    noise = float(np.median(np.abs(np.diff(losses.values))))
    before = len(levels) * 2 // 5
    began_trained = record.config is not None and bool(record.config.init_from)
    said = [f"median loss {first:.4f} of the first ten steps, {now:.4f} since step {since:,}"]
    advice = _lower_rate(record)
    if now > 0.98 * began and not (began_trained and now <= began) and not record.is_synthetic:
        what, severity = "The loss does not fall.", "error"
        said += _uniform(record, now)
        advice += (f"look at what is read: `jaxcoder data show {record.path} --step 1`",)
    elif levels.values[highest] > 1.1 * _untrained(record, began):
        what, severity = "The loss was far above where it began.", "warning" if now < began else "error"
        said += [
            f"it began at {losses.values[0]:.4f}, and was {levels.values[highest]:.4f} around step "
            f"{levels.steps[highest]:,}"
        ]
    elif record.is_synthetic:
        return
    elif now - low > max(0.05 * low, noise) and lowest < len(levels) - 2:
        what, severity = "The loss has fallen and risen again.", "error"
        said = [f"median loss {low:.4f} around step {levels.steps[lowest]:,}, {now:.4f} since step {since:,}"]
        advice += (f"go back to a checkpoint before step {levels.steps[lowest]:,} if one was kept",)
    elif len(levels) >= 8 and now > 0.995 * levels.values[before] and now > 0.5 * began:
        what, severity = f"The loss has stood still since about step {levels.steps[before]:,}.", "warning"
        said = [
            f"median loss {levels.values[before]:.4f} there, {now:.4f} since step {since:,}; it began at {began:.4f}"
        ]
    else:
        return
    yield Finding(rule="loss_does_not_fall", severity=severity, what=what, evidence=tuple(said), try_next=advice)


def _untrained(record: RunRecord, began: float) -> float:
    """The loss of a model that knows nothing, or what the run began with where that is more."""
    return began if record.config is None else max(began, math.log(record.config.model.vocab_size))


def _uniform(record: RunRecord, loss: float) -> Iterator[str]:
    if record.config is not None and abs(loss - math.log(record.config.model.vocab_size)) < 0.3:
        yield f"that is what guessing evenly among {record.config.model.vocab_size:,} ids gives"


def _lower_rate(record: RunRecord) -> tuple[str, ...]:
    if record.config is None:
        return ("lower optimizer.peak_learning_rate to a third",)
    peak = record.config.optimizer.peak_learning_rate
    return (
        f"lower the learning rate to a third of {rate(peak)}: "
        + changed(record, f"--optimizer.peak-learning-rate {rate(peak / 3)}"),
    )


def loss_spikes(record: RunRecord) -> Iterator[Finding]:
    """Steps whose loss jumps far out of those before; whether it came back within 100 steps."""
    losses, rule = record.columns["loss"].finite(), LossSpike()
    found = [
        (step, value)
        for step, value in zip(losses.steps.tolist(), losses.values.tolist(), strict=True)
        if rule(step, {"loss": value}) is not None
    ]
    if not found:
        return
    groups = [found[0]]  # the first step of each spike
    for step, value in found[1:]:
        if step > groups[-1][0] + 100:
            groups.append((step, value))
    evidence, stayed = [], 0
    for step, value in groups:
        before = recent(losses.between(step - 100, step - 1), 1.0)
        after = recent(losses.between(step + 100, step + 200), 1.0)
        if before is not None and after is not None:
            stayed += after > 1.05 * before
            evidence.append(f"step {step:,}: {before:.4f} before, {value:.4f}, and {after:.4f} a hundred steps later")
        else:
            evidence.append(f"step {step:,}: {value:.4f}" + ("" if before is None else f", {before:.4f} before"))
    worst = sorted(groups, key=lambda pair: -pair[1])[:_MOST_TRACED]
    first = groups[0][0]
    yield Finding(
        rule="loss_spikes",
        severity="warning" if stayed or len(groups) > 2 else "note",
        what=f"The loss jumps {_times(len(groups))}"
        + (f", and {_times(stayed)} it did not come back." if stayed else "."),
        evidence=tuple(evidence[:8]),
        traced=tuple(sorted(step for step, _ in worst)),
        try_next=(f"see whether the files of the batch are to blame: {trace_command(record, first)}",)
        + _lower_rate(record)
        + ("if it did not come back: go back to a checkpoint before it, with a lower rate or without those files",)
        * bool(stayed),
    )


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def gradients_rise(record: RunRecord) -> Iterator[Finding]:
    """The gradient norms of the last twentieth of the run are three times what they once were."""
    norms = record.columns["grad_norm"].finite()
    if len(norms) < 60:
        return
    levels = block_medians(norms, min(20, len(norms) // 8))
    begin = max(len(levels) // 10, 1)  # norms begin high and fall
    calm = begin + int(levels.values[begin:].argmin())
    now, least = levels.last, float(levels.values[calm])
    if not (least > 0 and now > 3 * least):
        return
    recent_norms = norms.between(int(levels.steps[-1]), 2**62)
    highest = int(recent_norms.steps[int(recent_norms.values.argmax())])
    rising = calm + int(np.argmax(levels.values[calm:] > 1.5 * least))
    limit = record.config.optimizer.max_grad_norm if record.config is not None else None
    evidence = [
        f"median norm {least:.3g} around step {levels.steps[calm]:,}, {now:.3g} since step {levels.steps[-1]:,}",
        f"the greatest of the last: {recent_norms.values.max():.3g} at step {highest:,}",
    ]
    if limit:
        share = float((norms.values[-len(norms) // 20 :] > limit).mean())
        evidence.append(f"{share:.0%} of the last steps are clipped to {limit:g}")
    yield Finding(
        rule="gradients_rise",
        severity="warning",
        what=f"Gradient norms rise: they are {now / least:.1f} times what they were, since about step "
        f"{levels.steps[rising]:,}.",
        evidence=tuple(evidence),
        traced=(highest,),
        try_next=_lower_rate(record) + (f"from a checkpoint before step {levels.steps[rising]:,} if one was kept",),
    )


def gradient_spikes(record: RunRecord) -> Iterator[Finding]:
    """Single norms above ten times the median of the hundred or so steps around them."""
    norms = record.columns["grad_norm"].finite()
    if len(norms) < 40:
        return
    blocks = max(len(norms) // 100, 2)
    places = np.minimum(np.arange(len(norms)) * blocks // len(norms), blocks - 1)
    usual = block_medians(norms, blocks).values[places]
    with np.errstate(over="ignore"):
        ratio = np.where(norms.steps > 20, norms.values / np.maximum(usual, 1e-9), 0.0)
    found = np.flatnonzero(ratio > 10)
    if not len(found):
        return
    worst = found[np.argsort(-ratio[found], kind="stable")][:5]
    yield Finding(
        rule="gradient_spikes",
        severity="warning" if len(found) > 2 else "note",
        what=f"Gradient norms jump: {len(found):,} of {len(norms):,} steps are above ten times the median around them.",
        evidence=tuple(f"step {norms.steps[i]:,}: {norms.values[i]:.3g}, median {usual[i]:.3g}" for i in worst)
        + (f"in all: step {ranges(norms.steps[found].tolist())}",),
        traced=tuple(sorted(norms.steps[worst[:_MOST_TRACED]].tolist())),
        try_next=(
            f"look at the files of the worst: {trace_command(record, int(norms.steps[worst[0]]))}",
            "skip such steps: "
            + changed(record, f"--optimizer.skip-grad-norm-above {_rounded_up(10 * usual.max()):g}"),
        )
        + _lower_rate(record),
    )


def _rounded_up(value: float) -> float:
    """To one digit."""
    size = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return math.ceil(value / size) * size


def skipped_steps(record: RunRecord) -> Iterator[Finding]:
    """Steps that were not taken, and losses or norms that are no numbers."""
    columns = record.columns
    skipped, losses, norms = columns["skipped"], columns["loss"], columns["grad_norm"]
    steps = set(skipped.steps[skipped.values > 0].tolist())
    bad_loss = losses.steps[~np.isfinite(losses.values)].tolist()
    bad_norm = norms.steps[~np.isfinite(norms.values)].tolist()
    steps = sorted(steps | set(bad_loss) | set(bad_norm))
    if not steps:
        return
    total = max(len(losses), 1)
    in_row = _longest_row(steps)
    ended = record.reason == "error" and "not finite" in record.goodput.attempts[-1].message
    severity = "error" if ended or in_row > 5 or len(steps) > 0.01 * total else "warning"
    if len(steps) == 1 and total > 1000:
        severity = "note"
    evidence = [f"step {ranges(steps)}", f"{in_row:,} in a row at most"]
    evidence += [f"the loss was not finite in {len(bad_loss):,}, the gradient norm in {len(bad_norm):,}"]
    yield Finding(
        rule="skipped_steps",
        severity=severity,
        what=f"{len(steps):,} of {total:,} steps were not usable and were skipped"
        + (", and the run ended over it." if ended else "."),
        evidence=tuple(evidence),
        traced=tuple(steps[:_MOST_TRACED]),
        try_next=(f"look at the files of the first: {trace_command(record, steps[0])}",)
        + _lower_rate(record)
        + ("if the same files are in all of them, leave them out of the store",),
    )


def _longest_row(steps: list[int]) -> int:
    longest = row = 1
    for before, step in zip(steps[:-1], steps[1:], strict=True):
        row = row + 1 if step == before + 1 else 1
        longest = max(longest, row)
    return longest
