"""Start a run on a pod, a cluster or in several processes, by filling in a file of `launch/` and submitting it.

    jaxcoder launch local --config smoke --processes 2 --data synthetic --steps 20
    jaxcoder launch slurm --config starcoderbase_1b --nodes 4 --data STORE --output-dir runs/1b --mesh.fsdp 32 --dry-run
    jaxcoder launch gke --help                             the options of a launch file

Options that are not in the file are passed to `jaxcoder train`; they are checked before anything is submitted. With
--dry-run the file is printed, so that you can keep or change it: it also works on a machine without jaxcoder. The same
command resumes a stopped run.
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
    parser.add_argument("--dry-run", action="store_true", help="print the file instead of submitting it")


def run(args: argparse.Namespace) -> int:
    from jaxcoder import runtime
    from jaxcoder.recipes.launch import KINDS, client_of, fill, read, variables

    if "--help" in args.overrides:
        print(f"jaxcoder launch {args.kind}: {KINDS[args.kind].summary}\n")
        for variable in variables(read(args.kind)):
            default = f" (default {variable.default})" if variable.default else ""
            print(f"  {variable.option:<20} {variable.help}{default}")
        print("\nAll other options are passed to `jaxcoder train`.")
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
    """The values of the options of the launch file, and the arguments for `jaxcoder train`."""
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
    """Raises the errors of `jaxcoder train` for its command line, before anything is submitted.

    A configuration in a file that is not on this machine is not checked.
    """
    from jaxcoder.cli import main, train

    path = config.partition(":")[0]
    if path.endswith(".py") and not os.path.exists(path):
        return
    train.config_of(main.parse_verb("train", train, [config, *arguments]))
