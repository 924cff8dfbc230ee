"""Measures tokenizers on a corpus: bytes per token by language, unused ids, digits, whitespace, longest tokens.

Compares any tokenizers that the `tokenizers` library opens. Only ordinary text is measured: text between two special
parts of a document is encoded separately, and specials are not counted. Larger corpora are sampled: the complete
documents with the smallest hashes of (seed, number), as many as fit under the limit. The numbers depend only on the
documents, the tokenizers, the limit and the seed.
"""

import hashlib
import heapq
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxcoder.errors import ConfigError, DataError
from jaxcoder.formatting import format_bytes
from jaxcoder.io.atomic import replacing, write_text
from jaxcoder.io.document import Document, well_formed
from jaxcoder.io.document_files import Paths, read_documents
from jaxcoder.protocols import SILENT, Progress
from jaxcoder.tokenizer.encoders import tokenizers_encoder
from jaxcoder.tokenizer.tokenizer import Tokenizer

DEFAULT_SAMPLE_BYTES = 64 << 20
NUM_LONGEST = 12
_BATCH_BYTES = 1 << 20


@dataclass
class Sample:
    """The measured texts, and sizes of sample and corpus. Bytes are of UTF-8 text."""

    texts: list[tuple[str, str]]
    """(language, text), in the order of the corpus."""
    num_bytes: int
    num_documents: int
    corpus_bytes: int
    corpus_documents: int
    seed: int


