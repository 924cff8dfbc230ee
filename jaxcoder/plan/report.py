"""A plan in words, and as JSON. `compiled` marks what the compiler says, `modelled` what a formula says."""

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
    """tried: what was tried where it does not fit."""
    yield f"Plan of {plan.config.name} on {plan.topology}: nothing is run. (compiled): the compiler's figures, for"
    yield "devices that are not here; (modelled): by formula."
    yield ""
    yield from _run(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _transfers(plan)
    yield from _time(plan)
    yield ""
    yield from _options(plan)
    yield ""
    yield from row("verdict", verdict(plan, tried))
    for options, attempt in tried:
        fits = "fits" if attempt.fits else "does not fit"
        speed = f", {attempt.time.expected:.3f} s a step" if attempt.fits else ""
        yield from row("", f"tried {options}: {fits}, {_of_memory(attempt)}{speed}")


def verdict(plan: Plan, tried: Sequence[tuple[str, Plan]] = ()) -> str:
    """One sentence."""
    how = "compiled" if plan.compiled is not None else "by the model alone"
    name = f"{plan.config.name} on {plan.topology} ({plural(plan.topology.chips, 'chip')})"
    if not plan.fits:
        if tried and tried[-1][1].fits:
            options, attempt = tried[-1]
            return f"{name} does not fit ({how}: {_of_memory(plan)}); with {options} it does, and {_takes(attempt)}."
        smaller = "; nothing that was tried makes it fit: take more chips or chips with more memory"
        return f"{name} does not fit ({how}: {_of_memory(plan)}){smaller}."
    return f"{name} fits ({how}: {_of_memory(plan)}) and {_takes(plan)}."


def _takes(plan: Plan) -> str:
    durations = {case: _duration(plan, seconds) for case, seconds in plan.seconds.items()}
    between = f", between {durations['fast']} and {durations['slow']}" if "fast" in durations else " (not calibrated)"
    return f"should take {durations['expected']}{between}, bound by {plan.time.bound}"


def _duration(plan: Plan, seconds: float) -> str:
    """Of the whole run."""
    days = plan.days(seconds)
    return f"{days:,.1f} days" if days >= 1 else format_duration(86400 * days)


def _of_memory(plan: Plan) -> str:
    limit = format_bytes(plan.memory_of_chip)
    if plan.peak_bytes is None:
        return f"more than the {limit} of a chip"
    return f"{format_bytes(plan.peak_bytes)} of {limit} a chip"


def _run(plan: Plan) -> Iterator[str]:
    config, topology, chip = plan.config, plan.topology, plan.topology.chip
    mesh = config.mesh
    two = f", {topology.devices:,} devices" if topology.devices != topology.chips else ""
    yield from row(
        "topology",
        f"{topology.chips:,} x {chip.name}{two}; of a device {chip.peak_flops / 1e12:,.0f} TFLOP/s bf16, "
        f"{format_bytes(chip.memory)}, {chip.memory_bandwidth / 1e9:,.0f} GB/s of memory, {chip.links} x "
        f"{chip.link_bandwidth / 1e9:,.0f} GB/s of links, {topology.network / 1e9:,.4g} GB/s of network",
    )
    micro = config.microbatch_size or config.global_batch_size
    yield from row(
        "run",
        f"mesh {mesh}; {config.global_batch_size:,} windows of "
        f"{config.model.max_seq_len:,} a step, {micro:,} at a time; remat {config.compute.remat}; "
        f"{config.compute.dtype}; attention {plan.attention}",
    )
    yield from row("parameters", f"{plan.parameters:,}")
    yield from row(
        "FLOPs",
        f"{plan.flops_per_token:.4g} a token (a multiply-add is 2, attention its causal half, a step 3 forward passes, "
        "recomputation not counted)",
    )
    compiled = plan.compiled
    if compiled is not None:
        version = ", ".join(f"{n} {compiled.versions[n]}" for n in ("jax", "libtpu") if n in compiled.versions)
        seconds = format_duration(compiled.compile_seconds)
        yield from row("compile", f"{seconds} after {format_duration(compiled.lower_seconds)} of tracing ({version})")


def _memory(plan: Plan) -> Iterator[str]:
    compiled, of_chip = plan.compiled, plan.topology.chip.devices_per_chip
    yield from row("memory", f"{_of_memory(plan)} ({'modelled' if compiled is None else 'compiled'})")
    estimate = plan.estimate
    if compiled is None:
        parts = {
            "state: weights and optimizer": estimate.weights + estimate.optimizer_state,
            "gradients": estimate.gradients,
            "activations and gathered copies": estimate.saved_activations + estimate.working + estimate.gathered,
        }
        kind = "modelled"
    else:
        kind = "compiled"
        parts = {"state: weights and optimizer": compiled.state_bytes, "batch": compiled.batch_bytes}
        if compiled.fits:
            parts["activations, gradients, gathered weights"] = compiled.temporary_bytes
            parts["program, and results of their own"] = compiled.code_bytes + compiled.output_bytes
    for name, size in parts.items():
        yield f"{_INDENT}{name:<42}{format_bytes(size * of_chip):>10}  ({kind})"
    if compiled is not None:
        total = estimate.total * of_chip
        off = f", {total / plan.peak_bytes:.2f} of the compiler's figure" if plan.peak_bytes else ""
        yield f"{_INDENT}{'the estimate of train --dry-run':<42}{format_bytes(total):>10}  (modelled{off})"


def _transfers(plan: Plan) -> Iterator[str]:
    compiled = plan.compiled
    if compiled is None or not compiled.fits:
        rows = [
            ["any", axis, "-", _modelled_overlap(plan, axis), sent, plan.modelled.interconnect[axis]]
            for axis, sent in plan.work.transfers.items()
        ]
        kind = "modelled"
    else:
        kind = "compiled; seconds modelled"
        bandwidth = {}
        for axis, seconds in plan.time.interconnect.items():
            sent = sum(c.bytes for c in compiled.collectives if "+".join(c.axes) == axis)
            bandwidth[axis] = sent / seconds if seconds else float("inf")
        rows = [
            [c.kind, axes, c.count, _overlap(c.asynchronous), c.bytes, c.bytes / bandwidth[axes]]
            for c in compiled.collectives
            for axes in ["+".join(c.axes)]
            if c.bytes >= 1e6
        ]
    if not rows:
        yield from row("transfers", f"none between chips ({kind})")
        yield ""
        return
    yield from row("transfers", f"between devices, a step ({kind})")
    cells = [[*said, format_bytes(sent), f"{seconds:.3f}"] for *said, sent, seconds in rows]
    columns = ["collective", "axis", "times", "matmuls", "sent by a device", "seconds"]
    for line in format_table(columns, cells).splitlines():
        yield _INDENT + line
    modelled = sum(plan.work.transfers.values())
    if compiled is not None and compiled.fits and modelled:
        found = sum(c.bytes for c in compiled.collectives)
        share = f"{modelled / max(found, 1):.2f} of it"
        yield f"{_INDENT}the formula has {format_bytes(modelled)} in all, {share} (modelled)"
    yield ""


def _overlap(is_overlapped: bool) -> str:
    return "overlapped" if is_overlapped else "exposed"


def _modelled_overlap(plan: Plan, axis: str) -> str:
    seconds, overlapped_seconds = plan.modelled.interconnect[axis], plan.modelled.overlapped_seconds
    if axis == WEIGHT_AXIS and overlapped_seconds is not None and 0 < overlapped_seconds < seconds:
        return f"{overlapped_seconds / seconds:.0%} overlapped"
    return _overlap(axis == WEIGHT_AXIS and overlapped_seconds != 0)


def _time(plan: Plan) -> Iterator[str]:
    time, compiled = plan.time, plan.compiled
    of = "compiled FLOPs" if compiled is not None and compiled.fits and compiled.kernels else "modelled"
    yield from row("step", "seconds that each takes alone, at the speed it reaches in practice")
    terms = [("matmuls", time.matmul, of)]
    terms += [("attention", time.attention, "modelled"), ("memory", time.memory, "modelled")]
    moved = "compiled bytes" if compiled is not None and compiled.fits else "modelled"
    terms += [(f"transfers, {axis}", seconds, moved) for axis, seconds in time.interconnect.items()]
    terms += [("transfers, host", time.host, "modelled")] if time.host else []
    for name, seconds, kind in terms:
        yield f"{_INDENT}{name:<24}{seconds:>9.3f}  ({kind})"
    seconds_by_case = plan.seconds
    expected = seconds_by_case["expected"]
    bounds = f"{time.overlapped:.3f} if all overlapped, {time.sequential:.3f} if nothing"
    yield f"{_INDENT}{'expected':<24}{expected:>9.3f}  (modelled; {bounds})"
    if plan.calibration.range is None:
        yield f"{_INDENT}{'range':<24}{'':>9}  ({plan.calibration})"
    else:
        fast, slow = seconds_by_case["fast"], seconds_by_case["slow"]
        yield f"{_INDENT}{'range':<24}{fast:>9.3f} to {slow:.3f}  ({plan.calibration}, relative to their predictions)"
    yield from _original(plan)
    cycles = compiled.estimated_cycles if compiled is not None else None
    if cycles:
        seconds = cycles / plan.topology.chip.clock
        modelled = time.matmul + time.memory
        yield (
            f"{_INDENT}{'the compiler':<24}{seconds:>9.3f}  (its own cycles for matmuls and memory; the model has "
            f"{modelled:.3f}, {modelled / seconds:.2f} of it)"
        )
    table = []
    for name, seconds in seconds_by_case.items():
        table.append(
            [
                name, f"{seconds:.3f}", f"{plan.tokens_per_second(seconds):,.0f}", f"{plan.mfu(seconds):.1%}",
                f"{plan.days(seconds):,.1f}", f"{plan.chip_hours(seconds):,.0f}",
            ]
        )  # fmt: skip
    yield ""
    yield from row("budget", f"{plan.tokens:,} tokens in {plan.config.num_steps:,} steps (modelled)")
    columns = ["", "s a step", "tokens/s a chip", "MFU", "days", "chip hours"]
    for line in format_table(columns, table).splitlines():
        yield _INDENT + line


def _original(plan: Plan) -> Iterator[str]:
    """StarCoderBase's own training run next to the prediction for it, in a plan of that model for GPUs."""
    predicted = starcoder_prediction(plan.config) if plan.topology.platform == "cuda" else None
    if predicted is not None:
        yield from row(
            "original",
            f"{STARCODER.tokens_per_second:,.0f} tokens/s a GPU on {STARCODER.topology} (published), {predicted:,.0f} "
            f"predicted ({STARCODER.source})",
        )


def _options(plan: Plan) -> Iterator[str]:
    if plan.config.compute.xla_options == "none":
        yield from row("XLA options", "none (compute.xla_options)")
        return
    bundles = bundles_for(plan.topology.kind)
    known = plan.compiled.options if plan.compiled is not None else None
    yield from row("XLA options", "set by the training step for this chip (compute.xla_options)")
    for bundle in bundles:
        values = " ".join(
            f"{name}={str(value).lower()}" for name, value in bundle.options.items() if known is None or name in known
        )
        yield from row("", f"{bundle.name}: {bundle.why}. {values} [{bundle.source}]")


def as_dict(plan: Plan, tried: Sequence[tuple[str, Plan]] = ()) -> dict:
    """Everything, for machines."""
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
        "memory_bytes_per_chip": plan.memory_of_chip,
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
        mesh = layout.mesh
        again = ", ".join(sorted(layout.recomputed)) or "nothing"
        yield (
            f"| {found.run.name} | {found.published:.3f} | {found.predicted.expected:.3f} | **{found.ratio:.2f}** | "
            f"{found.published_mfu:.1%} | {mesh}, {layout.batch:,}; {again} | "
            f"{found.run.source} |"
        )
    yield ""
    yield "| left out | published | what is missing |"
    yield "|---|---|---|"
    for run in LACKING:
        yield f"| {run.name} | {run.published} | {run.lacks} |"
