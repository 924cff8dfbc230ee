"""Complete code with a trained model, or fill a gap in it.

MODEL is a run's directory, one of its checkpoints, or a directory in PyTorch format (config.json, model.safetensors,
tokenizer.json) as it is. The answer goes to standard output as it comes into being, everything else to standard error,
so that the command can be piped. Without --temperature the likeliest token is taken each time: the same answer always.

    jaxcoder complete runs/quickstart --prefix 'def fibonacci(n):'
    jaxcoder complete runs/quickstart --prefix 'def area(r):
        return ' --suffix ' * r ** 2'
    jaxcoder complete MODEL --prefix-file before.py --suffix-file after.py --truncate
    git show HEAD:setup.py | jaxcoder complete MODEL --prefix-file - --stop $'\\n' --stop '#'
    jaxcoder complete MODEL --prefix 'import ' --temperature 0.8 --top-p 0.95 --num-samples 3 --seed 7 --json

With a suffix (even an empty one) the model is asked for what belongs between the two. Prefix and suffix are taken
exactly as they are, blanks and newlines included. The answer ends at a stop string, at the end of the document, after
--max-new-tokens, or where the model's context ends. Sample k of a seed is the same however many samples are asked for.
With --json there is one object a line: text, finish_reason ("stop", or "length" for what was cut off), tokens,
log_prob (sum over the tokens), prompt_tokens and sample.
"""

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from jaxcoder.cli.start import start_jax

if TYPE_CHECKING:
    from jaxcoder.inference.generate import Completion, TextGenerator
    from jaxcoder.inference.prompts import Prompt


logger = logging.getLogger(__name__)

MOST_SAMPLES = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model", metavar="MODEL", help="directory of a run, a checkpoint, or PyTorch-format weights")
    prefix, suffix = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    prefix.add_argument("--prefix", metavar="TEXT", help="code before the answer")
    prefix.add_argument("--prefix-file", metavar="FILE", help="the same from a file; - is standard input")
    suffix.add_argument("--suffix", metavar="TEXT", help="code after the answer: fills the gap between the two")
    suffix.add_argument("--suffix-file", metavar="FILE", help="the same from a file; - is standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (%(default)s)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy, 1 as trained (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest of this mass")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from this many likeliest tokens")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="answers, each drawn anew (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples (0)")
    parser.add_argument("--spm", action="store_true", help="show the model the suffix first (else the prefix)")
    parser.add_argument("--truncate", action="store_true", help="cut a prompt that is too long, at line starts")
    parser.add_argument("--json", action="store_true", help="one JSON object per answer, when all are finished")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json to use instead of the model's own")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of a run (the newest)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type to compute in (float32 on CPUs)")


def run(args: argparse.Namespace) -> int | None:
    """Answers, and prints."""
    prompt = _prompt(args)
    _check(args)  # before the weights are read, which may take long

    import time

    generator = _load(args)
    start = time.perf_counter()
    answer = _print_all if args.json or args.num_samples > 1 else _stream
    completions = answer(args, generator, prompt)
    seconds = time.perf_counter() - start
    count = sum(len(completion.tokens) for completion in completions)
    reasons = ", ".join(sorted({_REASONS[completion.finish_reason] for completion in completions}))
    logger.info(f"{count} tokens in {seconds:.1f} s after {completions[0].num_prompt_tokens} of the prompt; {reasons}")
    return None


_REASONS = {"stop": "ended by itself or at a stop string", "length": "cut off at the length asked for or possible"}


def _prompt(args: argparse.Namespace) -> "Prompt":
    from jaxcoder.errors import ConfigError
    from jaxcoder.inference.prompts import Prompt

    if args.prefix_file == "-" and args.suffix_file == "-":
        raise ConfigError("Prefix and suffix cannot both be read from standard input: put one of them into a file.")
    prefix = _text(args.prefix, args.prefix_file, "prefix")
    suffix = _text(args.suffix, args.suffix_file, "suffix")
    if prefix is None and suffix is None:
        raise ConfigError(
            "Nothing to complete is given: use --prefix TEXT or --prefix-file FILE (- is standard input)."
        )
    return Prompt(prefix or "", suffix)


def _text(text: str | None, file: str | None, name: str) -> str | None:
    """The text itself, or the file's, exactly: no newline is translated."""
    from jaxcoder.errors import DataError

    if file is not None:
        name = "standard input" if file == "-" else file
        if file == "-":
            content = sys.stdin.buffer.read()
        else:
            with open(file, "rb") as opened:
                content = opened.read()
    elif text is not None:
        name, content = f"--{name}", text.encode(errors="surrogateescape")
    else:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}): convert it, for example with `iconv`.") from None


