"""`jaxcoder bench attention`: our attention kernels beside JAX's splash, tokamax's and cuDNN's.

    jaxcoder bench attention --device tpu:v6e --against splash,tokamax    static cycles; no TPU is needed
    jaxcoder bench attention --device cpu                                 time on this machine
    jaxcoder bench attention --tune --device v6e --against splash         search block shapes; resumes
    jaxcoder bench attention --packed --device v5p                        StarCoder's documents
    jaxcoder bench attention --long | --costs | --slots | --compile-all | --picture FILE

Cycles are libtpu's own static estimate (attention_cycles.py), extended to lengths that it can't walk by a fit whose
residual is part of the answer (attention_fit.py). Trust the ratio of two kernels on one chip, not seconds. What is
estimated is kept (`--cache`), so that a command that was interrupted goes on where it stopped.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from jaxcoder.benchmarks import attention_matmul
from jaxcoder.benchmarks.attention_cycles import CHIPS, Case, Memory, estimate, of_peak, versions
from jaxcoder.benchmarks.attention_fit import Fit, NoEstimate, contestant, fit, held_out
from jaxcoder.benchmarks.measure import Report, Reports
from jaxcoder.errors import ConfigError

TARGETS = {
    "forward": {"v5e": (0.84, 1.2), "v5p": (0.84, 1.2), "v6e": (0.41, 1.55)},
    "backward": {"v5e": (0.80, 1.4), "v5p": (0.80, 1.4), "v6e": (0.38, None)},
}
"""Kernel -> device -> useful share of peak, and how many times splash's cycles; at 8192 and head dimension 128."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="v5p", metavar="NAME", help="tpu:v5p or v5p (v4 v5e v6e 7x), gpu or cpu")
    parser.add_argument(
        "--against", metavar="NAMES", help="splash,tokamax on TPUs, cudnn on GPUs (default: all), or none"
    )
    parser.add_argument("--kernel", choices=("forward", "backward"), help="one of the two (default: both)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence (default %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="default %(default)s")
    parser.add_argument("--num-heads", type=int, default=48, help="query heads of the model (default %(default)s)")
    parser.add_argument("--set", metavar="NAME=N", nargs="+", default=[], help="our block sizes instead of the table's")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="estimates already made (default: in ~/.cache)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--tune", action="store_true", help="search the block sizes of ours or of --against")
    modes.add_argument("--packed", action="store_true", help="StarCoder's documents packed into windows")
    modes.add_argument("--long", action="store_true", help="32K and 128K: does it compile, and what does a block cost")
    modes.add_argument("--costs", action="store_true", help="what dropout and the masks of documents cost")
    modes.add_argument("--slots", action="store_true", help="what limits the kernels: how full each unit is")
    modes.add_argument("--compile-all", action="store_true", help="every configured model on every chip")
    modes.add_argument("--picture", type=Path, metavar="FILE", help="draw the schedule of a packed batch, as SVG")


def run(args: argparse.Namespace) -> Report | Reports:
    from jaxcoder import runtime

    args.device = args.device.removeprefix("tpu:")
    # TPUs are described, never asked for, and what is computed here is schedules.
    runtime.initialize(leave_accelerators=args.picture is not None or args.device not in ("cpu", "gpu"))
    if args.picture is not None:
        from jaxcoder.benchmarks import attention_picture

        return attention_picture.run(args.picture)
    if args.device in ("cpu", "gpu"):
        from jaxcoder.benchmarks import attention_wall

        return attention_wall.run(args)
    if args.device not in CHIPS:
        raise ConfigError(f"--device takes cpu, gpu or one of {', '.join(CHIPS)}, and got {args.device!r}.")
    args.against = _against(args.against)
    if args.tune:
        from jaxcoder.benchmarks import attention_tune as mode
    elif args.packed:
        from jaxcoder.benchmarks import attention_packed as mode
    elif args.long or args.compile_all:
        from jaxcoder.benchmarks import attention_compile as mode
    elif args.slots:
        from jaxcoder.benchmarks import attention_slots as mode
    elif args.costs:
        from jaxcoder.benchmarks import attention_costs as mode
    else:
        return Reports([check(args), *ratios(args)])
    return mode.run(args)


