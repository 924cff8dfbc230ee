"""What token stores hold: documents, tokens and bytes by language, and the distribution of document lengths."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcoder.data.store import TokenStore
from jaxcoder.errors import ConfigError
from jaxcoder.io.atomic import write_bytes


class LanguageRow(NamedTuple):
    """One language of a store. tokens counts the end tokens too; text_bytes is UTF-8."""

    language: str
    documents: int
    tokens: int
    text_bytes: int


def by_language(store: TokenStore) -> list[LanguageRow]:
    """A row for each language, the one with most tokens first; "" where documents name none."""
    column = store.documents["lang"].combine_chunks().dictionary_encode()
    of_document = column.indices.to_numpy(zero_copy_only=False)
    names = column.dictionary.to_pylist()
    size = len(names)
    documents = np.bincount(of_document, minlength=size)
    # Sums of float64 are exact below 2**53.
    tokens = np.bincount(of_document, weights=np.diff(store.document_offsets), minlength=size)
    text_bytes = np.bincount(of_document, weights=store.documents["text_bytes"].to_numpy(), minlength=size)
    rows = [
        LanguageRow(*row) for row in zip(names, documents.tolist(), map(int, tokens), map(int, text_bytes), strict=True)
    ]
    return sorted(rows, key=lambda row: (-row.tokens, row.language))


def length_bins(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """(documents, tokens) whose document has 2**k to 2**(k + 1) - 1 tokens, its end token included: int64 [k]."""
    lengths = np.diff(store.document_offsets)
    bins = np.frexp(lengths.astype(np.float64))[1] - 1
    documents = np.bincount(bins, minlength=1)
    return documents, np.bincount(bins, weights=lengths, minlength=len(documents)).astype(np.int64)


def draw_lengths(stores: Sequence[TokenStore], path: str | Path) -> Path:
    """Plots the documents and tokens of each store by length of document. ConfigError unless `path` ends in .png or
    .svg."""
    import io

    from matplotlib.figure import Figure  # without pyplot: no global state, no window, always the Agg canvas

    suffix = Path(path).suffix[1:]
    if suffix not in ("png", "svg"):
        raise ConfigError(f"Cannot plot to {path}: name a file that ends in .png or .svg.")
    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for store in stores:
        label = Path(store.path).name or store.path
        for axis, counts in zip(axes, length_bins(store), strict=True):
            axis.stairs(
                100 * counts / max(counts.sum(), 1), np.arange(len(counts) + 1), label=label, fill=len(stores) == 1
            )
    last = max(len(length_bins(store)[0]) for store in stores)
    axes[0].set(ylabel="% of documents", title="Lengths of documents")
    axes[1].set(ylabel="% of tokens", xlabel="tokens in a document")
    axes[1].set_xticks(range(0, last + 1, 2), [f"{2**k:,}" for k in range(0, last + 1, 2)], rotation=30)
    for axis in axes:
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format=suffix)
    write_bytes(Path(path), content.getvalue())
    return Path(path)
