"""seqio: the tokenizer as a Vocabulary, corpora as Tasks and Mixtures, and the examples of any registered Task.

The extra `seqio` installs seqio and TensorFlow, which no other module imports; without it this module can be imported,
and its functions raise MissingExtraError. Training does not use it: it reads token stores.

A Task made here has one feature, `targets`, int32 [n]: a document and its end token or, with `seq_len`, a window of
that many tokens of a store. The examples of Mixtures are windows, so that a rate is a share of the samples, as a weight
of the run's config. Fill-in-the-middle is not applied.

Reference: https://github.com/google/seqio
"""

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcoder.config.schema import DataConfig
from jaxcoder.data.mixture import Mixture, Phase, exact
from jaxcoder.data.permutation import Permutation
from jaxcoder.data.randomness import Purpose
from jaxcoder.data.store import MANIFEST, TokenStore
from jaxcoder.errors import ConfigError, DataError, MissingExtraError
from jaxcoder.io.document_files import ORIGIN_FIELDS, document_files, read_documents
from jaxcoder.tokenizer.tokenizer import Tokenizer

_missing: ImportError | None = None
try:
    import seqio
    import tensorflow as tf
except ImportError as error:
    _missing = error

TARGETS = "targets"
TRAIN = "train"


def require_seqio(purpose: str) -> None:
    """Raise MissingExtraError unless the extra `seqio` is installed and can be imported."""
    if _missing is not None:
        raise MissingExtraError(purpose, "seqio") from _missing


class CodeVocabulary(object if _missing else seqio.Vocabulary):
    """A tokenizer as a `seqio.Vocabulary`, with the same ids.

    encode, encode_tf: ids of ordinary text without an end token; text that spells a special token stays text.
    `encode_tf` takes a string [] or [n] (giving int32 [ids] or ragged [n, ids]); bytes that are not UTF-8 become
    U+FFFD.
    decode, decode_tf: text up to the first end token, which is not shown; other special tokens as their names. Bytes
    that are no character become U+FFFD in `decode` and stay bytes in `decode_tf`. An id that no token has is an error.
    eos_id: the end token. bos_id, unk_id: None; any text can be spelled in bytes.
    pad_id: 0, because seqio always pads with 0. For StarCoder's tokenizers 0 *is* the end token, so
    seqio's feature converters give end tokens, like padding, no weight in the loss. No id is moved to avoid that.

    The graph calls back into Python (`tf.numpy_function`): it runs in this process and cannot be exported.
    Two vocabularies are equal if their tokenizers have the same fingerprint.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Raises MissingExtraError without the extra `seqio`."""
        require_seqio("A tokenizer as a seqio.Vocabulary")
        super().__init__()
        self.tokenizer = tokenizer

    bos_id = None
    unk_id = None

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str | bytes) -> list[int]:
        return self.tokenizer.encode(s.decode(errors="replace") if isinstance(s, bytes) else s)

    def _bytes(self, ids: Sequence[int]) -> bytes:
        ids = [int(id_) for id_ in ids]
        return self.tokenizer.decode_bytes(ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._bytes(ids).decode(errors="replace")

    def _encode_tf(self, s: "tf.Tensor"):
        def encode(texts: bytes | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            # as objects: numpy's own strings lose the zero bytes at their end
            ids = [self._encode(text) for text in np.asarray(texts, object).ravel()]
            return np.concatenate([[], *ids]).astype(np.int32), np.array([len(row) for row in ids], np.int64)

        if s.shape.rank not in (0, 1):
            raise ValueError(f"encode_tf takes a string tensor of rank 0 or 1, not of shape {s.shape}")
        values, lengths = tf.numpy_function(encode, [s], [tf.int32, tf.int64], stateful=False)
        values.set_shape([None])
        lengths.set_shape([1] if s.shape.rank == 0 else s.shape)
        return values if s.shape.rank == 0 else tf.RaggedTensor.from_row_lengths(values, lengths)

    def _decode_tf(self, ids: "tf.Tensor") -> "tf.Tensor":
        def decode(rows: np.ndarray) -> np.ndarray:
            texts = [self._bytes(row) for row in rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])]
            return np.array(texts, object).reshape(rows.shape[:-1])

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def decode_tf(self, ids: "tf.Tensor") -> "tf.Tensor":
        """int32 [..., n] -> string [...]. The base class would put 0 behind the end token, which may be a letter."""
        return self._decode_tf(ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CodeVocabulary) and other.tokenizer.fingerprint == self.tokenizer.fingerprint

    def __hash__(self) -> int:
        return hash(self.tokenizer.fingerprint)

    def __str__(self) -> str:
        return f"CodeVocabulary({self.tokenizer.vocab_size} ids, fingerprint {self.tokenizer.fingerprint[:12]})"

    __repr__ = __str__