@dataclass
class Measured:
    """One tokenizer on the sample."""

    name: str
    fingerprint: str
    vocab_size: int
    encoder: str
    counts: np.ndarray
    """int64 [vocab_size], how often each id is used."""
    tokens: dict[int, bytes]
    """Ordinary ids and their bytes."""
    languages: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Language -> (tokens, bytes)."""
    exact_bytes: int = 0
    """Bytes of the texts that encoding and decoding leaves unchanged."""

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.languages.values())

    @property
    def unused(self) -> list[int]:
        """Ordinary ids that do not occur in the sample."""
        return [id_ for id_ in sorted(self.tokens) if not self.counts[id_]]

    def longest(self, most: int = NUM_LONGEST) -> list[tuple[int, bytes, int]]:
        """(id, bytes, uses) of the ordinary tokens with most bytes, the longest first."""
        ids = sorted(self.tokens, key=lambda id_: (-len(self.tokens[id_]), id_))[:most]
        return [(id_, self.tokens[id_], int(self.counts[id_])) for id_ in ids]

    def share(self, kind: str) -> tuple[float, float]:
        """Share of tokens, and of their bytes, that are only "digits" (with spaces) or only "whitespace"."""
        chosen = [id_ for id_, token in self.tokens.items() if kind_of(token) == kind]
        sizes = np.zeros(self.vocab_size, np.int64)
        sizes[list(self.tokens)] = [len(token) for token in self.tokens.values()]
        used = self.counts[chosen]
        all_bytes = int((self.counts * sizes).sum())
        return _ratio(int(used.sum()), self.num_tokens), _ratio(int((used * sizes[chosen]).sum()), all_bytes)


def kind_of(token: bytes) -> str:
    """ "whitespace", "digits" (possibly with spaces around them), or "other"."""
    text = token.decode(errors="replace")
    if not text.strip():
        return "whitespace" if text else "other"
    return "digits" if text.strip().isdecimal() else "other"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# Any tokenizer --------------------------------------------------------------------------------------------------------


class OtherTokenizer:
    """A tokenizer.json of another kind (WordPiece, Unigram, SentencePiece's BPE), for reports only."""

    def __init__(self, content: bytes):
        """Raises the exceptions of `tokenizers` for a file that it cannot load."""
        import tokenizers

        self._backend = tokenizers.Tokenizer.from_str(content.decode())
        self.encode = tokenizers_encoder(self._backend)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.encoder_name = f"tokenizers ({json.loads(content)['model'].get('type', 'unknown')})"
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.special_ids = {id_ for id_, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = max(vocab.values()) + 1
        self.tokens = {id_: _plain(token) for token, id_ in vocab.items() if id_ not in self.special_ids}

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _plain(token: str) -> bytes:
    """The bytes of a token, with SentencePiece's space and byte tokens and WordPiece's continuations converted."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.removeprefix("##").replace("\u2581", " ").encode(errors="replace")


def load_any(path: str | os.PathLike) -> Tokenizer | OtherTokenizer:
    """Any tokenizer.json, or the directory that holds one. DataError if `tokenizers` cannot open it either."""
    try:
        return Tokenizer.load(path)
    except DataError as refused:
        file = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise
        try:
            return OtherTokenizer(file.read_bytes())
        except Exception:  # the library raises bare Exception; the first error names the cause
            raise refused from None


def _tokens_of(tokenizer: Tokenizer | OtherTokenizer) -> dict[int, bytes]:
    if isinstance(tokenizer, OtherTokenizer):
        return tokenizer.tokens
    ids = np.flatnonzero(tokenizer.valid_ids(tokenizer.vocab_size)).tolist()
    return {id_: tokenizer.decode_bytes([id_]) for id_ in ids if not tokenizer.is_special(id_)}


def short_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The name of each tokenizer's directory, with enough of its path to be unique."""
    parts = [[part for part in os.fspath(path).split("/") if part] or ["."] for path in paths]
    parts = [names[:-1] if names[-1] == "tokenizer.json" and len(names) > 1 else names for names in parts]
    for length in range(1, max(map(len, parts), default=0) + 1):
        short = ["/".join(names[-length:]) for names in parts]
        if len(set(short)) == len(short):
            return short
    return ["/".join(names) for names in parts]


# Measuring ------------------------------------------------------------------------------------------------------------


def take_sample(
    paths: Paths, *, max_bytes: int = DEFAULT_SAMPLE_BYTES, seed: int = 0, progress: Progress = SILENT
) -> Sample:
    """Documents of at most `max_bytes` of text; if none fits, the beginning of one. Reads the corpus once.

    Raises ConfigError for a limit below 1, DataError like `read_documents` or if there is no text.
    """
    if max_bytes < 1:
        raise ConfigError(f"A sample of {max_bytes} bytes has no text: give at least 1.")
    progress.start("Reading documents", None, "documents")
    taken: list[tuple[int, int, str, list[str]]] = []  # a heap, the largest hash first
    total = corpus_bytes = corpus_documents = 0
    limit = 1 << 64
    for number, document in enumerate(read_documents(paths)):
        texts = _texts(document)
        size = sum(map(_size, texts))
        corpus_bytes += size
        corpus_documents += 1
        digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest)
        if size and key < limit:
            heapq.heappush(taken, (-key, number, document.lang or "(none)", texts))
            total += size
        while total > max_bytes and len(taken) > 1:
            largest, _, _, dropped = heapq.heappop(taken)
            total -= sum(map(_size, dropped))
            limit = -largest  # small documents with larger hashes must not fill the gap
        progress.advance(1, format_bytes(corpus_bytes))
    if not taken:
        raise DataError("There is no text to report on: give documents that are not empty.")
    rows = [(lang, text) for _, _, lang, texts in sorted(taken, key=lambda entry: entry[1]) for text in texts]
    if total > max_bytes:  # a single document
        rows = list(_beginning(rows, max_bytes))
    num_bytes = sum(_size(text) for _, text in rows)
    progress.finish(f"{format_bytes(num_bytes)} of {format_bytes(corpus_bytes)} of text sampled")
    return Sample(rows, num_bytes, len(taken), corpus_bytes, corpus_documents, seed)


def _texts(document: Document) -> list[str]:
    """The ordinary texts of a document, one for each run of parts between special ones."""
    runs = itertools.groupby(document.parts, key=lambda part: part.special is None)
    texts = [well_formed("".join(part.text for part in parts)) for is_text, parts in runs if is_text]
    return [text for text in texts if text]


def _beginning(rows: Iterable[tuple[str, str]], max_bytes: int) -> Iterator[tuple[str, str]]:
    for lang, text in rows:
        text = text.encode()[:max_bytes].decode(errors="ignore")
        max_bytes -= _size(text)
        if text:
            yield lang, text


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def measure(
    tokenizer: Tokenizer | OtherTokenizer, sample: Sample, *, name: str, progress: Progress = SILENT
) -> Measured:
    """Encodes and decodes the sample with one tokenizer, on all cores."""
    result = Measured(
        name,
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.encoder_name,
        np.zeros(tokenizer.vocab_size, np.int64),
        _tokens_of(tokenizer),
    )

    def encode(row: tuple[str, str]) -> tuple[str, int, bool, np.ndarray]:
        ids = tokenizer.encode(row[1])
        return row[0], _size(row[1]), tokenizer.decode(ids) == row[1], np.array(ids, np.int64)

    progress.start(f"Encoding with {name}", sample.num_bytes, "bytes")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # the encoders release the GIL
        for batch in _batches(sample.texts):
            rows = list(pool.map(encode, batch))
            for language, size, is_exact, ids in rows:
                tokens, num_bytes = result.languages.get(language, (0, 0))
                result.languages[language] = tokens + len(ids), num_bytes + size
                result.exact_bytes += size * is_exact
            result.counts += np.bincount(np.concatenate([row[3] for row in rows]), minlength=tokenizer.vocab_size)
            progress.advance(sum(row[1] for row in rows))
    progress.finish(f"{result.num_tokens:,} tokens, {_ratio(result.num_bytes, result.num_tokens):.3f} bytes each")
    return result


def _batches(texts: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for row in texts:
        batch.append(row)
        size += len(row[1])
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# The report -----------------------------------------------------------------------------------------------------------


@dataclass
class TokenizerReport:
    """Several tokenizers on one sample."""

    sample: Sample
    measured: list[Measured]

    def languages(self) -> list[str]:
        """Languages, the one with most bytes first."""
        sizes = {language: num_bytes for language, (_, num_bytes) in self.measured[0].languages.items()}
        return sorted(sizes, key=lambda language: (-sizes[language], language))

    def bytes_per_token(self, measured: Measured, language: str | None = None) -> float:
        """Of one language, or of all; 0 without tokens (a tokenizer may drop text)."""
        tokens, num_bytes = (
            (measured.num_tokens, measured.num_bytes) if language is None else measured.languages[language]
        )
        return _ratio(num_bytes, tokens)

    def as_json(self) -> dict:
        """All results as plain JSON; in the text of tokens, incomplete characters are U+FFFD."""
        sample = {key: value for key, value in vars(self.sample).items() if key != "texts"}
        return {"sample": sample, "tokenizers": [self._one(measured) for measured in self.measured]}

    def _one(self, measured: Measured) -> dict:
        unused = measured.unused
        languages = {
            language: {
                "tokens": measured.languages[language][0],
                "bytes": measured.languages[language][1],
                "bytes_per_token": self.bytes_per_token(measured, language),
            }
            for language in self.languages()
        }
        kinds = {
            kind: dict(zip(("tokens", "bytes"), measured.share(kind), strict=True)) for kind in ("digits", "whitespace")
        }
        return {
            "name": measured.name,
            "fingerprint": measured.fingerprint,
            "encoder": measured.encoder,
            "vocab_size": measured.vocab_size,
            "tokens": measured.num_tokens,
            "bytes_per_token": self.bytes_per_token(measured),
            "exact_share_of_bytes": _ratio(measured.exact_bytes, measured.num_bytes),
            "share": kinds,
            "num_unused": len(unused),
            "unused_share": _ratio(len(unused), len(measured.tokens)),
            "unused_ids": unused,
            "longest_tokens": [
                {"id": id_, "text": token.decode(errors="replace"), "bytes": len(token), "uses": uses}
                for id_, token, uses in measured.longest()
            ],
            "languages": languages,
        }

    def write(self, path: str | os.PathLike) -> None:
        """Writes a .json or a .png file atomically. ConfigError for another suffix, DataError if writing fails."""
        path = check_output(path)
        if path.suffix == ".json":
            write_text(path, json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n")
            return
        from jaxcoder.tokenizer.report_picture import draw_report

        figure = draw_report(self)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def check_output(path: str | os.PathLike) -> Path:
    """The path, checked before the work is done. ConfigError if a report cannot be written under its name."""
    path = Path(path)
    if path.suffix not in (".json", ".png"):
        raise ConfigError(f"Cannot write a report to {path}: name a file that ends in .json or .png.")
    return path


def tokenizer_report(
    documents: Paths,
    tokenizers: Sequence[str | os.PathLike],
    *,
    max_bytes: int = DEFAULT_SAMPLE_BYTES,
    seed: int = 0,
    progress: Progress = SILENT,
) -> TokenizerReport:
    """Measures tokenizers (paths of any tokenizer.json) on documents. DataError for files that cannot be read."""
    loaded = [load_any(path) for path in tokenizers]
    sample = take_sample(documents, max_bytes=max_bytes, seed=seed, progress=progress)
    pairs = zip(loaded, short_names(tokenizers), strict=True)
    return TokenizerReport(sample, [measure(each, sample, name=name, progress=progress) for each, name in pairs])
