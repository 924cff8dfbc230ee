"""Rules about learning: loss, gradient norms, skipped steps."""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from jaxcoder.doctor.findings import MARGIN, Finding, Severity, changed, lower_rate, trace_command
from jaxcoder.formatting import format_ranges, plural
from jaxcoder.record.alarms import GROWN_NORM, SINGLE_NORM, LossSpike
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.series import block_medians

# Thresholds.
MIN_STEPS = 50  # two medians of 25 steps, each with a fifth of the scatter of a single step
FAR_ABOVE = 1.1  # relative to the initial loss, which is within 1 % of ln(vocabulary)
PLATEAU = 0.005  # fall over the last 3/5 of a run; 3 % for 1B parameters and 300B tokens (source: MARGIN)
HALF = 0.5  # of the first loss: below it a slow fall is normal; measured: the quickstart, 1,800 steps, ends at 0.48
REWIND = 100  # steps around a spike: PaLM restarted about 100 steps before one (Chowdhery et al. 2022, 2204.02311, 5.1)
MANY_SKIPPED = 0.01  # share of steps: twenty times FEW_SKIPPED
FEW_SKIPPED = 1 / 2000  # share that dynamic loss scaling skips by design (torch.amp.GradScaler, growth_interval)
_MOST_TRACED = 3


