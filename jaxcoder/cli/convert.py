"""Convert checkpoints to and from Hugging Face format.

`to-hf` writes a directory that transformers, vLLM, llama.cpp and others open: config.json, model.safetensors,
generation_config.json and the tokenizer. `from-hf` converts such a directory, or a model of the Hugging Face hub, to an
fp32 checkpoint. Neither needs torch, and a round trip is bit-exact, in the dtype of the source. GPTBigCode models only
(SantaCoder, StarCoder, StarCoderBase, tiny_starcoder_py).

  jaxcoder convert to-hf runs/quickstart exported            the latest checkpoint of a run
  jaxcoder convert to-hf runs/quickstart/checkpoints/200 exported
  jaxcoder convert from-hf exported imported
  jaxcoder convert from-hf bigcode/tiny_starcoder_py imported

`jaxcoder complete` reads both formats without conversion.
"""

import argparse

_TO_EPILOG = """\
  jaxcoder convert to-hf runs/quickstart exported            the latest checkpoint of a run
  jaxcoder convert to-hf runs/quickstart exported --overwrite --max-shard-gb 2
"""

_FROM_EPILOG = """\
  jaxcoder convert from-hf exported imported                 safetensors, sharded or not, or pytorch_model.bin
  jaxcoder convert from-hf bigcode/tiny_starcoder_py imported
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="{to-hf,from-hf}", required=True)
    to = verbs.add_parser("to-hf", help="convert a checkpoint to a Hugging Face directory", epilog=_TO_EPILOG)
    to.add_argument("source", metavar="SOURCE", help="a run's directory, its checkpoints, or one step")
    to.add_argument("destination", metavar="DESTINATION", help="directory to write; new or empty")
    to.add_argument("--step", type=int, metavar="N", help="step of a run (default: the latest complete one)")
    to.add_argument(
        "--max-shard-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="maximum size of a weights file (default: %(default)s)",
    )
    from_ = verbs.add_parser(
        "from-hf", help="convert a Hugging Face directory or hub model to a checkpoint", epilog=_FROM_EPILOG
    )
    from_.add_argument(
        "source", metavar="SOURCE", help="a directory with config.json and weights, or a hub id: bigcode/starcoder"
    )
    from_.add_argument("destination", metavar="DESTINATION", help="directory to write; new or empty")
    to.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights (default: that of the weights it was converted from, else float32)",
    )
    for verb in (to, from_):
        verb.add_argument("--allow-non-finite", action="store_true", help="accept weights that are NaN or infinite")
        verb.add_argument("--overwrite", action="store_true", help="replace the destination")


def run(args: argparse.Namespace) -> None:
    from jaxcoder import runtime

    runtime.initialize(debug=args.debug)
    if args.verb == "to-hf":
        _to_hf(args)
    else:
        _from_hf(args)


def _to_hf(args: argparse.Namespace) -> None:
    from jaxcoder.convert.to_hf import to_hf
    from jaxcoder.errors import ConfigError
    from jaxcoder.record.console import ConsoleProgress

    if not args.max_shard_gb > 0:
        raise ConfigError(f"--max-shard-gb is {args.max_shard_gb}, but must be larger than 0.")
    summary = to_hf(
        args.source,
        args.destination,
        step=args.step,
        overwrite=args.overwrite,
        max_shard_bytes=int(min(args.max_shard_gb, 1e9) * 1e9),
        dtype=args.dtype,
        allow_non_finite=args.allow_non_finite,
        progress=ConsoleProgress(),
    )
    tokenizer = "with its tokenizer" if summary.has_tokenizer else "WITHOUT a tokenizer: the checkpoint has none"
    print(
        f"Wrote {summary.num_parameters:,} parameters of step {summary.step} to {summary.directory} "
        f"({summary.num_files} file{'s' * (summary.num_files > 1)} of weights, {tokenizer})."
    )
    print(f"In Python: transformers.AutoModelForCausalLM.from_pretrained({str(summary.directory)!r})")


def _from_hf(args: argparse.Namespace) -> None:
    from jaxcoder.convert.from_hf import from_hf
    from jaxcoder.record.console import ConsoleProgress

    summary = from_hf(
        args.source,
        args.destination,
        overwrite=args.overwrite,
        allow_non_finite=args.allow_non_finite,
        progress=ConsoleProgress(),
    )
    tokenizer = "with its tokenizer" if summary.has_tokenizer else "WITHOUT a tokenizer: the source has none"
    print(f"Wrote {summary.num_parameters:,} parameters to {summary.directory} ({tokenizer}).")
    print(f"Try it with: jaxcoder complete {summary.directory} --prefix 'def hello'")
