"""Rules about data: held-out languages and corpora, memorization, use of the context, FIM shares, repeated batches."""

import math
from collections.abc import Iterator

import numpy as np

from jaxcoder.doctor.findings import MARGIN, Finding, trace_command
from jaxcoder.formatting import format_count
from jaxcoder.record.run_record import RunRecord
from jaxcoder.record.series import Series, position_losses

# Thresholds.
MIN_EVALUATIONS = 3  # the third confirms a direction
MIN_BUCKET_TOKENS = 2500  # standard error of a mean loss = MARGIN, where a token's loss scatters as much as its mean
LEARNED = 0.6  # share of the first loss; measured: at 0.59 the quickstart predicts late positions 3 % better than early
DEVIATIONS = 5.0  # of a binomial or Poisson count: by chance once in three million
FIM_CUT = 0.1  # share of FIM pieces that a window's end cuts, which are no longer recognized as FIM
FIM_MISTAKEN, SPM_MISTAKEN = 0.02, 0.05  # share of pieces that look like FIM or, with an empty prefix, like SPM
MIN_PIECES = 20  # with fewer, DEVIATIONS allow every share


def languages_behind(record: RunRecord) -> Iterator[Finding]:
    """Held-out bits per byte of a language or corpus rise, or do not fall, while the mean falls."""
    mean = record.columns["eval/bits_per_byte"].finite()
    if len(mean) < MIN_EVALUATIONS:
        return
    for kind, noun, plural in (("lang", "language", "languages"), ("corpus", "corpus", "corpora")):
        tokens = record.columns.matching(f"eval/{kind}/", "/tokens")
        behind: dict[str, list[str]] = {}
        for name, series in record.columns.matching(f"eval/{kind}/", "/bits_per_byte").items():
            size = f" ({format_count(tokens[name].last)} held-out tokens)" if name in tokens else ""
            if (change := _behind(series.finite(), mean)) is not None:
                behind.setdefault(change[0], []).append(f"{name}{size} {change[1]}")
        for how, evidence in behind.items():
            yield Finding(
                "warning",
                f"Held-out bits per byte of {len(evidence)} {noun if len(evidence) == 1 else plural} {how} while the "
                "mean falls.",
                evidence=tuple(evidence[:12]),
                try_next=(
                    "give it more weight, or a stage of its own: data.corpora weights and data.stages",
                    f"inspect its share of the data: `jaxcoder data inspect {record.path}`",
                    "with few held-out tokens, hold out more first",
                ),
            )


def _behind(series: Series, mean: Series) -> tuple[str, str] | None:
    """("rise" or "stay level", the numbers), or None."""
    if len(series) < MIN_EVALUATIONS:
        return None
    best = int(series.values.argmin())
    means = [mean.between(0, int(series.steps[at])) for at in (0, best, -1)]
    if not all(map(len, means)):
        return None
    mean_first, mean_then, mean_now = (each.last for each in means)
    first, last = float(series.values[0]), series.last
    if last > (1 + MARGIN) * series.values[best] and mean_now < mean_then:
        return "rise", (
            f"from {series.values[best]:.4f} (step {series.steps[best]:,}) to {last:.4f}, the mean from "
            f"{mean_then:.4f} to {mean_now:.4f}"
        )
    fall, mean_fall = 1 - last / max(first, 1e-9), 1 - mean_now / max(mean_first, 1e-9)
    if fall < MARGIN and mean_fall > 2 * MARGIN:
        return "stay level", f"from {first:.4f} to {last:.4f} ({fall:.1%} less), the mean {mean_fall:.1%} less"
    return None


def held_out_rises(record: RunRecord) -> Iterator[Finding]:
    """The held-out loss has left its minimum while the training loss falls."""
    held_out, losses = record.columns["eval/loss"].finite(), record.columns["loss"].finite()
    if len(held_out) < MIN_EVALUATIONS or not len(losses):
        return
    best = int(held_out.values.argmin())
    step = int(held_out.steps[best])
    then, now = losses.between(step - 100, step).recent(1.0), losses.recent(0.02)
    if then is None or now is None or held_out.last < (1 + MARGIN) * held_out.values[best] or now > then:
        return
    yield Finding(
        "warning",
        "The held-out loss rises while the training loss falls: the data is being memorized.",
        evidence=(
            f"held-out loss {held_out.values[best]:.4f} at step {step:,}, {held_out.last:.4f} at step "
            f"{held_out.steps[-1]:,}",
            f"training loss {then:.4f} then, {now:.4f} now",
        ),
        try_next=(
            f"use the checkpoint nearest to step {step:,}",
            "train on more data, or fewer steps: data.corpora max_epochs limits how often a corpus is read",
            "raise dropout: model.residual_dropout, model.attention_dropout",
        ),
    )


