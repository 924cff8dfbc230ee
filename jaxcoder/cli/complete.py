"""Complete or infill code with a trained model.

MODEL is a run's directory, one of its checkpoints, or a directory in PyTorch format (config.json, model.safetensors,
tokenizer.json). The completion is streamed to standard output, everything else goes to standard error. Without
--temperature decoding is greedy and therefore deterministic.

    jaxcoder complete runs/quickstart --prefix 'def fibonacci(n):'
    jaxcoder complete runs/quickstart --prefix 'def area(r):
        return ' --suffix ' * r ** 2'
    jaxcoder complete MODEL --prefix-file before.py --suffix-file after.py --truncate
    git show HEAD:setup.py | jaxcoder complete MODEL --prefix-file - --stop $'\\n' --stop '#'
    jaxcoder complete MODEL --prefix 'import ' --temperature 0.8 --top-p 0.95 --num-samples 3 --seed 7 --json

With a suffix (even an empty one) the model infills between the two. Prefix and suffix are used verbatim, whitespace
included. Generation ends at a stop string, at the end of the document, after --max-new-tokens, or at the end of the
context. Sample k of a seed does not depend on --num-samples. With --json each line is an object: text, finish_reason
("stop" or "length"), tokens, log_prob (summed over the tokens), prompt_tokens and sample.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcoder.cli.start import start_jax

if TYPE_CHECKING:
    from jaxcoder.inference.generate import Completion, TextGenerator
    from jaxcoder.inference.prompts import Prompt


logger = logging.getLogger(__name__)

MOST_SAMPLES = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory of a run, a checkpoint, or PyTorch-format weights")
    prefix, suffix = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    prefix.add_argument("--prefix", metavar="TEXT", help="code before the completion")
    prefix.add_argument("--prefix-file", metavar="FILE", help="the same from a file; - is standard input")
    suffix.add_argument("--suffix", metavar="TEXT", help="code after the completion (infilling)")
    suffix.add_argument("--suffix-file", metavar="FILE", help="the same from a file; - is standard input")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="maximum number of new tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text (repeatable)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling: probability mass to keep"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="number of completions (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (default: 0)")
    parser.add_argument("--spm", action="store_true", help="infill in suffix-prefix-middle order")
    parser.add_argument("--truncate", action="store_true", help="truncate a prompt that is too long, at line starts")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per completion, when all are finished"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json to use instead of the model's own")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the latest)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="compute dtype (default: float32 on CPUs, else bfloat16)"
    )


def run(args: argparse.Namespace) -> int | None:
    prompt = _prompt(args)
    _check(args)  # before the weights are read

    generator = _load(args)
    start = time.perf_counter()
    answer = _print_all if args.json or args.num_samples > 1 else _stream
    completions = answer(args, generator, prompt)
    seconds = time.perf_counter() - start
    count = sum(len(completion.tokens) for completion in completions)
    reasons = ", ".join(sorted({_REASONS[completion.finish_reason] for completion in completions}))
    logger.info(f"{count} tokens in {seconds:.1f} s after a prompt of {completions[0].num_prompt_tokens}; {reasons}")
    return None


_REASONS = {
    "stop": "stopped at the end of the document or at a stop string",
    "length": "stopped at --max-new-tokens or at the end of the context",
}


def _prompt(args: argparse.Namespace) -> "Prompt":
    from jaxcoder.errors import ConfigError
    from jaxcoder.inference.prompts import Prompt

    if args.prefix_file == "-" and args.suffix_file == "-":
        raise ConfigError("Prefix and suffix cannot both be read from standard input: put one of them into a file.")
    prefix = _text(args.prefix, args.prefix_file, "prefix")
    suffix = _text(args.suffix, args.suffix_file, "suffix")
    if prefix is None and suffix is None:
        raise ConfigError("There is no prompt: give --prefix TEXT or --prefix-file FILE (- is standard input).")
    return Prompt(prefix or "", suffix)


def _text(text: str | None, file: str | None, name: str) -> str | None:
    """The text, or the content of the file without newline translation."""
    from jaxcoder.errors import DataError

    if file == "-":
        name, content = "standard input", sys.stdin.buffer.read()
    elif file is not None:
        name, content = file, Path(file).read_bytes()
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
        raise ConfigError(f"--num-samples is {args.num_samples}: give 1 to {MOST_SAMPLES:,}.")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {args.max_new_tokens}: give at least 1.")
    if args.step is not None and args.step < 0:
        raise ConfigError(f"--step is {args.step}: steps count from 0.")
    _samplings(args)
    if args.temperature == 0:
        without = {"--num-samples": args.num_samples > 1, "--top-p": args.top_p != 1, "--top-k": args.top_k is not None}
        for option in (option for option, given in without.items() if given):
            raise ConfigError(
                f"{option} has no effect with greedy decoding: add --temperature 0.8, or another value above 0."
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
    on_cpu = jax.default_backend() == "cpu"  # XLA emulates bfloat16 on CPUs at half the speed
    compute = ComputeConfig(dtype=args.dtype or ("float32" if on_cpu else "bfloat16"))
    model, config, own = load_model(args.model, compute=compute, step=args.step)
    shape = f"{config.num_layers} layers of {config.embed_dim}, context {config.max_seq_len}, {compute.dtype}"
    logger.info(f"{args.model}: {shape}")
    if tokenizer and own and tokenizer.fingerprint != own.fingerprint:
        logger.warning(f"{args.tokenizer} differs from the tokenizer of the model: completions may be wrong.")
    return TextGenerator(model, tokenizer or own, spm=args.spm, truncate=args.truncate)


def _stream(args: argparse.Namespace, generator: "TextGenerator", prompt: "Prompt") -> "list[Completion]":
    chunks = generator.stream(prompt, max_new_tokens=args.max_new_tokens, stop=args.stop, sampling=_samplings(args)[0])
    for text, completion in chunks:  # noqa: B007  (the last one is returned)
        print(text, end="", flush=True)
    if sys.stdout.isatty():
        print()
    assert completion is not None  # the last item of the stream carries it
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
