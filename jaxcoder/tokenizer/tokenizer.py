"""The tokenizer: text and documents to ids and back.

A byte-level BPE from a Hugging Face tokenizer.json, whose bytes are kept. Ordinary text never becomes a special id,
even if it spells a special token; special ids come from special parts of a document or are requested by name.
Ids are Python ints in [0, vocab_size).
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcoder.errors import DataError
from jaxcoder.io.addresses import is_local, open_address
from jaxcoder.io.atomic import write_bytes
from jaxcoder.io.document import Document, Part, well_formed
from jaxcoder.io.os_errors import access_errors
from jaxcoder.tokenizer import encoders
from jaxcoder.tokenizer.portable import SETTINGS, has_tokenizer, parse_settings, tokenizer_json_of
from jaxcoder.tokenizer.special_tokens import (
    END_OF_TEXT,
    FIM_MIDDLE,
    FIM_PAD,
    FIM_PREFIX,
    FIM_SUFFIX,
    SPECIAL_TOKENS,
    hyphenated,
)

logger = logging.getLogger(__name__)


class FimIds(NamedTuple):
    """Ids of the four tokens of fill-in-the-middle."""

    prefix: int
    middle: int
    suffix: int
    pad: int


class Tokenizer:
    """Encodes and decodes; made by `Tokenizer.load` or `train_tokenizer`.

    vocab_size: largest id + 1.
    fingerprint: SHA-256 (hex) of tokenizer.json; stores and checkpoints record it.
    encoder_name: "tiktoken", or "tokenizers" if tiktoken would give other ids (`encoder_reason` is the reason).
    special_ids: ids of the special tokens.
    """

    def __init__(self, content: bytes, *, origin: str = "the tokenizer", settings: Mapping[str, Any] | None = None):
        """content: a tokenizer.json. origin: names it in errors. settings: its tokenizer_config.json, of which
        `portable.SETTINGS` are kept.

        Raises DataError if it cannot be used, or if `tokenizers` gives other ids than the file or alters text.
        """
        self._origin = origin
        self.settings = {key: value for key, value in (settings or {}).items() if key in SETTINGS}
        self._spec = spec = _parse(content, origin)
        if spec["model"].get("dropout"):
            # Training-time BPE dropout would make the ids of a text random.
            logger.warning(f"{origin} has BPE dropout {spec['model']['dropout']}, which is turned off.")
            spec["model"]["dropout"] = None
            content = json.dumps(spec, ensure_ascii=False, indent=2).encode()
        self._content = content
        known = {*SPECIAL_TOKENS, *map(hyphenated, SPECIAL_TOKENS)}
        backend = _backend(spec, known, origin)
        self._reference = encoders.tokenizers_encoder(backend)
        self.fingerprint = hashlib.sha256(content).hexdigest()
        vocab: dict[str, int] = spec["model"]["vocab"]
        added = spec["added_tokens"]
        _check_ids(vocab, added, backend, origin)
        self._special = {t["content"]: t["id"] for t in added if t.get("special") or t["content"] in known}
        self.special_ids = frozenset(self._special.values())
        ordinary = {token: id_ for token, id_ in vocab.items() if id_ not in self.special_ids}
        ranks = _bytes_of_tokens(ordinary, origin)
        self._bytes = {id_: token for token, id_ in ranks.items()}
        self._bytes |= {token["id"]: token["content"].encode() for token in added}
        self.vocab_size = max(self._bytes) + 1
        self._check_text_is_unchanged(ranks)
        fast, self.encoder_reason = encoders.tiktoken_encoder(spec, ranks, self._reference)
        self._encode = fast or self._reference
        self.encoder_name = "tiktoken" if fast else "tokenizers"

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Load a tokenizer.json, or the one in the directory `path` (local, gs://, s3://, ...).

        Raises DataError if it is missing or unusable.
        """
        location = os.fspath(path)
        try:
            fs, file = open_address(location)
            with access_errors(location):
                if fs.isdir(file):
                    location, file = f"{location.rstrip('/')}/tokenizer.json", f"{file.rstrip('/')}/tokenizer.json"
                config = f"{file.rpartition('/')[0]}/tokenizer_config.json"
                has_config = location.endswith("/tokenizer.json") and fs.exists(config)
                settings = fs.cat_file(config) if has_config else b"{}"
                is_gpt2 = is_local(fs) and not fs.exists(file) and has_tokenizer(Path(file).parent)
                content = None if is_gpt2 else fs.cat_file(file)
        except DataError as error:
            reason = getattr(error.__cause__, "strerror", None) or str(error.__cause__) or "it cannot be opened"
            raise DataError(
                f"Cannot read the tokenizer {location} ({reason}): give a tokenizer.json or the directory that "
                "contains it, such as the output of `jaxcoder tokenizer train`."
            ) from error
        parsed = parse_settings(settings, location)
        if content is None:
            content = tokenizer_json_of(Path(file).parent, parsed)
        return cls(content, origin=location, settings=parsed)

    def __reduce__(self):
        return functools.partial(Tokenizer, origin=self._origin, settings=self.settings), (self._content,)

    def files(self) -> dict[str, bytes]:
        """The files for transformers 4 and 5 and other loaders, by name; tokenizer.json is unchanged."""
        from jaxcoder.tokenizer.portable import tokenizer_files

        return tokenizer_files(self._content, self._spec, tuple(self._special), self.settings)

    def save(self, directory: str | Path) -> None:
        """Writes `files` into a directory, whose other files are kept. DataError if that fails."""
        for name, content in self.files().items():
            write_bytes(f"{os.fspath(directory)}/{name}", content)

    def role_id(self, role: str) -> int | None:
        """Id of the token that the settings give a role such as "eos_token"; None if they do not."""
        token = self.settings.get(role)
        name = token.get("content") if isinstance(token, dict) else token
        return self._special.get(name) if isinstance(name, str) else None

    def _check_text_is_unchanged(self, ranks: dict[bytes, int]) -> None:
        """Raises DataError if a text does not survive encoding and decoding, except for bytes without a token."""
        for text in encoders.HOSTILE_TEXTS:
            expected = bytes(byte for byte in text.encode() if bytes([byte]) in ranks)
            ids = self._reference(text)
            if (found := self.decode_bytes(ids)) != expected or ids != self._reference(text):
                raise DataError(
                    f"{self._origin} alters text ({text[:20]!r} becomes {found[:20]!r}): jaxcoder needs a tokenizer "
                    "without a normalizer and without a prefix space."
                )

    @property
    def eos_id(self) -> int:
        """Id of `<|endoftext|>`, which ends every document."""
        return self.special_id(END_OF_TEXT)

    @property
    def fim(self) -> FimIds | None:
        """Ids for fill-in-the-middle; None if this tokenizer has no such tokens."""
        names = (FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FIM_PAD)
        ids = [id_ for name in names if (id_ := self._find_special(name)) is not None]
        return FimIds(*ids) if len(ids) == len(names) else None

    def special_id(self, name: str) -> int:
        """Id of a special token by StarCoder's name; SantaCoder's spelling is recognized. DataError if absent."""
        id_ = self._find_special(name)
        if id_ is None:
            raise DataError(
                f"The tokenizer {self._origin} has no special token {name!r}: use one that has it (its special tokens "
                f"are {', '.join(self._special) or 'none'})."
            )
        return id_

    def _find_special(self, name: str) -> int | None:
        return self._special.get(name, self._special.get(hyphenated(name)))

    def is_special(self, id_: int) -> bool:
        """Whether the id belongs to a special token."""
        return id_ in self.special_ids

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; text that spells a special token is encoded as text, lone surrogates as U+FFFD."""
        return self._encode(well_formed(text))

    def encode_document(self, document: Document) -> list[int]:
        """Ids of all parts in order, without an end token.

        DataError for an unknown special, an end token inside, or ids that are not this tokenizer's for their text.
        """
        ids: list[int] = []
        text: list[str] = []
        for part in document.parts:
            if part.special is None and part.ids is None:
                text.append(part.text)  # adjacent texts are encoded as one
                continue
            if part.special == END_OF_TEXT:
                raise DataError(
                    f"The document {document.path or document.text[:30]!r} has a part {END_OF_TEXT}, but that token "
                    "separates documents: split it into two documents."
                )
            ids += self.encode("".join(text))
            ids += self._checked_ids(part, document) if part.special is None else [self.special_id(part.special)]
            text = []
        return ids + self.encode("".join(text))

    def _checked_ids(self, part: Part, document: Document) -> tuple[int, ...]:
        """The ids of a part that has them. DataError unless they decode to its text with this tokenizer."""
        ids = part.ids or ()
        if not self.special_ids.isdisjoint(ids) or self.decode(ids) != part.text:
            raise DataError(
                f"The document {document.path or part.text[:30]!r} has ids that do not decode to its text with "
                f"{self._origin}: use the tokenizer that it was encoded with, or documents of text."
            )
        return ids

    def decode_bytes(self, ids: Iterable[int], *, show_specials: bool = True) -> bytes:
        """The exact bytes of the ids. show_specials: include special tokens as their names.

        Raises DataError for an id that is not in the vocabulary.
        """
        try:
            return b"".join(self._bytes[int(i)] for i in ids if show_specials or int(i) not in self.special_ids)
        except KeyError as error:
            raise DataError(
                f"Token id {error.args[0]} is not in the vocabulary of {self._origin} ({self.vocab_size} ids): the "
                "ids come from another tokenizer, or from a padding row that should have been masked."
            ) from None

    def decode(self, ids: Iterable[int], *, show_specials: bool = True) -> str:
        """Text of the ids; incomplete characters become U+FFFD. DataError like `decode_bytes`."""
        return self.decode_bytes(ids, show_specials=show_specials).decode(errors="replace")

    def valid_ids(self, vocab_rows: int) -> np.ndarray:
        """The rows of an embedding with `vocab_rows` rows that belong to a token: bool [vocab_rows].

        Raises DataError if there are fewer rows than ids.
        """
        if vocab_rows < self.vocab_size:
            raise DataError(
                f"The tokenizer {self._origin} has {self.vocab_size} ids but the model only {vocab_rows} rows: use the "
                "tokenizer that the model was trained with."
            )
        mask = np.zeros(vocab_rows, bool)
        mask[list(self._bytes)] = True
        return mask


def _parse(content: bytes, origin: str) -> dict:
    """The parsed tokenizer.json. Raises DataError unless it has a BPE model."""
    try:
        spec = json.loads(content)
        model = spec["model"]
        spec.setdefault("added_tokens", [])
        usable = isinstance(model["vocab"], dict) and bool(model["vocab"]) and isinstance(model["merges"], list)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        usable = False
    if not usable or model.get("type", "BPE") != "BPE":
        raise DataError(
            f"{origin} is not a tokenizer.json with a BPE model: give one that the `tokenizers` library wrote, or make "
            "one with `jaxcoder tokenizer train`."
        )
    return spec


def _check_ids(vocab: dict[str, int], added: list[dict], backend: Any, origin: str) -> None:
    """Raises DataError for ids that are not those of `tokenizers`, or that no array can have."""
    for token, id_ in [*vocab.items(), *((token["content"], token["id"]) for token in added)]:
        if not isinstance(id_, int) or not 0 <= id_ < 2**31:
            raise DataError(f"{origin} has the id {id_} for {token!r}: ids must be from 0 to 2**31 - 1.")
    for token in added:
        if (found := backend.token_to_id(token["content"])) != token["id"]:
            raise DataError(
                f"{origin} has the id {token['id']} for the added token {token['content']!r}, but `tokenizers` gives "
                f"it {found}: added tokens must have the ids that follow the vocabulary, each its own."
            )


def _bytes_of_tokens(vocab: dict[str, int], origin: str) -> dict[bytes, int]:
    symbols = encoders.byte_of_symbol()
    try:
        return {bytes(symbols[symbol] for symbol in token): id_ for token, id_ in vocab.items()}
    except KeyError as error:
        raise DataError(
            f"{origin} is not a byte-level BPE (its vocabulary has the character {error.args[0]!r}): jaxcoder needs "
            "one in which every token is a string of bytes, as GPT-2's and StarCoder's are."
        ) from None


def _backend(spec: dict, known: set[str], origin: str):
    """The `tokenizers.Tokenizer`, with every known sentinel marked special so that text never becomes one."""
    import tokenizers

    try:
        added = [token | {"special": True} if token["content"] in known else token for token in spec["added_tokens"]]
        return tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": added}))
    except Exception as error:  # the library raises bare Exception, with the reason in it
        raise DataError(
            f"{origin} cannot be loaded by `tokenizers` ({error}): it is damaged, or written by a newer release."
        ) from error
