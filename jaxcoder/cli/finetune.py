"""Train weights on, and see what every language gained or lost by it.

    jaxcoder finetune runs/base --data PYTHON_STORE --held-out HELD_OUT --output-dir runs/python
    jaxcoder finetune exported --data PYTHON_STORE --held-out PYTHON_HELD_OUT --held-out OTHERS_HELD_OUT --steps 300 \\
        --global-batch-size 16 --output-dir runs/python

The weights are a run or checkpoint of ours or a directory in PyTorch format; the stores are made by `jaxcoder data
build` with the tokenizer beside them. The schedule is the one that made StarCoder of StarCoderBase, with a fresh
optimizer; any field of it can be overridden as in `jaxcoder train`. Held-out bits per byte of every language are
measured before and after on the same windows, shown beside each other and written to OUTPUT_DIR/retention.json.
Interrupt it whenever you like: the same command goes on where it was.
"""

import argparse

from jaxcoder.cli.start import start_jax

PASSES_UNKNOWN_ARGUMENTS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="WEIGHTS", help="a run, a checkpoint, or a directory in PyTorch format")
    parser.add_argument("--data", metavar="STORE", help="token store to train on")
    parser.add_argument(
        "--held-out",
        action="append",
        default=[],
        metavar="STORE",
        help="token store of held-out documents, in one language or several; may be given several times",
    )
    parser.add_argument("--output-dir", default="runs/finetune", metavar="DIR", help="default: runs/finetune")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps, with a warm-up that fits (default: 8500)"
    )
    parser.add_argument(
        "--accept-config-change",
        action="store_true",
        help="continue a fine-tune although its configuration has changed",
    )


def run(args: argparse.Namespace) -> int | None:
    from jaxcoder.errors import ConfigError

    if "--help" in args.overrides:  # `finetune WEIGHTS --help`: the fields of the run
        from jaxcoder.config.load import load_run

        load_run("starcoder", ["--help"])
    if args.data is None:
        raise ConfigError("there is nothing to train on: give `--data STORE`.")
    given = {argument.partition("=")[0].replace("_", "-") for argument in args.overrides}
    for short, long in (("--steps", "--num-steps"), ("WEIGHTS", "--init-from"), ("--data", "--data.store")):
        if long in given:
            raise ConfigError(f"{long} is {short} here: give that.")
    start_jax(debug=args.debug)
    from jaxcoder.recipes.finetune import finetune, table

    languages = finetune(
        args.base,
        store=args.data,
        held_out=args.held_out,
        output_dir=args.output_dir,
        num_steps=args.steps,
        overrides=args.overrides,
        accept_config_change=args.accept_config_change,
    )
    print("\n".join(["", *table(languages)]))
    print(f"Written to {args.output_dir}/retention.json; the weights are in {args.output_dir}/checkpoints.")
    return None
