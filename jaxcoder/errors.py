"""Errors that end in one sentence.

Whatever a user can cause and can mend is raised as a `JaxcoderError`: its message names the thing, the value and the
way out, and the command line prints it without a traceback (`--debug` shows one) and exits with `exit_code`.
Anything else is a bug and keeps its traceback.
"""

EXIT_USER_ERROR = 2
EXIT_WATCHDOG = 75
EXIT_SIGHUP = 129
EXIT_CTRL_C = 130
EXIT_SIGTERM = 143


class JaxcoderError(Exception):
    """Base of every error a user can mend. The message is a full sentence with the way out."""

    exit_code = EXIT_USER_ERROR


class ConfigError(JaxcoderError):
    """A run configuration that cannot work: unknown field, impossible value, sizes that do not divide."""


class DataError(JaxcoderError):
    """Source files, corpora, tokenizers and token stores that are missing, empty, damaged or do not match."""


class CheckpointError(JaxcoderError):
    """A checkpoint that is missing, damaged, or belongs to another model or run."""


class ConversionError(JaxcoderError):
    """Weights in a foreign format that do not fit: a tensor missing, left over, misshapen, or an unsafe file."""


class TrainingError(JaxcoderError):
    """Training that goes on but does not learn: steps whose loss is not finite, again and again."""


class MissingExtraError(JaxcoderError):
    """An optional dependency is not installed; the message has the command that installs it."""

    def __init__(self, purpose: str, extra: str):
        super().__init__(f"{purpose} needs the extra `{extra}`: run `{install_command(extra)}`.")


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra for this installation: from its clone, or one by one."""
    import shlex
    import sys
    from importlib import metadata
    from pathlib import Path

    pip = "pip" if sys.prefix != sys.base_prefix else "python3 -m pip"
    clone = Path(__file__).parent.parent
    if (clone / "setup.cfg").is_file():
        return f"{pip} install -e {shlex.quote(f'{clone}[{extra}]')}"
    try:
        requirements = metadata.requires("jaxcoder") or []
    except metadata.PackageNotFoundError:
        requirements = []
    of_extra = [text.partition(";")[0].strip() for text in requirements if f'extra == "{extra}"' in text]
    return f"{pip} install {shlex.join(of_extra)}" if of_extra else f"{pip} install -e '.[{extra}]' in the clone"


class LostProcessError(JaxcoderError):
    """A process of the run never arrived, died or hangs. Not a user error, so a scheduler may restart the run."""

    exit_code = EXIT_WATCHDOG


class TransientError(JaxcoderError):
    """A file system or object store failed during the work and may recover, so a scheduler may restart it."""

    exit_code = EXIT_WATCHDOG


class Interrupted(JaxcoderError):
    """The run stopped on a signal after saving. `resume_command` continues it."""

    def __init__(self, message: str, *, exit_code: int, resume_command: str | None = None):
        super().__init__(message)
        self.exit_code = exit_code
        self.resume_command = resume_command
