"""Rules about what a run learns: loss, gradients, skipped steps, held-out languages and corpora, the use of context."""

import math
from collections.abc import Iterator

import numpy as np

from jaxcoder.observability.alarms import LossSpike
from jaxcoder.observability.console import readable_count
from jaxcoder.observability.findings import Finding, changed, rate, trace_command
from jaxcoder.observability.run_record import RunRecord
from jaxcoder.observability.series import Series, block_medians
from jaxcoder.observability.summary import ranges, recent

_MOST_TRACED = 3


def loss_does_not_fall(record: RunRecord) -> Iterator[Finding]:
    """After 100 steps the loss is where it was, or it has left its lowest level for good."""
    losses = record.columns["loss"].finite()
    if len(losses) < 100 or record.is_synthetic:
        return
    first = float(np.median(losses.values[:10]))
    levels = block_medians(losses, min(20, len(losses) // 25))
    now, lowest = levels.last, int(levels.values.argmin())
    noise = float(np.median(np.abs(np.diff(losses.values))))
    began_trained = record.config is not None and bool(record.config.init_from)
    evidence = (f"median loss {first:.4f} of the first ten steps, {now:.4f} since step {levels.steps[-1]:,}",)
    if now > 0.98 * first and not (began_trained and now <= first):
        evidence += tuple(_uniform(record, now))
        yield Finding(
            rule="loss_does_not_fall",
            severity="error",
            what="The loss does not fall.",
            evidence=evidence,
            try_next=_lower_rate(record) + (f"look at what is read: `jaxcoder data show {record.path} --step 1`",),
        )
    elif now - levels.values[lowest] > max(0.05 * levels.values[lowest], noise) and lowest < len(levels) - 2:
        yield Finding(
            rule="loss_does_not_fall",
            severity="error",
            what="The loss has fallen and risen again.",
            evidence=(
                f"median loss {levels.values[lowest]:.4f} around step {levels.steps[lowest]:,}, {now:.4f} since step "
                f"{levels.steps[-1]:,}",
            ),
            try_next=_lower_rate(record)
            + (f"go back to a checkpoint before step {levels.steps[lowest]:,} if one was kept",),
        )


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
    if len(norms) < 100:
        return
    levels = block_medians(norms, 20)
    calm = 2 + int(levels.values[2:].argmin())  # the first tenth begins high and falls
    now, least = levels.last, float(levels.values[calm])
    if not (least > 0 and now > 3 * least):
        return
    rising = calm + int(np.argmax(levels.values[calm:] > 1.5 * least))
    limit = record.config.optimizer.max_grad_norm if record.config is not None else None
    evidence = [
        f"median norm {least:.3g} around step {levels.steps[calm]:,}, {now:.3g} since step {levels.steps[-1]:,}"
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
        traced=(),
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
        + (f"steps {ranges(norms.steps[found].tolist())}",),
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
    evidence = [f"steps {ranges(steps)}", f"{in_row:,} in a row at most"]
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


def languages_behind(record: RunRecord) -> Iterator[Finding]:
    """Held-out bits per byte of a language or corpus that rise, or stand still, while the mean falls."""
    mean = record.columns["eval/bits_per_byte"].finite()
    if len(mean) < 3:
        return
    for kind, name in (("lang", "language"), ("corpus", "corpus")):
        tokens = record.columns.matching(f"eval/{kind}/", "/tokens")
        risen, stuck = [], []
        for each, series in record.columns.matching(f"eval/{kind}/", "/bits_per_byte").items():
            series = series.finite()
            if len(series) < 3:
                continue
            size = f" ({readable_count(tokens[each].last)} held-out tokens)" if each in tokens else ""
            said = _behind(series, mean)
            if said is not None:
                (risen if said.startswith("rises") else stuck).append(f"{each}{size} {said}")
        for found, how in ((risen, "rise"), (stuck, "stand still")):
            if found:
                yield Finding(
                    rule="languages_behind",
                    severity="warning",
                    what=f"Held-out bits per byte of {len(found)} "
                    f"{name}{'s' if len(found) > 1 and kind == 'lang' else ''} "
                    f"{how} while the mean falls.",
                    evidence=tuple(found[:12]),
                    try_next=(
                        "give it more weight, or a stage of its own: data.corpora weights and data.stages",
                        "see how much of it is read: `jaxcoder data inspect " + record.path + "`",
                        "with few held-out tokens, hold more out before believing it",
                    ),
                )


def _behind(series: Series, mean: Series) -> str | None:
    best = int(series.values.argmin())
    mean_then, mean_now = mean.between(0, int(series.steps[best])), mean.between(0, int(series.steps[-1]))
    if not len(mean_then) or not len(mean_now):
        return None
    first, last = float(series.values[0]), series.last
    if last > 1.02 * series.values[best] and mean_now.last < mean_then.last:
        return (
            f"rises from {series.values[best]:.4f} (step {series.steps[best]:,}) to {last:.4f}, the mean falls from "
            f"{mean_then.last:.4f} to {mean_now.last:.4f}"
        )
    mean_first = float(mean.at(series.steps[:1])[0])
    fall, mean_fall = 1 - last / max(first, 1e-9), 1 - mean_now.last / max(mean_first, 1e-9)
    if len(series) >= 4 and mean_fall > 0.05 and fall < mean_fall / 4:
        return f"goes from {first:.4f} to {last:.4f} ({fall:.1%} less), the mean falls by {mean_fall:.1%}"
    return None


def held_out_rises(record: RunRecord) -> Iterator[Finding]:
    """Held-out loss that has left its best while the training loss goes on falling: the data is being memorised."""
    held_out, losses = record.columns["eval/loss"].finite(), record.columns["loss"].finite()
    if len(held_out) < 3 or not len(losses):
        return
    best = int(held_out.values.argmin())
    step = int(held_out.steps[best])
    then, now = recent(losses.between(step - 100, step), 1.0), recent(losses, 0.02)
    if then is None or now is None or held_out.last < 1.02 * held_out.values[best] or now > then:
        return
    yield Finding(
        rule="held_out_rises",
        severity="warning",
        what="The held-out loss rises while the training loss falls: the data is being memorised.",
        evidence=(
            f"held-out loss {held_out.values[best]:.4f} at step {step:,}, {held_out.last:.4f} at step "
            f"{held_out.steps[-1]:,}",
            f"training loss {then:.4f} then, {now:.4f} now",
        ),
        try_next=(
            f"take the checkpoint nearest to step {step:,}",
            "train on more data, or fewer steps: data.corpora max_epochs caps how often a corpus is read",
            "raise dropout: model.residual_dropout, model.attention_dropout",
        ),
    )


def context_unused(record: RunRecord) -> Iterator[Finding]:
    """The held-out loss late in a window is no lower than early in it, or rises again towards its end."""
    found = record.columns.matching("eval/position/", "/loss")
    buckets = sorted((int(name.partition("-")[0]), name) for name in found if name.partition("-")[0].isdecimal())
    rows = [(name, found[name].finite()) for _, name in buckets]
    rows = [(name, series.last, int(series.steps[-1])) for name, series in rows if len(series)]
    if len(rows) < 3 or record.is_synthetic or not _has_learned(record):
        return
    values = np.array([value for _, value, _ in rows])
    best, step = int(values.argmin()), rows[-1][2]
    early, until = _early(record, rows)
    evidence = (f"loss by position at step {step:,}: " + ", ".join(f"{name} {value:.4f}" for name, value, _ in rows),)
    masked = record.config is not None and record.config.data.document_mask
    if values[-1] > 1.03 * values[best] and values[best] < 0.99 * early:
        what = f"Positions {rows[-1][0]} are predicted worse than {rows[best][0]}: the window's far end is not learned."
    elif values[-1] >= 0.99 * early:
        what = f"The context is not used: positions {rows[-1][0]} are predicted no better than 0-{until}."
    elif values[len(values) // 2 - 1] <= 1.002 * values[-1]:
        name = rows[len(values) // 2 - 1][0]
        yield Finding(
            rule="context_unused",
            severity="note",
            what=f"Context beyond positions {name} brings nothing so far.",
            evidence=evidence,
            try_next=("compare with shorter windows: `jaxcoder train compare_2k` and `compare_8k`",),
        )
        return
    else:
        return
    yield Finding(
        rule="context_unused",
        severity="warning",
        what=what,
        evidence=evidence,
        try_next=(
            f"see what the windows hold: `jaxcoder data inspect {record.path}` (lengths of documents) and "
            f"`jaxcoder data show {record.path} --step {max(record.last_step, 1)}`",
            "documents are shorter than the window: order files of a repository behind each other, or take shorter "
            "windows" + (", or set data.document_mask off" if masked else ""),
            "if weights came from a shorter context, train on until the new positions are learned",
        ),
    )


def _early(record: RunRecord, rows: list[tuple[str, float, int]]) -> tuple[float, int]:
    """Mean loss of the first sixteenth of the window (at least one bucket), and its last position."""
    ends = [int(name.partition("-")[2] or 0) for name, _, _ in rows]
    first = [number for number, end in enumerate(ends) if number == 0 or (end + 1) * 16 <= ends[-1] + 1]
    sizes = [record.columns[f"eval/position/{rows[number][0]}/tokens"].finite() for number in first]
    weights = [size.last if len(size) and size.last > 0 else 1e-9 for size in sizes]
    return float(np.average([rows[number][1] for number in first], weights=weights)), ends[first[-1]]


def _has_learned(record: RunRecord) -> bool:
    """Far enough that context could be used: the loss has lost a quarter of what it began with."""
    losses = record.columns["loss"].finite()
    now = recent(losses)
    if now is None or len(losses) < 50:
        return False
    trained_before = record.config is not None and bool(record.config.init_from)
    return trained_before or now < 0.75 * float(np.median(losses.values[:10]))


def fim_shares(record: RunRecord) -> Iterator[Finding]:
    """The shares of FIM pieces, and of SPM among them, against what the configuration asks for.

    Pieces of two characters and pieces that the window's end cuts lose some FIM: a tenth less than asked for is
    allowed, and five deviations of the binomial on either side.
    """
    if record.config is None:
        return
    columns, data = record.columns, record.config.data
    shares, pieces = columns["fim_share"].finite(), columns["pieces"].finite()
    counts = pieces.at(shares.steps)
    transformed = np.nansum(shares.values * counts)
    spm = columns["fim_spm_share"].finite()
    spm_counts = pieces.at(spm.steps) * shares.at(spm.steps)
    wanted = (
        ("FIM", "data.fim_rate", data.fim_rate, transformed, np.nansum(counts)),
        (
            "SPM among FIM",
            "data.fim_spm_rate",
            data.fim_spm_rate,
            np.nansum(spm.values * spm_counts),
            np.nansum(spm_counts),
        ),
    )
    for name, field, asked, hits, total in wanted:
        if total < 20:
            continue
        found, deviation = hits / total, math.sqrt(max(asked * (1 - asked), 1e-9) / total)
        slack = 0.1 * asked
        if asked - slack - 5 * deviation <= found <= asked + 0.01 + 5 * deviation:
            continue
        yield Finding(
            rule="fim_shares",
            severity="error" if abs(found - asked) > 0.2 else "warning",
            what=f"The share of {name} is off: {found:.1%} of the pieces, and {field} asks for {asked:.1%}.",
            evidence=(
                f"{hits:,.0f} of {total:,.0f} pieces in {len(shares):,} batches; {asked - slack - 5 * deviation:.1%} "
                "to "
                f"{asked + 0.01 + 5 * deviation:.1%} would be within chance",
            ),
            try_next=(
                f"look at samples as the model sees them: `jaxcoder data show {record.path} --step "
                f"{max(record.last_step, 1)}`",
                "check that the documents of the store hold no FIM sentinels of their own, and that pieces are not a "
                "few "
                "characters long: `jaxcoder data inspect " + record.path + "`",
            ),
        )


def repeated_batches(record: RunRecord) -> Iterator[Finding]:
    """The same batch at two steps, more often than 32-bit fingerprints collide."""
    hashes = record.columns["batch_hash"].finite()
    count = len(hashes)
    if count < 2:
        return
    order = np.argsort(hashes.values, kind="stable")
    same = np.flatnonzero(hashes.values[order][1:] == hashes.values[order][:-1])
    expected = count * count / 2**33
    if len(same) <= 2 + 3 * expected:
        return
    pairs = sorted((int(hashes.steps[order[i]]), int(hashes.steps[order[i + 1]])) for i in same[:200])
    yield Finding(
        rule="repeated_batches",
        severity="error",
        what=f"{len(same):,} batches are those of an earlier step.",
        evidence=tuple(f"step {second:,} read what step {first:,} had read" for first, second in pairs[:5]),
        try_next=(
            f"compare the two: {trace_command(record, pairs[0][0])} and {trace_command(record, pairs[0][1])}",
            "a store smaller than a batch repeats itself: `jaxcoder data inspect " + record.path + "`",
        ),
    )