def _check(args: argparse.Namespace) -> None:
    from jaxcoder.errors import ConfigError
    from jaxcoder.inference.text import check_stop

    check_stop(args.stop)
    if not 1 <= args.num_samples <= MOST_SAMPLES:
        raise ConfigError(f"--num-samples is {args.num_samples}: ask for 1 to {MOST_SAMPLES:,} at a time.")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {args.max_new_tokens}: ask for at least 1.")
    if args.step is not None and args.step < 0:
        raise ConfigError(f"--step is {args.step}: steps count from 0.")
    _samplings(args)
    if args.temperature == 0:
        without = {"--num-samples": args.num_samples > 1, "--top-p": args.top_p != 1, "--top-k": args.top_k is not None}
        for option in (option for option, given in without.items() if given):
            raise ConfigError(
                f"{option} has no effect without a temperature, as the likeliest token is taken each time: "
                "add --temperature 0.8, or another above 0."
            )


def _samplings(args: argparse.Namespace) -> list:
    from jaxcoder.inference.sampling import Sampling

    settings = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed)
    return [Sampling(**settings, sample=sample) for sample in range(args.num_samples)]


def _load(args: argparse.Namespace) -> "TextGenerator":
    start_jax(debug=args.debug)

    import jax

    from jaxcoder.config import ComputeConfig
    from jaxcoder.inference.generate import TextGenerator
    from jaxcoder.inference.load import load_model
    from jaxcoder.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    on_cpu = jax.default_backend() == "cpu"  # where XLA computes bfloat16 by way of float32, at half the speed
    compute = ComputeConfig(dtype=args.dtype or ("float32" if on_cpu else "bfloat16"))
    model, config, own = load_model(args.model, compute=compute, step=args.step)
    shape = f"{config.num_layers} layers of {config.embed_dim}, context {config.max_seq_len}, {compute.dtype}"
    logger.info(f"{args.model}: {shape}")
    if tokenizer and own and tokenizer.fingerprint != own.fingerprint:
        logger.warning(f"{args.tokenizer} is not the tokenizer that lies beside the model: the answer may be nonsense.")
    return TextGenerator(model, tokenizer or own, spm=args.spm, truncate=args.truncate)


def _stream(args: argparse.Namespace, generator: "TextGenerator", prompt: "Prompt") -> "list[Completion]":
    pieces = generator.stream(prompt, max_new_tokens=args.max_new_tokens, stop=args.stop, sampling=_samplings(args)[0])
    for text, completion in pieces:  # noqa: B007  (the last one is returned)
        print(text, end="", flush=True)
    if sys.stdout.isatty():
        print()
    return [completion]


def _print_all(args: argparse.Namespace, generator: "TextGenerator", prompt: "Prompt") -> "list[Completion]":
    import json

    completions = generator.generate(
        [prompt] * args.num_samples, max_new_tokens=args.max_new_tokens, stop=args.stop, sampling=_samplings(args)
    )
    for sample, completion in enumerate(completions):
        if args.json:
            answer = {
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.tokens),
                "log_prob": round(sum(completion.log_probs), 4) + 0.0,  # not -0.0
                "prompt_tokens": completion.num_prompt_tokens,
                "sample": sample,
            }
            print(json.dumps(answer, ensure_ascii=False))
        else:
            print(f"--- sample {sample} ---\n{completion.text}")
    return completions