def loss_does_not_fall(record: RunRecord) -> Iterator[Finding]:
    """The loss has not fallen, was far above its initial value, has left its minimum, or has stopped falling."""
    losses = record.columns["loss"].finite()
    if len(losses) < MIN_STEPS:
        return
    levels = block_medians(losses, min(20, len(losses) // 25))
    values, steps = levels.values, levels.steps
    now, lowest, highest, middle = levels.last, int(values.argmin()), int(values.argmax()), len(levels) * 2 // 5
    first, low = float(np.median(losses.values[:10])), float(values[lowest])
    initial = min(first, float(losses.values[0]))
    uniform = math.log(record.config.model.vocab_size) if record.config is not None else initial
    noise = float(np.median(np.abs(np.diff(losses.values))))
    is_pretrained = record.config is not None and bool(record.config.init_from)
    severity: Severity
    evidence = [f"median loss {first:.4f} of the first ten steps, {now:.4f} since step {steps[-1]:,}"]
    advice = [lower_rate(record)]
    if now > (1 - MARGIN) * initial and not (is_pretrained and now <= initial) and not record.is_synthetic:
        what, severity = "The loss does not fall.", "error"
        if record.config is not None and abs(now / uniform - 1) < MARGIN:
            evidence.append(f"a uniform distribution over {record.config.model.vocab_size:,} ids has {uniform:.4f}")
        advice.append(f"inspect the data: `jaxcoder data show {record.path} --step 1`")
    elif values[highest] > FAR_ABOVE * max(initial, uniform):
        what, severity = "The loss was far above its initial value.", "warning" if now < initial else "error"
        evidence.append(
            f"it was {losses.values[0]:.4f} at first, and {values[highest]:.4f} around step {steps[highest]:,}"
        )
    elif record.is_synthetic:
        return
    elif now - low > max(MARGIN * low, noise) and lowest < len(levels) - 2:
        what, severity = "The loss has fallen and risen again.", "error"
        evidence = [f"median loss {low:.4f} around step {steps[lowest]:,}, {now:.4f} since step {steps[-1]:,}"]
        advice.append(f"restart from a checkpoint before step {steps[lowest]:,} if there is one")
    elif len(levels) >= 8 and now > (1 - PLATEAU) * values[middle] and now > HALF * initial:
        what, severity = f"The loss has not fallen since about step {steps[middle]:,}.", "warning"
        evidence = [
            f"median loss {values[middle]:.4f} there, {now:.4f} since step {steps[-1]:,}; {initial:.4f} at first"
        ]
    else:
        return
    yield Finding(severity, what, evidence=tuple(evidence), try_next=tuple(advice))


def loss_spikes(record: RunRecord) -> Iterator[Finding]:
    """Loss spikes (the alarm `loss_spike`); a warning if the loss is still higher after REWIND steps."""
    losses, alarm = record.columns["loss"].finite(), LossSpike()
    spikes: list[tuple[int, float]] = []  # the first step of each
    for step, loss in zip(losses.steps.tolist(), losses.values.tolist(), strict=True):
        if alarm(step, {"loss": loss}) is not None and (not spikes or step > spikes[-1][0] + REWIND):
            spikes.append((step, loss))
    if not spikes:
        return
    evidence, stayed = [], 0
    for step, loss in spikes:
        before = losses.between(step - REWIND, step - 1).recent(1.0)
        after = losses.between(step + REWIND, step + 2 * REWIND).recent(1.0)
        line = f"step {step:,}: {loss:.4f}"
        if before is not None:
            line += f", {before:.4f} before"
        if after is not None:
            line += f", {after:.4f} after {REWIND} steps"
        if before is not None and after is not None:
            stayed += after > (1 + MARGIN) * before
        evidence.append(line)
    worst = sorted(spikes, key=lambda spike: -spike[1])[:_MOST_TRACED]
    advice = [f"see whether the files of the batch are the cause: {trace_command(record, spikes[0][0])}"]
    advice.append(lower_rate(record))
    if stayed:
        advice.append("restart from a checkpoint before it, with a lower rate or without those files")
    yield Finding(
        "warning" if stayed else "note",
        f"The loss has {plural(len(spikes), 'spike')}" + (f"; after {stayed:,} it stayed higher." if stayed else "."),
        evidence=tuple(evidence[:8]),
        traced=tuple(sorted(step for step, _ in worst)),
        try_next=tuple(advice),
    )


def gradients_rise(record: RunRecord) -> Iterator[Finding]:
    """The gradient norms of the last twentieth of the run are GROWN_NORM times their minimum."""
    norms = record.columns["grad_norm"].finite()
    if len(norms) < MIN_STEPS:
        return
    levels = block_medians(norms, min(20, len(norms) // 8))
    values, steps = levels.values, levels.steps
    start = max(len(levels) // 10, 1)  # the first norms are high
    calm = start + int(values[start:].argmin())
    now, least = levels.last, float(values[calm])
    if not (least > 0 and now > GROWN_NORM * least):
        return
    last = norms.between(int(steps[-1]), 2**62)
    highest = int(last.values.argmax())
    rising = calm + int(np.argmax(values[calm:] > math.sqrt(GROWN_NORM) * least))
    evidence = [
        f"median norm {least:.3g} around step {steps[calm]:,}, {now:.3g} since step {steps[-1]:,}",
        f"the greatest of the last: {last.values[highest]:.3g} at step {last.steps[highest]:,}",
    ]
    if record.config is not None and (limit := record.config.optimizer.max_grad_norm):
        evidence.append(f"{(last.values > limit).mean():.0%} of the last steps are clipped to {limit:g}")
    yield Finding(
        "warning",
        f"Gradient norms have grown {now / least:.1f} times since about step {steps[rising]:,}.",
        evidence=tuple(evidence),
        traced=(int(last.steps[highest]),),
        try_next=(lower_rate(record), f"start from a checkpoint before step {steps[rising]:,} if there is one"),
    )


def gradient_spikes(record: RunRecord) -> Iterator[Finding]:
    """Single norms above SINGLE_NORM times the median of the hundred or so steps around them."""
    norms = record.columns["grad_norm"].finite()
    if len(norms) < MIN_STEPS:
        return
    num_blocks = max(len(norms) // 100, 2)
    block_of = np.minimum(np.arange(len(norms)) * num_blocks // len(norms), num_blocks - 1)
    usual = block_medians(norms, num_blocks).values[block_of]
    with np.errstate(over="ignore"):
        ratio = np.where(norms.steps > 20, norms.values / np.maximum(usual, 1e-9), 0.0)  # the first norms are high
    spikes = np.flatnonzero(ratio > SINGLE_NORM)
    if not len(spikes):
        return
    worst = spikes[np.argsort(-ratio[spikes], kind="stable")][:5]
    limit = float(f"{SINGLE_NORM * usual.max():.0e}")
    yield Finding(
        "warning",
        f"Gradient norms jump: {len(spikes):,} of {len(norms):,} steps are above {SINGLE_NORM:g} times the median "
        "around them.",
        evidence=(
            *(f"step {norms.steps[at]:,}: {norms.values[at]:.3g}, median {usual[at]:.3g}" for at in worst),
            f"in all: step {format_ranges(norms.steps[spikes].tolist())}",
        ),
        traced=tuple(sorted(norms.steps[worst[:_MOST_TRACED]].tolist())),
        try_next=(
            f"inspect the files of the worst: {trace_command(record, int(norms.steps[worst[0]]))}",
            f"skip such steps: {changed(record, f'--optimizer.skip-grad-norm-above {limit:g}')}",
            lower_rate(record),
        ),
    )


def skipped_steps(record: RunRecord) -> Iterator[Finding]:
    """Steps whose update was skipped, and losses or norms that are not finite."""
    losses, norms = record.columns["loss"], record.columns["grad_norm"]
    bad_losses = losses.steps[~np.isfinite(losses.values)].tolist()
    bad_norms = norms.steps[~np.isfinite(norms.values)].tolist()
    steps = sorted({*record.skipped_steps, *bad_losses, *bad_norms})
    if not steps:
        return
    total = max(len(losses), 1)
    severity: Severity
    has_ended = record.reason == "error" and "not finite" in record.goodput.attempts[-1].message
    if has_ended or len(steps) > MANY_SKIPPED * total:
        severity = "error"
    else:
        severity = "note" if len(steps) < FEW_SKIPPED * total else "warning"
    # Consecutive steps have the same difference from their index.
    rows = (len(list(row)) for _, row in itertools.groupby(enumerate(steps), key=lambda entry: entry[1] - entry[0]))
    yield Finding(
        severity,
        f"{len(steps):,} of {total:,} steps were not finite or above the limit, and were skipped"
        + (", which ended the run." if has_ended else "."),
        evidence=(
            f"step {format_ranges(steps)}",
            f"at most {max(rows):,} in a row",
            f"the loss was not finite in {len(bad_losses):,}, the gradient norm in {len(bad_norms):,}",
        ),
        traced=tuple(steps[:_MOST_TRACED]),
        try_next=(
            f"inspect the files of the first: {trace_command(record, steps[0])}",
            lower_rate(record),
            "if all of them contain the same files, leave these out of the store",
        ),
    )
