"""Train a small StarCoder on the code of this machine, from raw files to completions, in a few minutes.

    jaxcoder quickstart                      Python files of this interpreter; about six minutes on two cores
    jaxcoder quickstart --source ~/my_project --output-dir runs/mine
    jaxcoder quickstart --steps 60 --output-dir runs/short     a worse model, in a minute

The same command resumes an interrupted quickstart. At the end it prints the held-out loss, some completions, and the
commands to try next.
"""

import argparse
from pathlib import Path

from jaxcoder.cli.start import start_jax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="default: runs/quickstart"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: the configuration's)")
    parser.add_argument(
        "--source", type=Path, metavar="DIR", help="source tree (default: the code of this interpreter)"
    )


def run(args: argparse.Namespace) -> int | None:
    from jaxcoder.errors import ConfigError
    from jaxcoder.recipes.quickstart import Paths, quickstart
    from jaxcoder.record.console import ConsoleProgress

    if args.steps is not None and args.steps < 1:
        raise ConfigError(f"--steps is {args.steps}: give 1 or more.")
    start_jax(debug=args.debug)
    report = quickstart(args.output_dir, source=args.source, num_steps=args.steps, progress=ConsoleProgress())
    from jaxcoder.recipes.quickstart_report import show_report

    show_report(Paths(args.output_dir), report)
    return None
