"""Documents packed into windows as the token store lays them: end to end, cut at a window's edges, ids 1, 2, 3 ...

StarCoder's corpus is not at hand, and of its lengths only the mean is known: 766.95 GB of 3.45 bytes a token in some
206 million files, about 1,080 tokens. So three kinds of lengths stand for it: files of Python's own library, under a
tokenizer trained on them; and two log-normals, of which median 500 and sigma 1.3 has about that mean (1,164).
"""

import numpy as np

LOG_NORMALS = {
    "log-normal, median 500, sigma 1.3": (500.0, 1.3),
    "log-normal, median 1000, sigma 1.2": (1000.0, 1.2),
}
LIBRARY = "files of Python's library"
KINDS = (*LOG_NORMALS, LIBRARY)


def packed(kind: str, windows: int, length: int, *, seed: int = 0) -> np.ndarray:
    """Segment ids of so many windows, int32 (windows, length), of lengths of one of KINDS."""
    draw = np.random.default_rng(seed)
    if kind == LIBRARY:
        known = draw.permutation(library_lengths())
        lengths = np.tile(known, -(-(windows + 1) * length // int(known.sum())))
    else:
        median, sigma = LOG_NORMALS[kind]
        count = int(4 * (windows + 1) * length / median) + 16
        lengths = np.maximum(1, np.exp(draw.normal(np.log(median), sigma, count))).astype(np.int64)
    return segment_ids(lengths, windows, length, offset=int(draw.integers(length)))


def segment_ids(lengths: np.ndarray, windows: int, length: int, *, offset: int = 0) -> np.ndarray:
    """Ids int32 (windows, length), from 1 in every window, of documents laid end to end from the token `offset` on."""
    ends = np.cumsum(lengths)
    if len(ends) == 0 or ends[-1] < offset + windows * length:
        raise ValueError(f"documents of {int(ends[-1]) if len(ends) else 0} tokens do not fill {windows} x {length}")
    document = np.searchsorted(ends, offset + np.arange(windows * length), side="right").reshape(windows, length)
    return (document - document[:, :1] + 1).astype(np.int32)


def library_lengths(most_bytes: int = 8_000_000) -> np.ndarray:
    """Tokens of each file of Python's library, its end token included, by a tokenizer trained on those files."""
    from jaxcoder.benchmarks.measure import stdlib_sources
    from jaxcoder.tokenizer.train import train_tokenizer

    texts = stdlib_sources(most_bytes)
    tokenizer = train_tokenizer(texts, 49152)
    return np.array([len(tokenizer.encode(text)) + 1 for text in texts])
