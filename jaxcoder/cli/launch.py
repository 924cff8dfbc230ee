"""Start a run on a pod, a cluster or several processes: fills in a file of `launch/` and hands it to its own client.

    jaxcoder launch local --config smoke --processes 2 --data synthetic --steps 20
    jaxcoder launch slurm --config starcoderbase_1b --nodes 4 --data STORE --output-dir runs/1b --mesh.fsdp 32 --dry-run
    jaxcoder launch gke --help                             what there is to fill in

Options that the file does not know are options of `jaxcoder train`; they are checked before anything is submitted.
--dry-run prints the file, to be looked at, kept or changed: the files are plain, and work without jaxcoder on the
machine that submits them. The same command continues a run that was stopped.
"""

import argparse
import os
import subprocess
from collections.abc import Sequence

PASSES_UNKNOWN_ARGUMENTS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from jaxcoder.recipes.launch import KINDS

    kinds = "; ".join(f"{name}: {kind.summary}" for name, kind in KINDS.items())
    parser.add_argument("kind", metavar="KIND", choices=list(KINDS), help=kinds)
    parser.add_argument("--dry-run", action="store_true", help="print the file that would be handed over, and stop")


def run(args: argparse.Namespace) -> int:
    from jaxcoder import runtime
    from jaxcoder.recipes.launch import KINDS, client_of, fill, read, variables

    if "--help" in args.overrides:
        print(f"jaxcoder launch {args.kind}: {KINDS[args.kind].summary}\n")
        for variable in variables(read(args.kind)):
            default = f" (default {variable.default})" if variable.default else ""
            print(f"  {variable.option:<20} {variable.what}{default}")
        print("\nAll other options go to `jaxcoder train`.")
        return 0
    values, arguments = split({variable.option for variable in variables(read(args.kind))}, args.overrides)
    text = fill(args.kind, values, arguments)
    check_run(values["--config"], arguments)
    if args.dry_run:
        print(text, end="")
        return 0
    client = client_of(args.kind)
    path = runtime.user_cache("launch", f"{os.getpid()}-{KINDS[args.kind].file}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    try:
        return subprocess.run([*client, str(path)]).returncode
    finally:
        path.unlink(missing_ok=True)  # the clients have read it


def split(known: set[str], words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The values of the file's own options, and what is left for `jaxcoder train`."""
    from jaxcoder.errors import ConfigError

    values, rest, words = {}, [], list(words)
    while words:
        option, equals, value = words.pop(0).partition("=")
        if option not in known:
            rest.append(option + equals + value)
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{option} needs a value.")
            value = words.pop(0)
        values[option] = value
    return values, rest


def check_run(config: str, arguments: Sequence[str]) -> None:
    """Raises what `jaxcoder train` would raise of its command line, so that it is known before anything is submitted.

    A configuration in a file that is not here cannot be checked here.
    """
    from jaxcoder.cli import main, train

    path = config.partition(":")[0]
    if path.endswith(".py") and not os.path.exists(path):
        return
    parser = main.Parser(prog="jaxcoder train")
    parser.passes_unknown = True
    train.add_arguments(parser)
    args, overrides = parser.parse_known_args([config, *arguments])
    args.overrides = overrides
    train.config_of(args)