def memory_of(args: argparse.Namespace) -> Memory:
    return Memory(args.cache or Path.home() / ".cache" / "jaxcoder" / "attention-cycles.json")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def settings_of(args: argparse.Namespace) -> tuple[tuple[str, int], ...]:
    """What `--set` says of our block sizes."""
    names = contestant("ours").setting_names()
    pairs = [text.partition("=")[::2] for text in args.set]
    for name, value in pairs:
        if name not in names or not value.isdigit():
            raise ConfigError(f"--set takes NAME=N with a name of {', '.join(names)}, and got {name}={value}.")
    return tuple(sorted((name, int(value)) for name, value in pairs))


def our_case(args: argparse.Namespace, kernel: str) -> Case:
    """One block of heads on one core, as a model of `--num-heads` has them: the others cost the same again."""
    model = Case(
        device=args.device, contestant="ours", kernel=kernel, length=args.length, heads=args.num_heads,
        head_dim=args.head_dim, settings=settings_of(args),
    )  # fmt: skip
    heads, names = contestant("ours").blocks_of(model).heads, contestant("ours").setting_names()
    pinned = {"heads": heads} | ({"cores": 1} if "cores" in names else {})
    return replace(model, heads=heads, settings=tuple(sorted((dict(model.settings) | pinned).items())))


def peer_case(args: argparse.Namespace, name: str, kernel: str) -> Case:
    """A peer's kernel at its best settings; splash compares segment ids where the estimator can follow that.

    Its `inference` kernel, for one document and no training, does not.
    """
    settings = contestant(name).SETTINGS
    best = settings.get(args.device, settings["v5p"])[kernel]
    return Case(
        device=args.device, contestant=name, kernel=kernel, length=args.length, heads=1, head_dim=args.head_dim,
        settings=tuple(sorted(best.items())),
        segments=name == "splash" and kernel != "inference" and args.device != "v5e",
    )  # fmt: skip


def peer_kernels(name: str, kernel: str) -> list[str]:
    """The kernels of a peer that do what ours does in one."""
    return ["forward"] if kernel == "forward" else [k for k in contestant(name).KERNELS if k in ("dkv", "dq")]


def check(args: argparse.Namespace) -> Report:
    """The estimator itself, on matmuls whose time on a v5e is known."""
    rows, memory = [], memory_of(args)
    say(f"{args.device}: matmuls, to see whether the estimator is to be trusted")
    for one in attention_matmul.CHECKS:
        case = attention_matmul.case(args.device, one)
        found = estimate(case, memory=memory)
        row = {"size": one.size, "blocks": "/".join(map(str, one.blocks)), "cycles": found.cycles}
        if found.cycles:
            row["peak"] = percent(of_peak(case, 2 * one.size**3, found.cycles))
            if args.device == "v5e":
                row["estimated"] = 1e3 * found.cycles / attention_matmul.V5E_HERTZ
                row["measured"] = one.measured and 1e3 * one.measured
        rows.append(row | {"why": found.error if found.cycles is None else ""})
    return Report(
        title=f"{args.device}: the estimator on Pallas matmuls (bad blocks must look bad)",
        settings={},
        columns={"size": "N", "blocks": "blocks", "cycles": "cycles", "peak": "of peak"}
        | ({"estimated": "ms at 1.5 GHz", "measured": "ms measured"} if args.device == "v5e" else {})
        | {"why": ""},
        rows=rows,
        targets={},
        environment=versions("matmul"),
    )


def ratios(args: argparse.Namespace) -> list[Report]:
    """One table a kernel: ours and the peers' at one length, one causal document, in cycles a head."""
    return [_ratio(args, kernel) for kernel in ([args.kernel] if args.kernel else ["forward", "backward"])]


