"""Cases that the attention measurements share: options of the command line, kernels and their block shapes, units."""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.attention.cycles import DEVICES, Case, EstimateCache, implementation, of_peak
from jaxcoder.errors import ConfigError

BASELINES = ("splash", "tokamax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="v5p", choices=DEVICES, help="TPU generation (default %(default)s)")
    parser.add_argument(
        "--against", nargs="*", default=list(BASELINES), choices=BASELINES, metavar="NAME",
        help="kernels to compare with: splash, tokamax (default: both; none: `--against` alone)",
    )  # fmt: skip
    parser.add_argument("--kernel", choices=("forward", "backward"), help="one of the two (default: both)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence (default %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="default %(default)s")
    parser.add_argument("--num-heads", type=int, default=48, help="query heads of the model (default %(default)s)")
    parser.add_argument("--set", metavar="NAME=N", nargs="+", default=[], help="block sizes that replace the table's")
    add_cache_argument(parser)


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", type=Path, metavar="FILE", default=Path.home() / ".cache" / "jaxcoder" / "attention-cycles.json",
        help="estimates already made; an interrupted command continues from there (default %(default)s)",
    )  # fmt: skip


def open_cache(args: argparse.Namespace) -> EstimateCache:
    return EstimateCache(args.cache)


def kernels(args: argparse.Namespace) -> list[str]:
    return [args.kernel] if args.kernel else ["forward", "backward"]


def jaxcoder_case(args: argparse.Namespace, kernel: str) -> Case:
    """One block of heads on one core for a model of `--num-heads`; the other blocks of heads cost the same again."""
    module = implementation("jaxcoder")
    model = Case(
        device=args.device, implementation="jaxcoder", kernel=kernel, length=args.length, heads=args.num_heads,
        head_dim=args.head_dim, settings=_block_sizes(args),
    )  # fmt: skip
    heads = module.blocks_of(model).heads
    pinned = dict(model.settings) | {"heads": heads, "cores": 1}
    return replace(model, heads=heads, settings=tuple(sorted(pinned.items())))


def _block_sizes(args: argparse.Namespace) -> tuple[tuple[str, int], ...]:
    names = implementation("jaxcoder").setting_names()
    pairs = [text.partition("=")[::2] for text in args.set]
    for name, value in pairs:
        if name not in names or not value.isdigit():
            raise ConfigError(f"--set takes NAME=N with a name of {', '.join(names)}, and got {name}={value}.")
    return tuple((name, int(value)) for name, value in pairs)


def baseline_case(args: argparse.Namespace, name: str, kernel: str) -> Case:
    """A baseline's kernel at its best settings. Splash compares segment ids, except in its `inference` kernel and on
    v5e, where the estimator cannot follow it."""
    settings = implementation(name).SETTINGS
    best = settings.get(args.device, settings["v5p"])[kernel]
    return Case(
        device=args.device, implementation=name, kernel=kernel, length=args.length, heads=1, head_dim=args.head_dim,
        settings=tuple(sorted(best.items())),
        segments=name == "splash" and kernel != "inference" and args.device != "v5e",
    )  # fmt: skip


def baseline_kernels(name: str, kernel: str) -> list[str]:
    """The kernels of a baseline that together do what one of jaxcoder's does."""
    return ["forward"] if kernel == "forward" else [k for k in implementation(name).KERNELS if k in ("dkv", "dq")]


def useful_share(args: argparse.Namespace, kernel: str, cycles: float) -> float:
    """FLOPs that a causal mask needs (half of the square) over the chip's matrix peak in so many cycles a head."""
    case = jaxcoder_case(args, kernel)
    return of_peak(case, implementation("jaxcoder").FLOP[kernel] * args.head_dim * args.length**2 / 2, cycles)


def blocks_text(case: Case) -> str:
    settings = dict(case.settings)
    if case.implementation == "jaxcoder":
        blocks = implementation("jaxcoder").blocks_of(replace(case, length=max(case.length, 8192)))
        settings = {name: getattr(blocks, name) for name in implementation("jaxcoder").setting_names()}
    return " ".join(f"{name.removeprefix('block_')} {value}" for name, value in settings.items())


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