def context_unused(record: RunRecord) -> Iterator[Finding]:
    """The held-out loss late in a window is no lower than early in it, or rises again towards its end."""
    rows = [
        (first, last, series.last, int(series.steps[-1]), _bucket_tokens(record, first, last))
        for (first, last), series in position_losses(record.columns).items()
        if len(series)
    ]
    rows = [row for row in rows if row[4] >= MIN_BUCKET_TOKENS]
    if len(rows) < 3 or record.is_synthetic or not _has_learned(record):
        return
    # Early: the first sixteenth of the window, at least one bucket.
    early = [row for number, row in enumerate(rows) if number == 0 or (row[1] + 1) * 16 <= rows[-1][1] + 1]
    early_loss = float(np.average([row[2] for row in early], weights=[row[4] for row in early]))
    best, last = min(rows, key=lambda row: row[2]), rows[-1]
    if last[2] > (1 + MARGIN) * best[2] and best[2] < (1 - MARGIN) * early_loss:
        what = (
            f"Positions {last[0]}-{last[1]} are predicted worse than {best[0]}-{best[1]}: the far end is not learned."
        )
    elif last[2] >= (1 - MARGIN) * early_loss:
        what = f"The context is not used: positions {last[0]}-{last[1]} are predicted no better than 0-{early[-1][1]}."
    else:
        return
    has_mask = record.config is not None and record.config.data.document_mask
    yield Finding(
        "warning",
        what,
        evidence=(
            f"loss by position at step {last[3]:,}: "
            + ", ".join(f"{first}-{end} {loss:.4f}" for first, end, loss, _, _ in rows),
        ),
        try_next=(
            f"inspect the windows: `jaxcoder data inspect {record.path}` (lengths of documents) and `jaxcoder "
            f"data show {record.path} --step {max(record.last_step, 1)}`",
            "if documents are shorter than the window: group the files of a repository, or train on shorter windows"
            + (", or set data.document_mask off" if has_mask else ""),
            "if the weights are from a shorter context, continue until the new positions are learned",
        ),
    )


def _bucket_tokens(record: RunRecord, first: int, last: int) -> float:
    """Held-out tokens of a bucket of positions; MIN_BUCKET_TOKENS where they were not recorded."""
    sizes = record.columns[f"eval/position/{first}-{last}/tokens"].finite()
    return sizes.last if len(sizes) else float(MIN_BUCKET_TOKENS)


def _has_learned(record: RunRecord) -> bool:
    """Whether the loss is low enough for context to matter."""
    losses = record.columns["loss"].finite()
    now = losses.recent()
    if now is None or len(losses) < 50:
        return False
    is_pretrained = record.config is not None and bool(record.config.init_from)
    return is_pretrained or now < LEARNED * float(np.median(losses.values[:10]))


def fim_shares(record: RunRecord) -> Iterator[Finding]:
    """The shares of FIM pieces, and of SPM among them, differ from the configuration by more than chance."""
    if record.config is None:
        return
    columns, data = record.columns, record.config.data
    shares, pieces, spm = (columns[key].finite() for key in ("fim_share", "pieces", "fim_spm_share"))
    if not len(pieces):
        pieces = Series(shares.steps, np.ones(len(shares)))  # a batch has at least one piece
    counts, spm_counts = pieces.at(shares.steps), pieces.at(spm.steps) * shares.at(spm.steps)
    for name, field, rate, values, weights, mistaken in (
        ("FIM", "data.fim_rate", data.fim_rate, shares.values, counts, FIM_MISTAKEN),
        ("SPM among FIM", "data.fim_spm_rate", data.fim_spm_rate, spm.values, spm_counts, SPM_MISTAKEN),
    ):
        hits, total = float(np.nansum(values * weights)), float(np.nansum(weights))
        if total < MIN_PIECES:
            continue
        chance = DEVIATIONS * math.sqrt(max(rate * (1 - rate), 1e-9) / total)
        low, high = max((1 - FIM_CUT) * rate - chance, 0.0), rate + mistaken + chance
        if low <= hits / total <= high:
            continue
        yield Finding(
            "error",
            f"The share of {name} is {hits / total:.1%} of the pieces, and {field} asks for {rate:.1%}.",
            evidence=(
                f"{hits:,.0f} of {total:,.0f} pieces in {len(values):,} batches; {low:.1%} to {high:.1%} would be "
                "within chance",
            ),
            try_next=(
                f"inspect samples: `jaxcoder data show {record.path} --step {max(record.last_step, 1)}`",
                "the documents of the store may contain FIM sentinels, or be a few characters long: `jaxcoder "
                f"data inspect {record.path}`",
            ),
        )


def repeated_batches(record: RunRecord) -> Iterator[Finding]:
    """The same batch at two steps, more often than 32-bit fingerprints collide."""
    hashes = record.columns["batch_hash"].finite()
    order = np.argsort(hashes.values, kind="stable")
    same = np.flatnonzero(np.diff(hashes.values[order]) == 0)
    collisions = len(hashes) ** 2 / 2**33
    if len(same) <= collisions + DEVIATIONS * math.sqrt(collisions) + 1:
        return
    pairs = sorted((int(hashes.steps[order[at]]), int(hashes.steps[order[at + 1]])) for at in same[:200])
    yield Finding(
        "error",
        f"{len(same):,} batches are identical to an earlier one.",
        evidence=tuple(f"step {second:,} read the batch of step {first:,}" for first, second in pairs[:5]),
        try_next=(
            f"compare the two: {trace_command(record, pairs[0][0])} and {trace_command(record, pairs[0][1])}",
            f"a store smaller than a batch repeats itself: `jaxcoder data inspect {record.path}`",
        ),
    )
