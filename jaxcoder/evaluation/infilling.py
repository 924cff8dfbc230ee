"""How well a model infills single lines: which lines it is asked for, and two numbers for its answers.

The rule. Of each document's longest text, the lines that may be asked for are not blank, not a comment only, and have 8
to 100 characters without their indentation and trailing blanks, two of them letters. From these the lines are taken in
an order that a hash of (seed, document, line) gives: first one of every document, documents in the order of the hash
too, then a second one of every document, and so on. Around the line, the prefix reaches to its first character (the
indentation is given) and begins at a line start, the suffix begins at its line end and ends at one; both are limited in
characters. The same documents, count and seed always give the same gaps.

Exact match compares after stripping both sides. Edit similarity is 1 - distance / max(length), where distance is
Levenshtein's (insertions, deletions, substitutions of characters) after the same stripping: 1 equal, 0 nothing shared.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxcoder.io.document import Document
from jaxcoder.protocols import Generator

SHORTEST_LINE, LONGEST_LINE = 8, 100
GAPS_AT_ONCE = 32
COMMENT_STARTS = ("#", "//", "/*", "*", "--", ";", "%", '"""', "'''")


class Gap(NamedTuple):
    """One line cut out of its document: prefix + line + suffix is the text around it."""

    prefix: str
    line: str
    suffix: str


@dataclass(frozen=True, kw_only=True)
class InfillScores:
    """Means over `count` gaps, in [0, 1], and the answers."""

    count: int
    exact_match: float
    edit_similarity: float
    answers: list[str]


def single_line_gaps(
    documents: Iterable[Document], *, count: int, seed: int, max_prefix_chars: int = 800, max_suffix_chars: int = 400
) -> list[Gap]:
    """The first `count` gaps by the rule above (fewer if the documents have no more)."""
    lines = [list(_candidates(index, document, seed)) for index, document in enumerate(documents)]
    lines.sort(key=lambda found: found[0][0] if found else b"")
    gaps: list[Gap] = []
    rank = 0
    while len(gaps) < count and any(len(found) > rank for found in lines):
        chosen = (found[rank] for found in lines if len(found) > rank)
        gaps += (_gap(text, start, end, max_prefix_chars, max_suffix_chars) for _, text, start, end in chosen)
        rank += 1
    return gaps[:count]


def infill_scores(
    generator: Generator,
    gaps: Sequence[Gap],
    *,
    max_new_tokens: int = 64,
    poll: Callable[[], object] = lambda: None,
) -> InfillScores:
    """Infills the line of every gap greedily, up to the end of the line, and scores the answers. No gaps score 0.

    poll: called before every group of gaps; it may raise to end the work.
    """
    answers: list[str] = []
    for first in range(0, len(gaps), GAPS_AT_ONCE):
        poll()
        group = [(gap.prefix, gap.suffix) for gap in gaps[first : first + GAPS_AT_ONCE]]
        answers += generator.infill(group, max_new_tokens=max_new_tokens, stop=("\n",))
    lines = [gap.line.strip() for gap in gaps]
    stripped = [answer.strip() for answer in answers]
    count = max(len(gaps), 1)
    return InfillScores(
        count=len(gaps),
        exact_match=sum(map(str.__eq__, stripped, lines)) / count,
        edit_similarity=sum(map(edit_similarity, stripped, lines)) / count,
        answers=list(answers),
    )


def edit_similarity(first: str, second: str) -> float:
    """1 - Levenshtein distance / length of the longer, in [0, 1]; two empty strings are equal."""
    longer = max(len(first), len(second))
    return 1 - edit_distance(first, second) / longer if longer else 1.0


def edit_distance(first: str, second: str) -> int:
    """The fewest insertions, deletions and substitutions of characters that make one string of the other."""
    row = list(range(len(second) + 1))  # distances of what was read of `first` to every beginning of `second`
    for i, character in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (character != other))
    return row[-1]


def _candidates(index: int, document: Document, seed: int) -> Iterator[tuple[bytes, str, int, int]]:
    """(hash, text, start, end) of the lines of a document that may be asked for, in the order of the hash."""
    text = max((part.text for part in document.parts), key=len, default="")
    found, start = [], 0
    for number, line in enumerate(text.split("\n")):
        bare = line.strip()
        if _may_be_asked(bare):
            key = hashlib.blake2b(f"{seed} {index} {number}".encode(), digest_size=16).digest()
            first = start + len(line) - len(line.lstrip())
            found.append((key, text, first, first + len(bare)))
        start += len(line) + 1
    return iter(sorted(found))


def _may_be_asked(bare: str) -> bool:
    return (
        SHORTEST_LINE <= len(bare) <= LONGEST_LINE
        and not bare.startswith(COMMENT_STARTS)
        and sum(map(str.isalpha, bare)) >= 2
    )


def _gap(text: str, start: int, end: int, max_prefix_chars: int, max_suffix_chars: int) -> Gap:
    prefix, suffix = text[:start], text[end:]
    if len(prefix) > max_prefix_chars:
        line_start = prefix.find("\n", len(prefix) - max_prefix_chars - 1) + 1
        # A line that is longer than the limit is cut inside.
        prefix = prefix[line_start or len(prefix) - max_prefix_chars :]
    if len(suffix) > max_suffix_chars:
        line_end = suffix.rfind("\n", 0, max_suffix_chars) + 1
        suffix = suffix[: line_end if line_end > 1 else max_suffix_chars]
    return Gap(prefix, text[start:end], suffix)