# Our corpora for seqio ------------------------------------------------------------------------------------------------


class DocumentsSource(object if _missing else seqio.DataSource):
    """Documents of files, encoded as they are read: `targets` without an end token, repo_name, path, lang.

    `paths`: split -> what `read_documents` takes. A shard is a file; shuffling is of files.
    """

    supports_arbitrary_sharding = False

    def __init__(self, paths: Mapping[str, object], tokenizer: Tokenizer):
        self._files = {split: document_files(path) for split, path in paths.items()}
        self._tokenizer = tokenizer
        super().__init__(splits=self._files)

    def list_shards(self, split: str) -> list[str]:
        return self._files[split]

    def get_dataset(self, split=TRAIN, shuffle=True, seed=None, shard_info=None, **unused) -> "tf.data.Dataset":
        """The documents of a split, or of the files of a shard, in order (of shuffled files)."""
        files = np.array(self._files[split], object)
        if shuffle:
            files = files[np.random.default_rng(None if seed is None else int(seed)).permutation(len(files))]
        if shard_info:
            files = files[shard_info.index :: shard_info.num_shards]

        def documents() -> Iterator[dict]:
            for document in read_documents(list(files)):
                ids = np.array(self._tokenizer.encode_document(document), np.int32)
                yield {TARGETS: ids} | {field: getattr(document, field) for field in ORIGIN_FIELDS}

        return tf.data.Dataset.from_generator(documents, output_signature=_document_spec())


class StoreSource(object if _missing else seqio.DataSource):
    """A token store: documents like those of DocumentsSource or, with `seq_len`, windows that follow one another.

    `stores`: split -> open store. Any sharding; shuffling is complete, by a keyed permutation.
    """

    supports_arbitrary_sharding = True

    def __init__(self, stores: Mapping[str, TokenStore], seq_len: int | None = None):
        self._stores = dict(stores)
        self._seq_len = seq_len
        counts = {
            split: store.num_documents if seq_len is None else store.num_tokens // seq_len
            for split, store in stores.items()
        }
        super().__init__(splits=counts, num_input_examples=counts, performs_internal_shuffling=True)

    def list_shards(self, split: str) -> list[str]:
        return [self._stores[split].path]

    def get_dataset(self, split=TRAIN, shuffle=True, seed=None, shard_info=None, **unused) -> "tf.data.Dataset":
        """The examples of a split, or every num_shards-th of them, in order or in the order of `seed`."""
        store, count, seq_len = self._stores[split], self.num_input_examples(split), self._seq_len
        order = lambda number: number  # noqa: E731
        if shuffle:
            seed = int(np.random.default_rng().integers(1 << 31) if seed is None else seed)
            order = Permutation.from_seed(count, seed, Purpose.WINDOW_ORDER, 0)

        def window(number: np.ndarray) -> np.ndarray:
            start = int(order(int(number))) * seq_len
            return store.read(start, start + seq_len)

        def document(number: np.ndarray) -> tuple:
            row = int(order(int(number)))
            start, stop = (int(place) for place in store.document_offsets[row : row + 2])
            origin = (store.documents[field][row].as_py().encode() for field in ORIGIN_FIELDS)
            return store.read(start, stop - 1), *(np.array(value, object) for value in origin)

        def example(number: "tf.Tensor") -> dict:
            spec = {TARGETS: tf.TensorSpec([seq_len], tf.int32)} if seq_len else _document_spec()
            types = [each.dtype for each in spec.values()]
            read = tf.numpy_function(window if seq_len else document, [number], types, stateful=False)
            for tensor, each in zip(read, spec.values(), strict=True):
                tensor.set_shape(each.shape)
            return dict(zip(spec, read, strict=True))

        first, step = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
        return tf.data.Dataset.range(first, count, step).map(example, num_parallel_calls=tf.data.AUTOTUNE)


