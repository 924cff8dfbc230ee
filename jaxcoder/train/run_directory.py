"""The directory of a run: its resolved config, checkpoints, metrics. One directory belongs to one configuration.

<output_dir>/config.json      the RunConfig of the run, with absolute paths
<output_dir>/data.json        fingerprints of its token stores
<output_dir>/metrics.jsonl    one line a step
<output_dir>/checkpoints/     one folder a saved step
<output_dir>/tensorboard/     the same metrics as events, when asked for
<output_dir>/profile/         of --profile-steps, or of a SIGUSR1
<output_dir>/events.jsonl     starts, ends and goodput of all attempts
<output_dir>/stacks/          stack traces of hung processes
<output_dir>/.compiled/       compilation cache of a run of several processes
"""

import errno
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace

from jaxcoder.config import RunConfig, serialize
from jaxcoder.data.open import SYNTHETIC
from jaxcoder.errors import ConfigError
from jaxcoder.io.addresses import open_address
from jaxcoder.io.atomic import write_text
from jaxcoder.io.os_errors import access_errors

FREE_FIELDS = (
    "output_dir", "log_every_steps", "tensorboard", "mesh", "checkpoint", "eval", "watchdog", "optimizer.max_skipped",
)  # fmt: skip
"""Fields that may change on resuming: they do not change the result, except for rounding on another mesh."""

_STORE_FIELDS = re.compile(r"data\.(eval_)?store:|data\.corpora\.\d+\.(eval_)?store:")
"""Differences in these are not a change of the run if the stores have the same fingerprints."""


