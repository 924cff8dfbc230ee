"""Train a small StarCoder on the code of this machine, from raw files to completions, in a few minutes.

    jaxcoder quickstart                      on the Python files of this interpreter: about six minutes on two cores
    jaxcoder quickstart --source ~/my_project --output-dir runs/mine
    jaxcoder quickstart --steps 60 --output-dir runs/short     the same road, a worse model, a minute

Interrupt it whenever you like: the same command goes on where it was. At the end it shows how well the model predicts
files it has not seen, what it writes, and the commands to go on with.
"""

import argparse
from pathlib import Path

from jaxcoder.cli.start import start_jax


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/quickstart"), metavar="DIR", help="default: runs/quickstart"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: the configuration's)")
    parser.add_argument("--source", type=Path, metavar="DIR", help="a tree of code instead of this interpreter's")


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
