"""A plan as text and as JSON. Figures are marked as `compiled` (from the compiler) or `modelled` (by formula)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from jaxcoder.config.serialize import to_dict
from jaxcoder.formatting import format_bytes, format_duration, format_table, plural
from jaxcoder.plan.calibration import comparisons, starcoder_prediction
from jaxcoder.plan.make import Plan
from jaxcoder.plan.published import LACKING, STARCODER
from jaxcoder.plan.time_model import WEIGHT_AXIS
from jaxcoder.train.dry_run import row
from jaxcoder.train.xla_options import bundles_for

_INDENT = " " * 14


def lines_of(plan: Plan, tried: Sequence[tuple[str, Plan]] = ()) -> Iterator[str]:
    """tried: attempts of `find_fit`, if it does not fit."""
    yield f"Plan of {plan.config.name} on {plan.topology}: nothing is run. (compiled): figures of the compiler, for"
    yield "devices that need not be attached; (modelled): by formula."
    for section in (_run, _memory, _transfers, _time, _options):
        yield ""
        yield from section(plan)
    yield ""
    yield from row("verdict", verdict(plan, tried))
    for options, attempt in tried:
        fits = "fits" if attempt.fits else "does not fit"
        speed = f", {attempt.time.expected:.3f} s a step" if attempt.fits else ""
        yield from row("", f"tried {options}: {fits}, {_peak(attempt)}{speed}")


def verdict(plan: Plan, tried: Sequence[tuple[str, Plan]] = ()) -> str:
    """One sentence."""
    how = "compiled" if plan.compiled is not None else "modelled only"
    name = f"{plan.config.name} on {plan.topology} ({plural(plan.topology.chips, 'chip')})"
    if plan.fits:
        return f"{name} fits ({how}: {_peak(plan)}) and {_takes(plan)}."
    name = f"{name} does not fit ({how}: {_peak(plan)})"
    if tried and tried[-1][1].fits:
        options, attempt = tried[-1]
        return f"{name}; with {options} it does, and {_takes(attempt)}."
    return f"{name}; nothing that was tried makes it fit: take more chips or chips with more memory."


def _takes(plan: Plan) -> str:
    durations = {case: _duration(plan, seconds) for case, seconds in plan.seconds.items()}
    between = f", between {durations['fast']} and {durations['slow']}" if "fast" in durations else " (not calibrated)"
    return f"should take {durations['expected']}{between}, bound by {plan.time.bound}"


def _duration(plan: Plan, seconds: float) -> str:
    """Of the run, at so many seconds per step."""
    days = plan.days(seconds)
    return f"{days:,.1f} days" if days >= 1 else format_duration(86400 * days)


def _peak(plan: Plan) -> str:
    limit = format_bytes(plan.chip_memory)
    if plan.peak_bytes is None:
        return f"more than the {limit} of a chip"
    return f"{format_bytes(plan.peak_bytes)} of {limit} a chip"


def _run(plan: Plan) -> Iterator[str]:
    config, topology, chip = plan.config, plan.topology, plan.topology.chip
    devices = f", {topology.devices:,} devices" if topology.devices != topology.chips else ""
    yield from row(
        "topology",
        f"{topology.chips:,} x {chip.name}{devices}; per device {chip.peak_flops / 1e12:,.0f} TFLOP/s bf16, "
        f"{format_bytes(chip.memory)}, {chip.memory_bandwidth / 1e9:,.0f} GB/s of memory, {chip.links} x "
        f"{chip.link_bandwidth / 1e9:,.0f} GB/s of links, {topology.network / 1e9:,.4g} GB/s of network",
    )
    yield from row(
        "run",
        f"mesh {config.mesh}; {config.global_batch_size:,} windows of {config.model.max_seq_len:,} a step, "
        f"{config.microbatch_size or config.global_batch_size:,} at a time; remat {config.compute.remat}; "
        f"{config.compute.dtype}; attention {plan.attention}",
    )
    yield from row("parameters", f"{plan.parameters:,}")
    yield from row(
        "FLOPs",
        f"{plan.flops_per_token:.4g} a token (a multiply-add is 2, attention its causal half, a step 3 forward passes, "
        "recomputation not counted)",
    )
    if plan.compiled is not None:
        versions = plan.compiled.versions
        version = ", ".join(f"{name} {versions[name]}" for name in ("jax", "libtpu") if name in versions)
        seconds = format_duration(plan.compiled.compile_seconds)
        yield from row(
            "compile", f"{seconds} after {format_duration(plan.compiled.lower_seconds)} of tracing ({version})"
        )


def _memory(plan: Plan) -> Iterator[str]:
    compiled, estimate, per_chip = plan.compiled, plan.estimate, plan.topology.chip.devices_per_chip
    kind = "modelled" if compiled is None else "compiled"
    yield from row("memory", f"{_peak(plan)} ({kind})")
    if compiled is None:
        sizes = {
            "state: weights and optimizer": estimate.weights + estimate.optimizer_state,
            "gradients": estimate.gradients,
            "activations and gathered copies": estimate.saved_activations + estimate.working + estimate.gathered,
        }
    else:
        sizes = {"state: weights and optimizer": compiled.state_bytes, "batch": compiled.batch_bytes}
        if compiled.fits:
            sizes["activations, gradients, gathered weights"] = compiled.temporary_bytes or 0
            sizes["program, and results not in place"] = (compiled.code_bytes or 0) + (compiled.output_bytes or 0)
    for name, size in sizes.items():
        yield f"{_INDENT}{name:<42}{format_bytes(size * per_chip):>10}  ({kind})"
    if compiled is not None:
        ratio = f", {plan.estimated_bytes / plan.peak_bytes:.2f} of the compiler's figure" if plan.peak_bytes else ""
        estimated = format_bytes(plan.estimated_bytes)
        yield f"{_INDENT}{'the estimate of train --dry-run':<42}{estimated:>10}  (modelled{ratio})"


def _transfers(plan: Plan) -> Iterator[str]:
    compiled, modelled = plan.compiled, plan.work.transfers
    rows: list[tuple[str, str, int | str, str, float, float]]
    if compiled is None or not compiled.fits:
        kind, note = "modelled", ""
        rows = [
            ("any", axis, "-", _modelled_overlap(plan, axis), sent, plan.modelled.interconnect[axis])
            for axis, sent in modelled.items()
        ]
    else:
        kind = "compiled; seconds modelled"
        totals: dict[str, float] = {}
        for collective in compiled.collectives:
            axes = "+".join(collective.axes)
            totals[axes] = totals.get(axes, 0.0) + collective.bytes
        rows = [
            (c.kind, axes, c.count, "overlapped" if c.asynchronous else "exposed", c.bytes,
             plan.time.interconnect[axes] * c.bytes / totals[axes])
            for c in compiled.collectives
            for axes in ["+".join(c.axes)]
            if c.bytes >= 1e6
        ]  # fmt: skip
        by_formula, ratio = sum(modelled.values()), sum(modelled.values()) / max(sum(totals.values()), 1)
        note = f"the formula has {format_bytes(by_formula)} in total, {ratio:.2f} of it (modelled)" if modelled else ""
    if not rows:
        yield from row("transfers", f"none between chips ({kind})")
        return
    yield from row("transfers", f"between devices, a step ({kind})")
    cells = [[*first, format_bytes(sent), f"{seconds:.3f}"] for *first, sent, seconds in rows]
    columns = ["collective", "axis", "times", "matmuls", "sent by a device", "seconds"]
    for line in [*format_table(columns, cells).splitlines(), *([note] if note else [])]:
        yield _INDENT + line


def _modelled_overlap(plan: Plan, axis: str) -> str:
    seconds, overlapped = plan.modelled.interconnect[axis], plan.modelled.overlapped_seconds
    if axis != WEIGHT_AXIS or overlapped == 0:
        return "exposed"
    return "overlapped" if overlapped is None or overlapped >= seconds else f"{overlapped / seconds:.0%} overlapped"


def _time(plan: Plan) -> Iterator[str]:
    time, compiled, cases = plan.time, plan.compiled, plan.seconds
    is_compiled = compiled is not None and compiled.fits
    matmuls = "compiled FLOPs" if is_compiled and compiled is not None and compiled.kernels else "modelled"
    terms = [("matmuls", time.matmul, matmuls), ("attention", time.attention, "modelled")]
    terms.append(("memory", time.memory, "modelled"))
    for axis, seconds in time.interconnect.items():
        terms.append((f"transfers, {axis}", seconds, "compiled bytes" if is_compiled else "modelled"))
    if time.host:
        terms.append(("transfers, host", time.host, "modelled"))
    bounds = f"{time.overlapped:.3f} if everything overlaps, {time.sequential:.3f} if nothing does"
    terms.append(("expected", cases["expected"], f"modelled; {bounds}"))
    yield from row("step", "seconds of each term alone, with the efficiencies of the time model")
    for name, seconds, kind in terms:
        yield f"{_INDENT}{name:<24}{seconds:>9.3f}  ({kind})"
    if plan.calibration.range is None:
        yield f"{_INDENT}{'range':<24}{'':>9}  ({plan.calibration})"
    else:
        fast, slow = cases["fast"], cases["slow"]
        yield f"{_INDENT}{'range':<24}{fast:>9.3f} to {slow:.3f}  ({plan.calibration}, relative to their predictions)"
    # StarCoderBase's own training run, in a plan of that model for GPUs.
    predicted = starcoder_prediction(plan.config) if plan.topology.platform == "cuda" else None
    if predicted is not None:
        yield from row(
            "original",
            f"{STARCODER.tokens_per_second:,.0f} tokens/s a GPU on {STARCODER.topology} (published), {predicted:,.0f} "
            f"predicted ({STARCODER.source})",
        )
    if plan.cycle_seconds is not None:
        modelled = time.matmul + time.memory
        yield (
            f"{_INDENT}{'the compiler':<24}{plan.cycle_seconds:>9.3f}  (estimated cycles of matmuls and memory; the "
            f"model has {modelled:.3f}, {modelled / plan.cycle_seconds:.2f} of it)"
        )
    yield ""
    yield from row("budget", f"{plan.tokens:,} tokens in {plan.config.num_steps:,} steps (modelled)")
    columns = ["", "s a step", "tokens/s a chip", "MFU", "days", "chip hours"]
    table = [
        [
            name, f"{seconds:.3f}", f"{plan.tokens_per_second(seconds):,.0f}", f"{plan.mfu(seconds):.1%}",
            f"{plan.days(seconds):,.1f}", f"{plan.chip_hours(seconds):,.0f}",
        ]
        for name, seconds in cases.items()
    ]  # fmt: skip
    for line in format_table(columns, table).splitlines():
        yield _INDENT + line


def _options(plan: Plan) -> Iterator[str]:
    if plan.config.compute.xla_options == "none":
        yield from row("XLA options", "none (compute.xla_options)")
        return
    known = plan.compiled.options if plan.compiled is not None else None
    yield from row("XLA options", "set by the training step for this chip (compute.xla_options)")
    for bundle in bundles_for(plan.topology.kind):
        values = " ".join(
            f"{name}={str(value).lower()}" for name, value in bundle.options.items() if known is None or name in known
        )
        yield from row("", f"{bundle.name}: {bundle.why}. {values} [{bundle.source}]")


def as_dict(plan: Plan, tried: Sequence[tuple[str, Plan]] = ()) -> dict:
    """The plan as plain JSON."""
    seconds = plan.seconds
    expected = seconds["expected"]
    return {
        "topology": asdict(plan.topology) | {"chips": plan.topology.chips, "devices": plan.topology.devices},
        "chip": asdict(plan.topology.chip),
        "parameters": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "attention": plan.attention,
        "fits": plan.fits,
        "peak_bytes_per_chip": plan.peak_bytes,
        "memory_bytes_per_chip": plan.chip_memory,
        "compiled": None if plan.compiled is None else asdict(plan.compiled),
        "modelled": {
            "memory": asdict(plan.estimate), "work": asdict(plan.work), "step": asdict(plan.modelled),
            "step_expected": plan.modelled.expected,
        },
        "step": asdict(plan.time),
        "seconds": {case: seconds.get(case) for case in ("fast", "expected", "slow")},
        "calibration": str(plan.calibration),
        "tokens_per_second_per_chip": plan.tokens_per_second(expected),
        "mfu": plan.mfu(expected),
        "tokens": plan.tokens,
        "days": {case: plan.days(value) for case, value in seconds.items()},
        "chip_hours": plan.chip_hours(expected),
        "verdict": verdict(plan, tried),
        "tried": [
            {
                "options": options, "fits": attempt.fits, "peak_bytes_per_chip": attempt.peak_bytes,
                "seconds": attempt.time.expected if attempt.fits else None,
            }
            for options, attempt in tried
        ],
        "config": to_dict(plan.config),
    }  # fmt: skip


def to_json(plan: Plan, tried: Sequence[tuple[str, Plan]] = ()) -> str:
    return json.dumps(as_dict(plan, tried), indent=1) + "\n"


def calibration_lines() -> Iterator[str]:
    """The time model compared with published runs, as a Markdown table."""
    yield (
        "| run | s a step, published | predicted | predicted / published | MFU published | mesh, batch, recomputed | "
        "source |"
    )
    yield "|---|---|---|---|---|---|---|"
    for found in comparisons():
        layout = found.run.layout
        again = ", ".join(sorted(layout.recomputed)) or "nothing"
        yield (
            f"| {found.run.name} | {found.published:.3f} | {found.predicted.expected:.3f} | **{found.ratio:.2f}** | "
            f"{found.published_mfu:.1%} | {layout.mesh}, {layout.batch:,}; {again} | {found.run.source} |"
        )
    yield ""
    yield "| left out | published | what is missing |"
    yield "|---|---|---|"
    for lacking in LACKING:
        yield f"| {' | '.join(lacking)} |"