def _document_spec() -> dict:
    strings = {field: tf.TensorSpec([], tf.string) for field in ORIGIN_FIELDS}
    return {TARGETS: tf.TensorSpec([None], tf.int32)} | strings


def add_task(name: str, corpus, *, tokenizer: Tokenizer | None = None, seq_len: int | None = None) -> "seqio.Task":
    """Register a corpus as the seqio Task `name`.

    `corpus` is a token store, or documents (a path or several); or a dict of them by split, where "train" is meant
    without one. A store brings its tokenizer, documents need one. `seq_len` makes windows of a store; without it an
    example is a document and its end token.

    Raises DataError for what cannot be read or does not go together, ConfigError for a name that is taken or odd.
    """
    require_seqio("A corpus as a seqio Task")
    paths = dict(corpus) if isinstance(corpus, Mapping) else {TRAIN: corpus}
    are_stores = [_is_store(path) for path in paths.values()]
    if all(are_stores):
        stores = {split: TokenStore.open(path) for split, path in paths.items()}
        tokenizer = tokenizer or next(iter(stores.values())).tokenizer()
        for store in stores.values():
            store.check_tokenizer(tokenizer)
        source = StoreSource(stores, seq_len)
    elif any(are_stores) or seq_len is not None:
        raise DataError(
            f"The corpus of the seqio Task {name!r} must be token stores only, or documents only, and windows "
            f"(seq_len) are made of stores only, but it is {', '.join(map(str, paths.values()))}: "
            "build the stores first."
        )
    elif tokenizer is None:
        raise DataError(f"The seqio Task {name!r} is made of documents: give the tokenizer that is to encode them.")
    else:
        source = DocumentsSource(paths, tokenizer)
    feature = seqio.Feature(CodeVocabulary(tokenizer), add_eos=seq_len is None)
    with _bad_names():
        return seqio.TaskRegistry.add(
            name,
            source=source,
            preprocessors=[seqio.preprocessors.append_eos],
            output_features={TARGETS: feature},
        )


