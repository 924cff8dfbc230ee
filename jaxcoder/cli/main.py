"""`jaxcoder VERB ...`: finds the verb, parses its arguments, and ends every failure in one sentence.

A verb is a module of this package with `add_arguments(parser)` and `run(args) -> int | None`. The first line of its
docstring is the one-line help, the rest teaches with an example under the options. A module that sets
`PASSES_UNKNOWN_ARGUMENTS = True` finds the options it does not declare in `args.overrides`; for such a verb,
`jaxcoder VERB NAME --help` hands `--help` over in `args.overrides` too, so that the fields of NAME can be shown.
Only the module of the chosen verb is imported, so that `jaxcoder --help` answers at once.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import jaxcoder
from jaxcoder import runtime
from jaxcoder.errors import EXIT_CTRL_C, EXIT_SIGTERM, Interrupted, JaxcoderError
from jaxcoder.formatting import did_you_mean
from jaxcoder.io.os_errors import explain_os_error
from jaxcoder.record.console import clear_live_line, configure_logging

VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("jaxcoder.cli.quickstart", "the whole road at small size, on the code of this machine"),
    "train": ("jaxcoder.cli.train", "train a model, or go on with a stopped run"),
    "plan": ("jaxcoder.cli.plan", "whether a run fits hardware that is not here, and how fast it goes"),
    "launch": ("jaxcoder.cli.launch", "start a run on a pod, a cluster or several processes"),
    "report": ("jaxcoder.cli.report", "what a run did: a page, and a summary here"),
    "doctor": ("jaxcoder.cli.doctor", "what is wrong with a run, and what to try"),
    "finetune": ("jaxcoder.cli.finetune", "train weights on, and see what every language lost"),
    "complete": ("jaxcoder.cli.complete", "complete or infill code with a trained model"),
    "convert": ("jaxcoder.cli.convert", "PyTorch-format weights out of a checkpoint, or into one"),
    "checkpoint": ("jaxcoder.cli.checkpoint", "look into a checkpoint"),
    "tokenizer": ("jaxcoder.cli.tokenizer", "train a tokenizer, or try one"),
    "data": ("jaxcoder.cli.data", "documents into a token store, ready to train on"),
    "corpus": ("jaxcoder.cli.corpus", "source trees into filtered, deduplicated documents"),
    "drill": ("jaxcoder.cli.drill", "disturb a real run in every way, and see what survives"),
    "bench": ("jaxcoder.cli.bench", "measure, side by side, what is claimed"),
}

EXIT_BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended


class UsageError(JaxcoderError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """argparse with our manners: no abbreviations, the nearest spelling suggested, errors raised and not exited.

    Sub-parsers made by `add_subparsers` get the same class and so the same manners.
    """

    def __init__(self, *args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs):
        super().__init__(*args, allow_abbrev=allow_abbrev, formatter_class=formatter_class, **kwargs)
        self.passes_unknown = False

    def error(self, message: str) -> None:
        raise UsageError(f"{message.rstrip('.')}. See `{self.prog} --help`.")

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown and not self.passes_unknown:
            self.error(self._explain_unknown(unknown[0]))
        return namespace, unknown

    def _get_value(self, action, text):
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError:
            wanted = {int: "a whole number", float: "a number"}.get(action.type)
            if wanted is None:
                raise
            self.error(f"{'/'.join(action.option_strings) or action.dest} is {text!r}, but has to be {wanted}")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            what = action.metavar or action.dest if not action.option_strings else action.option_strings[-1]
            self.error(
                f"{what} cannot be {value!r}{did_you_mean(str(value), choices)}; it is one of {', '.join(choices)}"
            )

    def _explain_unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"nothing takes the argument {argument!r}"
        name = argument.split("=")[0]
        # argparse has no public list of its options; this attribute has had its name since Python 2.7.
        return f"there is no option {name}{did_you_mean(name, self._option_string_actions)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default `sys.argv[1:]`) and returns the exit code."""
    _make_streams_safe()
    configure_logging()
    arguments, debug = _take_debug(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe shows here, and not as a traceback at exit
        return code
    except SystemExit as stop:  # argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, Exception) as error:
        clear_live_line()
        explained = explain(error)
        if debug:
            import traceback

            traceback.print_exception(error)
        elif explained is None:
            raise
        if explained is None:
            return 1
        code = _report(explained)
        if argv is None:
            # XLA's or Arrow's threads may be at work still: taking the interpreter down under them can crash, and a
            # scheduler would see that instead of the exit code.
            sys.stdout.flush()
            os._exit(code)
        return code


def explain(error: BaseException) -> JaxcoderError | None:
    """The sentence for an error that a user can mend, whoever raised it; None for a bug."""
    if isinstance(error, JaxcoderError):
        return error
    if isinstance(error, KeyboardInterrupt):
        name, code = ("SIGTERM", EXIT_SIGTERM) if isinstance(error, runtime.Terminated) else ("Ctrl-C", EXIT_CTRL_C)
        message = f"stopped by {name}; what was already saved is kept."
        return Interrupted(message, exit_code=code, resume_command=runtime.resume_command())
    # Before memory: tensorstore reports RESOURCE_EXHAUSTED for a full disk too.
    if message := explain_os_error(error, runtime.resume_command()):
        return JaxcoderError(message)
    return runtime.explain_out_of_memory(error, None) if runtime.is_out_of_memory(error) else None


def _report(error: JaxcoderError) -> int:
    kind = "" if isinstance(error, Interrupted) else "error: "
    print(f"jaxcoder: {kind}{error}", file=sys.stderr)
    if isinstance(error, Interrupted) and error.resume_command:
        print(f"jaxcoder: to go on, run: {error.resume_command}", file=sys.stderr)
    return error.exit_code


def _dispatch(arguments: list[str]) -> int:
    verb_at = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    _top_parser().parse_args(arguments[:verb_at])
    if verb_at == len(arguments):
        _top_parser().print_help(sys.stderr)
        return UsageError.exit_code
    verb, rest = arguments[verb_at], arguments[verb_at + 1 :]
    if verb not in VERBS:
        raise UsageError(f"there is no verb {verb!r}{did_you_mean(verb, VERBS)}. See `jaxcoder --help`.")
    module = importlib.import_module(VERBS[verb][0])
    args = _parse_verb(verb, module, rest)
    with runtime.sigterm_raises():
        return module.run(args) or 0


def _parse_verb(verb: str, module: ModuleType, rest: list[str]) -> argparse.Namespace:
    summary, _, lesson = (module.__doc__ or VERBS[verb][1]).partition("\n")
    parser = Parser(prog=f"jaxcoder {verb}", description=summary, epilog=lesson.strip("\n"))
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.passes_unknown = "PASSES_UNKNOWN_ARGUMENTS" in vars(module) and module.PASSES_UNKNOWN_ARGUMENTS
    if not parser.passes_unknown:
        return parser.parse_args(rest)
    wants_fields = bool(rest) and not rest[0].startswith("-") and not {"-h", "--help"}.isdisjoint(rest)
    if wants_fields:
        rest = [argument for argument in rest if argument not in ("-h", "--help")]
    args, args_overrides = parser.parse_known_args(rest)
    args.overrides = args_overrides + ["--help"] * wants_fields
    return args


def _top_parser() -> Parser:
    width = max(map(len, VERBS))
    table = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
    parser = Parser(
        prog="jaxcoder",
        usage="jaxcoder VERB ... [--debug]",
        description=f"The StarCoder system in JAX: raw code in, a model that completes it out.\n\nverbs:\n{table}",
        epilog="Start with `jaxcoder quickstart`; `jaxcoder VERB --help` teaches a verb by example.",
    )
    parser.add_argument("--version", action="version", version=f"jaxcoder {jaxcoder.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """`--debug` may stand anywhere before a bare `--`, also behind the verb's own sub-verb."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return kept + list(arguments[end:]), len(kept) < end


def _make_streams_safe() -> None:
    """Characters that the terminal's encoding lacks are escaped, so that printing a completion cannot fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
