"""Train a model. The configuration is a name or a file; the command line can override any field.

    jaxcoder train smoke --data synthetic                  a quick test of the machine, on random tokens
    jaxcoder train starcoderbase_1b --data synthetic --steps 20
    jaxcoder train tiny_starcoder_py --data STORE --output-dir runs/tiny --global-batch-size 64
    jaxcoder train my_run.py:experiment --optimizer.peak-learning-rate 1e-4

    jaxcoder train starcoderbase --data STORE --mesh.fsdp 64 --dry-run     its requirements, on any machine

STORE is a directory made by `jaxcoder data build`. All files of a run are in its output directory. The same command
resumes it from the latest checkpoint after Ctrl-C, a kill or a crash. `jaxcoder train CONFIG --help` lists all fields.
"""

import argparse
from typing import TYPE_CHECKING

from jaxcoder.cli.start import add_process_arguments, start_processes

if TYPE_CHECKING:
    from jaxcoder.config import RunConfig

PASSES_UNKNOWN_ARGUMENTS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="name of a run, or FILE.py[:FUNCTION]")
    parser.add_argument(
        "--data", metavar="STORE", help="token store, or `synthetic` for random tokens (short for --data.store)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="like --num-steps, and shortens the warm-up to a tenth of it"
    )
    parser.add_argument(
        "--variant",
        choices=("mended", "as_trained"),
        help="reproduce the defects of StarCoder's training (as_trained), or not (mended, the default)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configuration, size, FLOPs, memory, data and directory of the run, and exit",
    )
    parser.add_argument(
        "--accept-config-change", action="store_true", help="resume a run although its configuration has changed"
    )
    parser.add_argument(
        "--profile-steps",
        metavar="FIRST:LAST",
        help="write a profile of these steps, such as 10:13, to OUTPUT_DIR/profile",
    )
    add_process_arguments(parser)


def run(args: argparse.Namespace) -> int | None:
    config = config_of(args)
    if args.dry_run:
        _dry_run(args, config)
        return None
    index = start_processes(args)

    from jaxcoder.recipes.pretrain import pretrain
    from jaxcoder.train.profile import ProfileSteps

    profile_steps = None if args.profile_steps is None else ProfileSteps.parse(args.profile_steps)
    result = pretrain(config, accept_config_change=args.accept_config_change, profile_steps=profile_steps)
    if index:
        return None
    directory = result.directory
    if result.first_step == result.step:
        print(
            f"This run was complete before, at step {result.step:,}: nothing was trained. Give more --steps with "
            "--accept-config-change to train on, or another --output-dir."
        )
        return None
    print(f"Finished step {result.step:,}. Checkpoint: {directory.checkpoints}, metrics: {directory.metrics_file}")
    if config.data.store != "synthetic":
        print(f"Next:  jaxcoder complete {directory.path} --prefix 'def '")
        print(f"       jaxcoder convert to-hf {directory.path} {directory.path}/hf")
    return None


def config_of(args: argparse.Namespace) -> "RunConfig":
    """The run that the command line describes. Raises ConfigError for invalid or contradictory options."""
    from dataclasses import replace

    from jaxcoder.config.load import load_run, with_store
    from jaxcoder.errors import ConfigError

    given = {argument.partition("=")[0].replace("_", "-") for argument in args.overrides}
    for short, value, long in (("--data", args.data, "--data.store"), ("--steps", args.steps, "--num-steps")):
        if value is not None and long in given:
            raise ConfigError(f"{short} and {long} set the same field: use one of them.")
    config = load_run(args.config, args.overrides, args.variant)
    if args.data is not None:
        config = with_store(config, args.data)
    if args.steps is not None:
        if args.steps < 1:
            raise ConfigError(f"--steps is {args.steps}, but must be at least 1.")
        warmup = min(config.optimizer.warmup_steps, args.steps // 10)
        config = replace(config, num_steps=args.steps, optimizer=replace(config.optimizer, warmup_steps=warmup))
    return config


def _dry_run(args: argparse.Namespace, config: "RunConfig") -> None:
    from jaxcoder import runtime
    from jaxcoder.config.load import cost_of, docstring_of

    runtime.initialize(share_accelerator=True, debug=args.debug)
    import jax

    from jaxcoder.recipes.initial_weights import open_weights
    from jaxcoder.train.dry_run import dry_run

    cost = cost_of(docstring_of(args.config))
    for line in dry_run(config, num_devices=len(jax.devices()), cost=cost, open_weights=open_weights):
        print(line)
