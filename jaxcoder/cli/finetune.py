"""Fine-tune weights and measure the change of every language.

    jaxcoder finetune runs/base --data PYTHON_STORE --held-out HELD_OUT --output-dir runs/python
    jaxcoder finetune exported --data PYTHON_STORE --held-out PYTHON_HELD_OUT --held-out OTHERS_HELD_OUT --steps 300 \\
        --global-batch-size 16 --output-dir runs/python

WEIGHTS is a run, a checkpoint, or a directory in Hugging Face format. Build the stores with `jaxcoder data build` and
the tokenizer of the weights. The schedule is that of StarCoder from StarCoderBase, with a new optimizer state; any
field can be overridden as in `jaxcoder train`. Held-out bits per byte of every language are measured on the same
windows before and after, printed and written to OUTPUT_DIR/retention.json. The same command resumes an interrupted run.
"""

import argparse

from jaxcoder.cli.start import start_jax

PASSES_UNKNOWN_ARGUMENTS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="WEIGHTS", help="a run, a checkpoint, or a directory in Hugging Face format")
    parser.add_argument("--data", metavar="STORE", help="token store to train on")
    parser.add_argument(
        "--held-out",
        action="append",
        default=[],
        metavar="STORE",
        help="token store of held-out documents in one or more languages (repeatable)",
    )
    parser.add_argument(
        "--output-dir", default="runs/finetune", metavar="DIR", help="directory of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps; shortens the warm-up too (default: 8500)"
    )
    parser.add_argument(
        "--accept-config-change",
        action="store_true",
        help="resume a run although its configuration has changed",
    )


def run(args: argparse.Namespace) -> int | None:
    from jaxcoder.errors import ConfigError

    if "--help" in args.overrides:  # `finetune WEIGHTS --help`: the fields of the run
        from jaxcoder.config.load import load_run
        from jaxcoder.config.overrides import apply_overrides

        apply_overrides(load_run("starcoder"), ["--help"], prog="jaxcoder finetune WEIGHTS")
    if args.data is None:
        raise ConfigError("there is no training data: give `--data STORE`.")
    given = {argument.partition("=")[0].replace("_", "-") for argument in args.overrides}
    for short, long in (("--steps", "--num-steps"), ("WEIGHTS", "--init-from"), ("--data", "--data.store")):
        if long in given:
            raise ConfigError(f"{long} is set by {short} in this command: use that.")
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