def _ratio(args: argparse.Namespace, kernel: str) -> Report:
    rows, totals, memory = [], {}, memory_of(args)
    for name in ("ours", *args.against):
        parts = [kernel] if name == "ours" else peer_kernels(name, kernel)
        cycles = []
        for part in parts:
            case = our_case(args, part) if name == "ours" else peer_case(args, name, part)
            row, found = fitted_row(case, memory)
            if name == "ours" and found is not None:
                errors = [abs(error) for _, _, error in held_out(found, memory=memory, say=say)]
                row["documents"] = percent(max(errors)) if errors else None
            rows.append(row)
            cycles.append(row.get("cycles"))
        if all(cycles):
            totals[name] = sum(cycles)
            rows[-1]["total"] = totals[name]
            rows[-1]["useful"] = useful(args, kernel, totals[name])
            if "ours" in totals and name != "ours":
                rows[-1]["ratio"] = totals[name] / totals["ours"]
        if (name, kernel) == ("splash", "forward"):
            rows.append(_inference_row(args, totals, memory))
    return Report(
        title=f"{args.device} {kernel}: cycles a head, {args.length} causal tokens, head_dim {args.head_dim}",
        settings={"heads of ours": our_case(args, kernel).heads, "heads of a peer": 1},
        columns={
            "who": "", "settings": "blocks", "costs": "cycles of each", "residual": "residual",
            "documents": "documents", "cycles": "cycles", "total": "together",
            "useful": "useful", "ratio": "x ours", "why": "",
        },
        rows=rows,
        targets=_targets(args, kernel, totals),
        environment=versions("tokamax" if "tokamax" in args.against else "ours"),
    )  # fmt: skip


def _inference_row(args: argparse.Namespace, totals: dict[str, float], memory: Memory) -> dict:
    """The least that splash takes: no ids are compared, and no log-sum-exp is written, which training needs."""
    row, _ = fitted_row(peer_case(args, "splash", "inference"), memory)
    if "cycles" in row:
        row["useful"] = useful(args, "forward", row["cycles"])
        if "ours" in totals:
            row["ratio"] = row["cycles"] / totals["ours"]
    return row


def fitted_row(case: Case, memory: Memory) -> tuple[dict, Fit | None]:
    """A row of a kernel, per head at the case's length, and its fit."""
    module = contestant(case.contestant)
    row = {"who": f"{case.contestant} {case.kernel}", "settings": blocks_text(case)}
    say(f"{case.device} {case.contestant} {case.kernel}")
    try:
        found = fit(case, memory=memory, say=say)
    except (NoEstimate, ConfigError) as error:
        return row | {"why": f"no cycles: {error}"}, None
    costs = ", ".join(f"{name} {cost:,.0f}" for name, cost in zip(found.counted, found.costs, strict=True))
    row |= {"costs": costs, "residual": percent(found.residual), "why": "; ".join(found.failures)}
    return row | {"cycles": found.cycles(module.steps(case)) / case.heads}, found


def useful(args: argparse.Namespace, kernel: str, cycles: float) -> str:
    """Needed work (half of the square, for a causal mask) over what the chip could do in so many cycles."""
    case = our_case(args, kernel)
    share = of_peak(case, contestant("ours").FLOP[kernel] * args.head_dim * args.length**2 / 2, cycles)
    return "artefact" if share > 1 else percent(share)


def blocks_text(case: Case) -> str:
    if case.contestant != "ours":
        return " ".join(f"{name.removeprefix('block_')} {value}" for name, value in case.settings)
    blocks = contestant("ours").blocks_of(replace(case, length=max(case.length, 8192)))
    names = contestant("ours").setting_names()
    return " ".join(f"{name.removeprefix('block_')} {getattr(blocks, name)}" for name in names)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _targets(args: argparse.Namespace, kernel: str, totals: dict[str, float]) -> dict[str, bool]:
    if (args.length, args.head_dim) != (8192, 128) or args.device not in TARGETS[kernel] or "ours" not in totals:
        return {}
    least, times = TARGETS[kernel][args.device]
    flop = contestant("ours").FLOP[kernel] * args.head_dim * args.length**2 / 2
    share = of_peak(our_case(args, kernel), flop, totals["ours"])
    met = {f"at least {percent(least)} of peak (it is {percent(share)})": least <= share <= 1}
    if times and "splash" in totals:
        ratio = totals["splash"] / totals["ours"]
        met[f"{times} times fewer cycles than splash (it is {ratio:.2f})"] = ratio >= times
    if "tokamax" in totals:
        ratio = totals["tokamax"] / totals["ours"]
        met[f"fewer cycles than tokamax's bound (it is {ratio:.2f})"] = ratio >= 1
    return met


def _against(text: str | None) -> list[str]:
    names = ["splash", "tokamax"] if text is None else [name for name in text.split(",") if name != "none"]
    for name in names:
        if name not in ("splash", "tokamax"):
            raise ConfigError(f"--against takes splash and tokamax on a TPU, and got {name!r}.")
    return names
