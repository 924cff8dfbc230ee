"""Estimate the memory, speed and cost of a run on other hardware.

    jaxcoder plan starcoderbase --topology v5p:8x8x8
    jaxcoder plan starcoderbase --topology v5e:16x16 --mesh.tensor 4 --microbatch-size 64 --json plan.json
    jaxcoder plan starcoderbase_7b --topology v6e:8x8 --search --minutes 20
    jaxcoder plan starcoderbase --topology h100:8x8                           8 nodes of 8 GPUs
    jaxcoder plan --calibration                                               compare the time model with published runs

The training step is compiled for the topology in a separate process (one to five minutes; results are cached). Memory,
FLOPs and transfers are the compiler's; times come from a model. This needs the extra `plan` for TPUs (Linux on x86_64)
or `cuda` for GPUs, and no accelerator; `--no-compile` needs neither. CONFIG and its fields are as in `jaxcoder train`.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

PASSES_UNKNOWN_ARGUMENTS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="name of a run, or FILE.py[:FUNCTION]")
    parser.add_argument("--topology", metavar="NAME", help="v4, v5e, v5p, v6e, tpu7x with a shape, or a100, h100, h200")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="number of TPU slices (default 1)")
    parser.add_argument(
        "--network",
        type=float,
        metavar="GB/S",
        help="bandwidth per device between slices or nodes (default: the vendor's)",
    )
    parser.add_argument("--no-compile", action="store_true", help="use the model only, in about a second")
    parser.add_argument("--no-cache", action="store_true", help="ignore cached compilations")
    parser.add_argument("--search", action="store_true", help="rank meshes, microbatches and remat; compile the best")
    parser.add_argument(
        "--compile-all",
        action="store_true",
        help="with --search: compile every layout, and evaluate the model's ranking",
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, metavar="M", help="time limit for compiling (default 30)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument(
        "--calibration", action="store_true", help="compare the time model with published runs, and exit"
    )


def run(args: argparse.Namespace) -> int | None:
    from jaxcoder import runtime
    from jaxcoder.errors import ConfigError

    runtime.initialize(share_accelerator=True, debug=args.debug)
    if args.calibration:
        from jaxcoder.plan.report import calibration_lines

        print("\n".join(calibration_lines()))
        return None
    if args.config is None:
        raise ConfigError("CONFIG is missing: give the name of a run, such as `jaxcoder plan starcoderbase`.")
    from jaxcoder.config.load import load_run

    config = load_run(args.config, args.overrides, None)
    if args.topology is None:
        raise ConfigError("--topology is missing: give one, such as `--topology v5p:8x8x8` or `--topology h100:8x8`.")
    if not args.minutes > 0:
        raise ConfigError(f"--minutes is {args.minutes:g}: give more than 0.")
    if args.compile_all and (args.no_compile or not args.search):
        raise ConfigError("--compile-all is for --search without --no-compile: remove it, or add --search.")
    if args.network is not None and not args.network > 0:
        raise ConfigError(f"--network is {args.network:g}: give the GB/s of one device, more than 0.")
    from jaxcoder.plan.topology import parse_topology

    topology = parse_topology(args.topology, args.slices)
    if args.network is not None:
        topology = replace(topology, network_bandwidth=args.network * 1e9)
    return _search(args, config, topology) if args.search else _plan(args, config, topology)


def _plan(args: argparse.Namespace, config, topology) -> int:
    """Returns 0 if the run fits or options were found with which it does, else 1."""
    from jaxcoder.plan.make import find_fit, make_plan, prepare
    from jaxcoder.plan.report import lines_of, to_json

    config = prepare(config, topology)
    compile_one = _compiler(args)
    plan = make_plan(config, topology, None if args.no_compile else compile_one(config, topology))
    tried, found = ([], True) if plan.fits else find_fit(plan, compile_one)
    for line in lines_of(plan, tried):
        print(line)
    if args.json is not None:
        _write(args.json, to_json(plan, tried))
    return 0 if found else 1


def _search(args: argparse.Namespace, config, topology) -> int:
    from jaxcoder.plan.compile import check_compiler
    from jaxcoder.plan.search import lines_of_search, search, search_json

    if not args.no_compile:
        check_compiler(topology)
    compile_one = None if args.no_compile else _compiler(args)
    found = search(config, topology, compile_one, minutes=args.minutes, compile_all=args.compile_all)
    for line in lines_of_search(found):
        print(line)
    if args.json is not None:
        _write(args.json, search_json(found))
    return 0 if found.best is not None else 1


def _compiler(args: argparse.Namespace):
    """A function that compiles with a progress line, within the rest of --minutes."""
    from jaxcoder.plan.compile import check_compiler, compile_step, is_cached
    from jaxcoder.record.console import ConsoleProgress

    end = time.monotonic() + 60 * args.minutes

    def compile_one(config, topology):
        check_compiler(topology)
        mesh, micro = config.mesh, config.microbatch_size or config.global_batch_size
        if not args.no_cache and is_cached(config, topology):
            return compile_step(config, topology)
        progress, shown = ConsoleProgress(), 0.0
        layout = f"{mesh}, {micro} at a time, {config.compute.remat}"
        progress.start(f"Compiling for {topology}, {layout}", None, "s")

        def waiting(seconds: float) -> None:
            nonlocal shown
            progress.advance(seconds - shown)
            shown = seconds

        try:
            left = max(end - time.monotonic(), 1.0)
            return compile_step(config, topology, use_cache=not args.no_cache, on_wait=waiting, time_limit=left)
        finally:
            progress.close()

    return compile_one


def _write(path: Path, text: str) -> None:
    from jaxcoder.errors import ConfigError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error.strerror or error}.") from error
    print(f"Wrote {path}", file=sys.stderr)
