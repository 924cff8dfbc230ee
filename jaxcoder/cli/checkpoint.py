"""Inspect and verify a checkpoint.

`inspect` prints what a checkpoint holds: its step, the number of parameters, the run and mesh that it comes from, the
config, and the table of its arrays with the layers folded together. It reads a few small files and needs no device.

  jaxcoder checkpoint inspect runs/quickstart                      the latest of a run
  jaxcoder checkpoint inspect runs/quickstart --step 200           another one
  jaxcoder checkpoint inspect runs/quickstart/checkpoints/200 --verify

`--verify` also reads every file and compares it with the checksums in the manifest.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="{inspect}", required=True)
    inspect = verbs.add_parser("inspect", help="describe a checkpoint, and verify its files")
    inspect.add_argument("path", metavar="PATH", help="a run's directory, its checkpoints, or one step")
    inspect.add_argument("--step", type=int, metavar="N", help="which step of a run (default: the latest complete one)")
    inspect.add_argument("--verify", action="store_true", help="compare every file with its checksum")


def run(args: argparse.Namespace) -> None:
    from jaxcoder.checkpoint.inspect import choose, describe

    directory = choose(args.path, args.step)
    for line in describe(directory):
        print(line)
    if args.verify:
        _verify(directory)


def _verify(directory) -> None:
    from jaxcoder.checkpoint.manifest import find_damage, read_manifest
    from jaxcoder.errors import CheckpointError
    from jaxcoder.record.console import ConsoleProgress

    manifest, progress = read_manifest(directory), ConsoleProgress()
    progress.start("verifying", sum(info.size for info in manifest.files.values()), "bytes")
    damage = find_damage(directory, manifest, progress=progress.advance)
    progress.finish()
    if damage is not None:
        raise CheckpointError(f"{directory} is damaged: {damage}; use another step.")
    print(f"\nAll {len(manifest.files)} files match their checksums.")