def add_mixture(name: str, data: DataConfig, *, seq_len: int, stage: int = 0) -> "seqio.Mixture":
    """Register the mixture of a run's data configuration as the seqio Mixture `name`, and its corpora as Tasks.

    The Tasks are `name:0`, `name:1` and so on, windows of `seq_len` of data.corpora (or of data.store); the rates are
    the weights (of data.stages[stage], where it has its own), or the numbers of tokens where those are None. seqio's
    rates never change, so max_epochs is refused and of several stages one is taken.

    Raises DataError like `add_task`, ConfigError for max_epochs, a taken name, or a weight below 0.
    """
    require_seqio("A mixture as a seqio Mixture")
    stores = [corpus.store for corpus in data.corpora] or [data.store]
    weights = [corpus.weight for corpus in data.corpora] or [None]
    if data.stages and data.stages[stage].weights:
        weights = data.stages[stage].weights
    if capped := [corpus.store for corpus in data.corpora if corpus.max_epochs is not None]:
        raise ConfigError(
            f"data.corpora caps {capped[0]} with max_epochs, but the rates of a seqio Mixture never change: leave the "
            "cap away, or train from the stores."
        )
    if any(weight is not None and weight < 0 for weight in weights):
        raise ConfigError(f"The mixture {name!r} has the weights {list(weights)}, but a weight is 0 or larger.")
    if taken := {name, *(f"{name}:{i}" for i in range(len(stores)))} & {*_names()}:
        raise ConfigError(f"seqio has a Task or Mixture {min(taken)!r} already: choose another name.")
    tasks = [add_task(f"{name}:{number}", store, seq_len=seq_len) for number, store in enumerate(stores)]
    tokens = [TokenStore.open(store).num_tokens for store in stores]
    rates = [float(count if weight is None else weight) for weight, count in zip(weights, tokens, strict=True)]
    with _bad_names():
        return seqio.MixtureRegistry.add(name, [pair for pair in zip(tasks, rates, strict=True) if pair[1] > 0])


def _is_store(path: object) -> bool:
    import fsspec

    if not isinstance(path, str | os.PathLike):
        return False
    fs, root = fsspec.url_to_fs(os.fspath(path))
    return fs.isfile(f"{root.rstrip('/')}/{MANIFEST}") and fs.isfile(f"{root.rstrip('/')}/token_bytes.npy")


@contextlib.contextmanager
def _bad_names() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"seqio does not take this name ({error}): choose another one.") from error


def _names() -> list[str]:
    return sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})


# Registered Tasks and Mixtures as examples ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One example: for each feature asked for its text (bytes) or ids (int32 [n]), and where it is from."""

    values: tuple[bytes | np.ndarray, ...]
    task: str
    origin: dict[str, str]


