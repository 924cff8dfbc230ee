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
    """An optional dependency is not installed; the message holds the command that installs it."""

    def __init__(self, purpose: str, extra: str):
        super().__init__(f"{purpose} needs the extra `{extra}`: run `pip install 'jaxcoder[{extra}]'`.")


class LostProcessError(JaxcoderError):
    """A process of the run never came, died or stands still: nobody's mistake, so a scheduler may start it again."""

    exit_code = EXIT_WATCHDOG


class TransientError(JaxcoderError):
    """A file system or object store failed during the work and may recover, so a scheduler may start it again."""

    exit_code = EXIT_WATCHDOG


class Interrupted(JaxcoderError):
    """The run stopped on a signal after saving. `resume_command` continues it."""

    def __init__(self, message: str, *, exit_code: int, resume_command: str | None = None):
        super().__init__(message)
        self.exit_code = exit_code
        self.resume_command = resume_command
