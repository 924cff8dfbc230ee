"""Trains a byte-level BPE tokenizer like StarCoder's: individual digits, then the GPT-2 split, no prefix space.

The 19 special tokens have ids 0 to 18. One deliberate difference: the alphabet is all 256 bytes, not only those of the
sample, so that all bytes survive a round trip; ids therefore differ from StarCoder's from the first absent byte on
(newline is 217, not 203). The result depends on the texts only, not on threads.

Reference: bigcode-tokenizer, starcoder/train_bpe_tokenizer.py.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jaxcoder.errors import ConfigError, DataError
from jaxcoder.formatting import format_bytes
from jaxcoder.io.document import well_formed
from jaxcoder.io.document_files import read_documents
from jaxcoder.protocols import SILENT, Progress
from jaxcoder.tokenizer.special_tokens import SPECIAL_TOKENS
from jaxcoder.tokenizer.tokenizer import Tokenizer

SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)
LARGEST_VOCAB = 1 << 20  # the trainer allocates memory for all of them
DEFAULT_SAMPLE_BYTES = 64 << 20
"""Larger inputs are sampled uniformly to this size, which bounds time and memory (49,152 tokens from 64 MB: 17 seconds
of one core and 0.6 GB; 8,192 from 20 MB: 5.5 seconds). More text hardly changes the merges."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 49152, progress: Progress = SILENT) -> Tokenizer:
    """Learns merges from ordinary texts up to `vocab_size` tokens, including the 19 special ones.

    The vocabulary is smaller if there are no more pairs to merge. Raises ConfigError for a vocab_size below 275
    or above 2**20, DataError if there is no text.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"A vocabulary of {vocab_size} is too small: the 256 bytes and {len(SPECIAL_TOKENS)} special tokens need "
            f"{SMALLEST_VOCAB}; StarCoder's has 49152."
        )
    if vocab_size > LARGEST_VOCAB:
        raise ConfigError(
            f"A vocabulary of {vocab_size} is too large: give at most {LARGEST_VOCAB}; StarCoder's has 49152."
        )
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    feed = _Feed(texts, progress)
    progress.start("Training the tokenizer", None, "bytes")
    _in_thread(lambda: backend.train_from_iterator(iter(feed), trainer))
    if not feed.num_bytes:
        raise DataError("There is no text to train a tokenizer on: give documents that are not empty.")
    tokenizer = Tokenizer(backend.to_str(pretty=True).encode(), origin="the trained tokenizer")
    progress.finish(f"Tokenizer of {tokenizer.vocab_size} tokens from {format_bytes(feed.num_bytes)}")
    return tokenizer


def _in_thread(work: Callable[[], object]) -> None:
    """Runs `work` in a thread, so that Ctrl-C interrupts the wait: the Rust code of the trainer does not handle it."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]


class _Feed:
    """Passes texts to the trainer and reports progress."""

    def __init__(self, texts: Iterable[str], progress: Progress):
        self._texts = texts
        self._progress = progress
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            text = well_formed(text)
            size = len(text.encode())
            self.num_bytes += size
            self._progress.advance(size, "reading")
            yield text
        self._progress.advance(0, "learning merges")


def sample_texts(
    paths: str | Path | Iterable[str | Path], max_bytes: int | None = DEFAULT_SAMPLE_BYTES, seed: int = 0
) -> Iterator[str]:
    """A uniform, deterministic sample of complete documents' texts, about `max_bytes` in total (None: all documents).

    Document k is taken if a hash of (seed, k) is below the sampled share; the last one may be truncated at the limit.
    Reads the files twice. Raises DataError like `read_documents`.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    share = 1.0
    if max_bytes is not None:
        total = sum(len(document.text.encode(errors="replace")) for document in read_documents(paths))
        share = min(1.0, max_bytes / max(total, 1))
    left = float("inf") if max_bytes is None else max_bytes
    for k, document in enumerate(read_documents(paths)):
        draw = hashlib.blake2b(f"{seed} {k}".encode(), digest_size=8).digest()
        if int.from_bytes(draw) >= share * 2**64:
            continue
        text = well_formed(document.text)
        if len(text.encode()) > left:
            text = text.encode()[: int(left)].decode(errors="ignore")
        left -= len(text.encode())
        if text:
            yield text
        if left <= 0:
            return
