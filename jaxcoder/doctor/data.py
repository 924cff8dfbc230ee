"""Rules about what a run learns from, and for: held-out languages and corpora, context, FIM, batches."""

import math
from collections.abc import Iterator

import numpy as np

from jaxcoder.doctor.findings import Finding, trace_command
from jaxcoder.formatting import format_count
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.series import Series
from jaxcoder.record.summary import recent

_FEWEST = 200
"""Held-out tokens of a bucket of positions below which its loss says too little."""


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
            size = f" ({format_count(tokens[each].last)} held-out tokens)" if each in tokens else ""
            said = _behind(series, mean)
            if said is not None:
                (risen if said.startswith("rises") else stuck).append(f"{each}{size} {said}")
        for found, how in ((risen, "rise"), (stuck, "stand still")):
            if found:
                yield Finding(
                    rule="languages_behind",
                    severity="warning",
                    what=f"Held-out bits per byte of {len(found)} "
                    f"{name}{'s' if len(found) > 1 and kind == 'lang' else ''} {how} while the mean falls.",
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
    rows = [row for row in rows if _tokens(record, row[0]) >= _FEWEST]
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
            f"see what the windows hold: `jaxcoder data inspect {record.path}` (lengths of documents) and `jaxcoder "
            f"data show {record.path} --step {max(record.last_step, 1)}`",
            "documents are shorter than the window: order files of a repository behind each other, or take shorter "
            "windows" + (", or set data.document_mask off" if masked else ""),
            "if weights came from a shorter context, train on until the new positions are learned",
        ),
    )


def _early(record: RunRecord, rows: list[tuple[str, float, int]]) -> tuple[float, int]:
    """Mean loss of the first sixteenth of the window (at least one bucket), and its last position."""
    ends = [int(name.partition("-")[2] or 0) for name, _, _ in rows]
    first = [number for number, end in enumerate(ends) if number == 0 or (end + 1) * 16 <= ends[-1] + 1]
    weights = [_tokens(record, rows[number][0]) for number in first]
    return float(np.average([rows[number][1] for number in first], weights=weights)), ends[first[-1]]


def _tokens(record: RunRecord, name: str) -> float:
    """Held-out tokens of a bucket of positions; taken as enough where they were not written."""
    sizes = record.columns[f"eval/position/{name}/tokens"].finite()
    return sizes.last if len(sizes) else float(_FEWEST)


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

    Allowed are five deviations of the binomial, and what is counted wrongly: pieces that the window's end cuts lose
    some FIM (a tenth of it), PSM with an empty prefix looks like SPM (0.05; 0.02 for FIM).
    """
    if record.config is None:
        return
    columns, data = record.columns, record.config.data
    shares, pieces = columns["fim_share"].finite(), columns["pieces"].finite()
    spm = columns["fim_spm_share"].finite()
    if not len(pieces):
        pieces = Series(shares.steps, np.ones(len(shares)))  # a batch has one piece at least
    counts, spm_counts = pieces.at(shares.steps), pieces.at(spm.steps) * shares.at(spm.steps)
    wanted = (
        ("FIM", "data.fim_rate", data.fim_rate, shares.values, counts, 0.02),
        ("SPM among FIM", "data.fim_spm_rate", data.fim_spm_rate, spm.values, spm_counts, 0.05),
    )
    for name, field, asked, values, weights, above in wanted:
        hits, total = float(np.nansum(values * weights)), float(np.nansum(weights))
        if total < 20:
            continue
        found, deviation = hits / total, math.sqrt(max(asked * (1 - asked), 1e-9) / total)
        low, high = 0.9 * asked - 5 * deviation, asked + above + 5 * deviation
        if low <= found <= high:
            continue
        yield Finding(
            rule="fim_shares",
            severity="error" if abs(found - asked) > 0.2 else "warning",
            what=f"The share of {name} is off: {found:.1%} of the pieces, and {field} asks for {asked:.1%}.",
            evidence=(
                f"{hits:,.0f} of {total:,.0f} pieces in {len(values):,} batches; {max(low, 0):.1%} to {high:.1%} "
                "would be within chance",
            ),
            try_next=(
                f"see samples as the model does: `jaxcoder data show {record.path} --step {max(record.last_step, 1)}`",
                "the store's documents may hold FIM sentinels of their own, or be a few characters long: `jaxcoder "
                f"data inspect {record.path}`",
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
