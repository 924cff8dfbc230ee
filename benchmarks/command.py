"""The command line that every laboratory module shares: `python -m benchmarks.ROOM.MODULE --help`.

A module has `add_arguments(parser)` and `run(args) -> Report`.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from jaxcoder.benchmarks.measure import add_output_argument, publish
from jaxcoder.errors import JaxcoderError
from jaxcoder.runtime import environment_with

ROOT = Path(__file__).parents[1]
"""The checkout: subprocesses start here, so that `-m benchmarks...` is found."""


def main(module: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Parses the arguments, runs the module's measurement and prints its report. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    module.add_arguments(parser)
    add_output_argument(parser)
    args = parser.parse_args(argv)
    try:
        return publish(module.run(args), args.output)
    except JaxcoderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_module(
    module: str, *arguments: str, variables: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """`python -m module arguments` in the checkout with extra environment variables, output captured as text."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env=environment_with(variables or {}), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def progress(text: str) -> None:
    """Long measurements report each step on stderr."""
    print(text, file=sys.stderr, flush=True)
