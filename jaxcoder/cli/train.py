"""Train a model: a configuration by name or file, any field overridden on the command line.

    jaxcoder train smoke --data synthetic                  try the machine: random tokens, nothing to prepare
    jaxcoder train starcoderbase_1b --data synthetic --steps 20
    jaxcoder train tiny_starcoder_py --data STORE --output-dir runs/tiny --global-batch-size 64
    jaxcoder train my_run.py:experiment --optimizer.peak-learning-rate 1e-4

STORE is a directory made by `jaxcoder data build`. A run lives in its output directory: the same command continues it
from the newest checkpoint, after Ctrl-C, a kill or a crash. `jaxcoder train NAME --help` shows every field of NAME.
"""

import argparse

PASSES_UNKNOWN_ARGUMENTS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="name of a run, or FILE.py[:FUNCTION]")
    parser.add_argument("--data", metavar="STORE", help="token store to train on, or `synthetic` (short for --data.store)")
    parser.add_argument("--steps", type=int, metavar="N", help="short for --num-steps, with a warm-up that fits")
    parser.add_argument(
        "--variant",
        choices=("mended", "as_trained"),
        help="set every switch for a defect of StarCoder's training: mended (the default of each), or as it was trained",
    )
    parser.add_argument(
        "--accept-config-change", action="store_true", help="continue a run although its configuration has changed"
    )


def run(args: argparse.Namespace) -> int | None:
    from dataclasses import replace

    from jaxcoder import runtime
    from jaxcoder.config.load import load_run, with_store

    config = load_run(args.config, args.overrides, args.variant)
    if args.data is not None:
        config = with_store(config, args.data)
    if args.steps is not None:
        warmup = min(config.optimizer.warmup_steps, max(args.steps // 10, 0))
        config = replace(config, num_steps=args.steps, optimizer=replace(config.optimizer, warmup_steps=warmup))
    runtime.initialize(debug=args.debug)
    unseen = runtime.check_accelerator()
    if unseen:
        print(unseen)

    from jaxcoder.train.loop import train

    result = train(config, accept_config_change=args.accept_config_change)
    directory = result.directory
    print(f"Finished step {result.step:,}. Checkpoint: {directory.checkpoints}, metrics: {directory.metrics_file}")
    if config.data.store != "synthetic":
        print(f"Go on with:  jaxcoder complete {directory.path} --prefix 'def '")
        print(f"             jaxcoder convert to-hf {directory.path} {directory.path}/hf")
    return None