class Examples:
    """The examples of a registered Mixture or Task, always the same in the same order, off the network.

    Without `num_examples` every Task is read once, completely, one after the other: rates are ignored. With
    it, so many examples are taken at the Mixture's rates, Tasks starting again where they end.

    features: the names asked for, or those of inputs and targets that there are.
    vocabularies: of the features that are ids, by feature and Task.
    num_examples: how many there are, None where unknown.
    """

    def __init__(
        self,
        name: str,
        *,
        modules: Sequence[str] = (),
        features: Sequence[str] | None = None,
        split: str = TRAIN,
        num_examples: int | None = None,
        seed: int = 0,
    ):
        """Raises DataError for a name, a split or a feature that is not there, or a module that cannot be imported."""
        require_seqio("Reading a seqio Mixture")
        _import_modules(modules)
        if name not in _names():
            raise DataError(
                f"seqio has no Mixture or Task {name!r} (it has {', '.join(_names()[:20]) or 'none'}): name the module "
                "that registers it with --module-import."
            )
        provider = seqio.get_mixture_or_task(name)
        self.name, self.seed, self.split = name, seed, split
        self.tasks = [task for task in seqio.get_subtasks(provider) if split in task.splits]
        if not self.tasks:
            raise DataError(f"{name} has no split {split!r} (it has {', '.join(provider.splits)}): name one of these.")
        self.rates = {
            task.name: provider.get_rate(task) if isinstance(provider, seqio.Mixture) else 1.0 for task in self.tasks
        }
        specs = {task.name: self._dataset(task).element_spec for task in self.tasks}
        self.features = tuple(features or self._usual_features(specs))
        self.vocabularies = {
            (feature, task.name): self._vocabulary(feature, task, specs[task.name])
            for task in self.tasks
            for feature in self.features
            if specs[task.name].get(feature) is None or specs[task.name][feature].dtype != tf.string
        }
        self._drawn = num_examples
        counts = [task.num_input_examples(split) for task in self.tasks]
        self.num_examples = num_examples or (None if None in counts else sum(counts))

    def __iter__(self) -> Iterator[Example]:
        """Raises DataError where seqio or TensorFlow cannot read on."""
        with contextlib.suppress(RuntimeError):  # TensorFlow is in use already and has taken what it wants
            tf.config.set_visible_devices([], "GPU")
        tf.random.set_seed(self.seed)
        try:
            yield from self._read_once() if self._drawn is None else self._draw()
        except tf.errors.OpError as error:
            reason = error.message.splitlines()[0] if error.message else type(error).__name__
            raise DataError(f"seqio cannot read {self.name} ({reason}): fix the Task, then run again.") from error

    def _read_once(self) -> Iterator[Example]:
        for task in self.tasks:
            for row in self._selected(self._dataset(task)):
                yield self._example(row, task.name)

    def _draw(self) -> Iterator[Example]:
        """By `Mixture`, whose shares are exact (seqio samples at random)."""
        rule = Mixture([Phase(0, tuple(exact(self.rates[task.name]) for task in self.tasks))], [None] * len(self.tasks))
        rows = [iter(self._selected(self._dataset(task, num_epochs=None))) for task in self.tasks]
        for index in range(self._drawn):
            task, _ = rule.source(index)
            try:
                yield self._example(next(rows[task]), self.tasks[task].name)
            except StopIteration:
                name = f"{self.tasks[task].name}, split {self.split!r},"
                raise DataError(f"The seqio Task {name} has no examples: leave it out of the Mixture.") from None

    def _dataset(self, task, num_epochs: int | None = 1):
        return task.get_dataset(split=self.split, shuffle=False, seed=self.seed, num_epochs=num_epochs)

    def _selected(self, dataset) -> Iterator[dict]:
        """Only what is asked for, and the origin where the examples know it, as numpy arrays and bytes."""
        spec = dataset.element_spec
        origin = [field for field in ORIGIN_FIELDS if field in spec and spec[field].dtype == tf.string]
        options = tf.data.Options()
        options.deterministic = True
        names = {*self.features, *origin}
        return dataset.map(lambda row: {name: row[name] for name in names}).with_options(options).as_numpy_iterator()

    def _example(self, row: dict, task: str) -> Example:
        values = tuple(_value(row[feature]) for feature in self.features)
        known = {field: row[field] for field in ORIGIN_FIELDS if isinstance(row.get(field), bytes)}
        return Example(values, task, {field: value.decode(errors="replace") for field, value in known.items()})

    def _usual_features(self, specs: dict[str, dict]) -> list[str]:
        usual = [name for name in ("inputs", TARGETS) if all(name in spec for spec in specs.values())]
        if not usual:
            has = ", ".join(sorted({name for spec in specs.values() for name in spec}))
            raise DataError(f"{self.name} has no inputs or targets (it has {has}): name others with --features.")
        return usual

    def _vocabulary(self, feature: str, task, spec: dict):
        """The vocabulary of a feature of ids. DataError if it is missing or of another kind."""
        if feature not in spec:
            raise DataError(
                f"The seqio Task {task.name} has no feature {feature!r}: name some of {', '.join(sorted(spec))} with "
                "--features."
            )
        if feature not in task.output_features or not spec[feature].dtype.is_integer or spec[feature].shape.rank != 1:
            raise DataError(
                f"The feature {feature!r} of the seqio Task {task.name} is neither text nor a list of ids "
                f"({spec[feature].dtype.name}, shape {spec[feature].shape}): name others with --features."
            )
        return task.output_features[feature].vocabulary


def _value(value: bytes | np.ndarray) -> bytes | np.ndarray:
    if isinstance(value, bytes):
        return value
    return b"".join(value.ravel()) if value.dtype == object else value.astype(np.int32)


def _import_modules(modules: Sequence[str]) -> None:
    """Import the modules that register Tasks; those in the current directory are found too."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise DataError(
                f"Cannot import the module {module} ({error}): run in its directory, or install its package."
            ) from error
