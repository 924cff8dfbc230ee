"""The `jaxcoder` command: finds the verb, parses its arguments, runs it, and reports errors in one sentence.

A verb is a module of this package with `add_arguments(parser)` and `run(args) -> int | None`. The first line of its
docstring is its summary; the rest, with examples, is shown below the options. A module with
`PASSES_UNKNOWN_ARGUMENTS = True` gets the options it does not declare in `args.overrides`; for such a verb,
`jaxcoder VERB NAME --help` also passes "--help" in `args.overrides`, to show the fields of the run NAME.
Only the module of the chosen verb is imported, which keeps `jaxcoder --help` fast.
"""

import argparse
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import jaxcoder
from jaxcoder import runtime
from jaxcoder.errors import Interrupted, JaxcoderError
from jaxcoder.formatting import did_you_mean
from jaxcoder.io.os_errors import explain_os_error
from jaxcoder.record.console import clear_live_line, configure_logging

VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("jaxcoder.cli.quickstart", "run the whole pipeline at a small size on local code"),
    "train": ("jaxcoder.cli.train", "train a model, or resume a run"),
    "plan": ("jaxcoder.cli.plan", "estimate memory and speed of a run on other hardware"),
    "launch": ("jaxcoder.cli.launch", "start a run on a pod, a cluster or in several processes"),
    "report": ("jaxcoder.cli.report", "summarize a run and write its HTML report"),
    "doctor": ("jaxcoder.cli.doctor", "diagnose the problems of a run"),
    "finetune": ("jaxcoder.cli.finetune", "fine-tune weights and measure the change per language"),
    "complete": ("jaxcoder.cli.complete", "complete or infill code with a trained model"),
    "convert": ("jaxcoder.cli.convert", "convert checkpoints to and from Hugging Face format"),
    "checkpoint": ("jaxcoder.cli.checkpoint", "inspect and verify a checkpoint"),
    "tokenizer": ("jaxcoder.cli.tokenizer", "train or try a tokenizer"),
    "data": ("jaxcoder.cli.data", "build and inspect token stores"),
    "corpus": ("jaxcoder.cli.corpus", "turn source trees into filtered, deduplicated documents"),
    "drill": ("jaxcoder.cli.drill", "inject faults into a real run and check that it recovers"),
    "bench": ("jaxcoder.cli.bench", "run the benchmarks on this machine"),
}

LOG_LEVELS = ("debug", "info", "warning", "error")
EXIT_BROKEN_PIPE = 141  # the exit status that a shell reports for SIGPIPE


class UsageError(JaxcoderError):
    """An invalid command line."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that suggests the nearest spelling and raises UsageError instead of
    exiting. Sub-parsers have the same class."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.passes_unknown = False

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.rstrip('.')}. See `{self.prog} --help`.")

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown and not self.passes_unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"unexpected argument {unknown[0]!r}")
            # argparse has no public list of its options.
            self.error(f"there is no option {name}{did_you_mean(name, self._option_string_actions)}")
        return namespace, unknown

    def _get_value(self, action, text):
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            required = {int: "an integer", float: "a number"}.get(action.type)
            if required is None:
                raise
            self.error(f"{'/'.join(action.option_strings) or action.dest} is {text!r}, but must be {required}")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            choices = list(map(str, action.choices))
            near = did_you_mean(str(value), choices)
            self.error(f"{name} cannot be {value!r}{near}: choose one of {', '.join(choices)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: `sys.argv[1:]`) and returns the exit code."""
    _make_streams_safe()
    configure_logging()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with runtime.stop_signals_raise():
            code = _dispatch(arguments)
        sys.stdout.flush()  # raises BrokenPipeError here rather than at exit
        return code
    except SystemExit as stop:  # argparse, after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, Exception) as error:
        clear_live_line()
        explained = explain(error)
        if debug:
            traceback.print_exception(error)
        elif explained is None:
            raise
        if explained is None:
            return 1
        code = _report(explained)
        if argv is None:
            # Threads of XLA or Arrow may still run: a normal interpreter exit could crash in them, and a scheduler
            # would see that instead of the exit code.
            sys.stdout.flush()
            os._exit(code)
        return code