class RunDirectory:
    """Paths of a run, local or gs://, s3://."""

    def __init__(self, path: str):
        self.path = path.rstrip("/")
        self.config_file = f"{self.path}/config.json"
        self.data_file = f"{self.path}/data.json"
        self.metrics_file = f"{self.path}/metrics.jsonl"
        self.checkpoints = f"{self.path}/checkpoints"
        self.tensorboard = f"{self.path}/tensorboard"
        self.profile = f"{self.path}/profile"
        self.events_file = f"{self.path}/events.jsonl"
        self.compiled = f"{self.path}/.compiled"
        self._identity: tuple[int, int] | None = None

    def stacks_file(self, step: int, process: int) -> str:
        """File of the stack traces of a hung process; a local path, even if the run's directory is remote."""
        root = self.path if "://" not in self.path else "stacks-of-" + self.path.rsplit("/", 1)[-1]
        return f"{root}/stacks/step-{step}-process-{process}.txt"

    @classmethod
    def of(cls, config: RunConfig) -> "RunDirectory":
        return cls(config.output_dir or f"runs/{config.name}")

    def claim(
        self,
        config: RunConfig,
        *,
        data: Sequence[str] = (),
        accept_config_change: bool = False,
        is_shared: bool = False,
    ) -> None:
        """Writes the config, or compares it with the existing one.

        data: fingerprints of the token stores, which may be at other paths than before. is_shared: the directory may
        hold other files.

        Raises ConfigError if the directory holds other files, or a run with another configuration (unless that is
        accepted); DataError if it cannot be accessed. An existing config is not replaced: `adopt` does that once the
        run has been restored.
        """
        with access_errors(self.path, "write to"):
            self._claim(config, list(data), accept_config_change, is_shared)

    def _claim(self, config: RunConfig, data: list[str], accept_config_change: bool, is_shared: bool) -> None:
        filesystem, path = open_address(self.config_file)
        if not filesystem.exists(path):
            parent = filesystem._parent(path)
            if filesystem.isfile(parent):
                raise ConfigError(f"the output directory `{self.path}` is a file: give another --output-dir.")
            unexpected = unexpected_entries(_names(filesystem, parent))
            if unexpected and not is_shared:
                raise ConfigError(
                    f"the output directory `{self.path}` contains other files ({', '.join(unexpected[:3])}) and no "
                    "run: give an empty or new one with --output-dir."
                )
            filesystem.makedirs(parent, exist_ok=True)
            self.adopt(config, data)
            return
        with filesystem.open(path, "r") as file:
            text = file.read()
        before = serialize.from_json(text, source=self.config_file)
        changed = changes(before, config)
        if data and data == self._saved_data():
            changed = [line for line in changed if not _STORE_FIELDS.match(line)]
        if changed and not accept_config_change:
            raise ConfigError(
                f"`{self.path}` is a run with another configuration: {'; '.join(changed)}. Give another --output-dir, "
                "or --accept-config-change to continue it with the new one."
            )

    def identify(self) -> None:
        """Remembers the local directory, for `check`; call it once it exists."""
        self._identity = self._current_identity()

    def check(self) -> None:
        """Raises FileNotFoundError if the directory was deleted, moved or replaced since `identify`."""
        if self._identity is not None and self._current_identity() != self._identity:
            raise FileNotFoundError(errno.ENOENT, f"the output directory `{self.path}` was deleted during the run")

    def recreate(self, config: RunConfig, data: Sequence[str]) -> bool:
        """Makes a deleted directory again, for a last checkpoint. False if there is another one in its place."""
        if (found := self._current_identity()) == self._identity:
            return True
        if found is not None:
            return False
        os.makedirs(self.path)
        self.adopt(config, data)
        self.identify()
        return True

    def _current_identity(self) -> tuple[int, int] | None:
        if "://" in self.path:
            return None
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _saved_data(self) -> list[str] | None:
        """The fingerprints of the run's token stores; None for runs of releases that did not save them."""
        filesystem, path = open_address(self.data_file)
        if not filesystem.exists(path):
            return None
        try:
            return json.loads(filesystem.cat_file(path))
        except ValueError:
            return None

    def adopt(self, config: RunConfig, data: Sequence[str] = ()) -> None:
        """Writes the files that make a directory a run's, where they are missing or differ."""
        for file, text in ((self.data_file, json.dumps(list(data))), (self.config_file, serialize.to_json(config))):
            filesystem, path = open_address(file)
            if not filesystem.exists(path) or filesystem.cat_file(path) != text.encode():
                write_text(file, text)

    def read_config(self) -> RunConfig:
        """The config that the directory was claimed with."""
        filesystem, path = open_address(self.config_file)
        with access_errors(self.config_file):
            return serialize.from_json(filesystem.cat_file(path).decode(), source=self.config_file)


def unexpected_entries(names: list[str]) -> list[str]:
    """Entries that a new run's directory may not contain; hidden files may be left by a killed process."""
    return [name for name in names if not name.startswith(".")]


def changes(before: RunConfig, config: RunConfig) -> list[str]:
    """One line for every difference in a field that a run may not change silently."""
    before, config = with_absolute_paths(before), with_absolute_paths(config)
    return [line for line in serialize.diff(before, config) if not line.startswith(FREE_FIELDS)]


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with absolute local paths of data and initial weights, which then hold in any working directory."""

    def absolute(path: str) -> str:
        is_local = path not in ("", SYNTHETIC) and "://" not in path
        return os.path.abspath(path) if is_local else path

    data = config.data
    corpora = tuple(
        replace(corpus, store=absolute(corpus.store), eval_store=corpus.eval_store and absolute(corpus.eval_store))
        for corpus in data.corpora
    )
    eval_store = data.eval_store and absolute(data.eval_store)
    data = replace(data, store=absolute(data.store), eval_store=eval_store, corpora=corpora)
    # init_from may be the id of a model on a hub.
    is_path = bool(config.init_from) and os.path.exists(config.init_from)
    return replace(config, data=data, init_from=absolute(config.init_from) if is_path else config.init_from)


def _names(filesystem, path: str) -> list[str]:
    if not filesystem.isdir(path):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False))