def explain(error: BaseException) -> JaxcoderError | None:
    """The error to report for one that the user can fix; None for a bug."""
    if isinstance(error, JaxcoderError):
        return error
    if isinstance(error, KeyboardInterrupt):
        name, code = runtime.signal_of(error)
        message = f"stopped by {name}; everything saved so far is kept."
        return Interrupted(message, exit_code=code, resume_command=runtime.resume_command())
    # Before memory: tensorstore reports RESOURCE_EXHAUSTED for a full disk too.
    if explanation := explain_os_error(error, runtime.resume_command()):
        return JaxcoderError(explanation)
    return runtime.explain_out_of_memory(error, None) if runtime.is_out_of_memory(error) else None


def _report(error: JaxcoderError) -> int:
    kind = "" if isinstance(error, Interrupted) else "error: "
    print(f"jaxcoder: {kind}{error}", file=sys.stderr)
    if isinstance(error, Interrupted) and error.resume_command:
        print(f"jaxcoder: to resume, run: {error.resume_command}", file=sys.stderr)
    return error.exit_code


def _dispatch(arguments: list[str]) -> int:
    options, arguments = _take_global_options(arguments)
    configure_logging(options.log_level, options.quiet)
    verb_at = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    parser = _top_parser()
    parser.parse_args(arguments[:verb_at])
    if verb_at == len(arguments):
        parser.print_help(sys.stderr)
        return UsageError.exit_code
    verb = arguments[verb_at]
    if verb not in VERBS:
        raise UsageError(f"there is no verb {verb!r}{did_you_mean(verb, VERBS)}. See `jaxcoder --help`.")
    module = importlib.import_module(VERBS[verb][0])
    args = parse_verb(verb, module, arguments[verb_at + 1 :], options)
    return module.run(args) or 0


def parse_verb(
    verb: str, module: ModuleType, arguments: list[str], options: argparse.Namespace | None = None
) -> argparse.Namespace:
    """The arguments of a verb, parsed, together with the global `options`. Raises UsageError."""
    summary, _, examples = (module.__doc__ or VERBS[verb][1]).partition("\n")
    parser = Parser(prog=f"jaxcoder {verb}", description=summary, epilog=examples.strip("\n"))
    module.add_arguments(parser)
    _add_global_options(parser)
    parser.passes_unknown = getattr(module, "PASSES_UNKNOWN_ARGUMENTS", False)
    if not parser.passes_unknown:
        return parser.parse_args(arguments, options)
    shows_fields = arguments[:1] != [] and arguments[0][0] != "-" and not {"-h", "--help"}.isdisjoint(arguments)
    if shows_fields:
        arguments = [argument for argument in arguments if argument not in ("-h", "--help")]
    args, unknown = parser.parse_known_args(arguments, options)
    args.overrides = unknown + ["--help"] * shows_fields
    return args


def _top_parser() -> Parser:
    width = max(map(len, VERBS))
    table = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    parser = Parser(
        prog="jaxcoder",
        usage="jaxcoder [OPTIONS] VERB ...",
        description=f"StarCoder in JAX, from raw code to a model that completes code.\n\nverbs:\n{table}",
        epilog="Start with `jaxcoder quickstart`. `jaxcoder VERB --help` describes a verb, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"jaxcoder {jaxcoder.__version__}")
    _add_global_options(parser)
    return parser


def _add_global_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("global options")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error and the libraries' logs")
    group.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="least severe messages to show")
    group.add_argument("--quiet", action="store_true", help="show warnings and errors only, and no progress")


def _take_global_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The global options, which may stand anywhere before a bare `--`, and the other arguments."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(prog="jaxcoder", add_help=False)
    parser.passes_unknown = True
    _add_global_options(parser)
    options, rest = parser.parse_known_args(arguments[:end])
    return options, rest + arguments[end:]


def _make_streams_safe() -> None:
    """Escapes characters that the terminal's encoding lacks, so that printing a completion cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
