r"""Cuts a piece by its ids: only a few bytes around each cut are re-encoded, and the result is exact.

Byte-pair merges never cross the boundary of a pre-token. A boundary between two tokens is *safe* if it is a pre-token
boundary for any text on either side of it: the ids beyond it then equal the encoding of the part that contains them.
With StarCoder's pre-tokenizer (single digits, then GPT-2's expression) a boundary is safe

    R1  between a byte 0x21..0x7e and an ASCII whitespace: no alternative matches whitespace after another character,
        and the two look-aheads follow whitespace, so they never cross this boundary (the reverse order is not safe:
        ` ?\p{L}+` takes the space before it, and `\s+(?!\S)` gives up the last one only if a text follows);
    R2  next to an ASCII digit, which is a pre-token by itself;
    R3  at the begin and end of a document, and on both sides of a special token, where encoding restarts.

Each part is then: the re-encoded text up to its first safe boundary, unchanged ids, the re-encoded text after its last
safe boundary. Where the window cuts a document, that end of the piece is re-encoded as well, because the remaining text
may be encoded differently than in the document. Long texts without an ASCII space or digit (Chinese prose) make the
re-encoded parts longer. A byte that the tokenizer lacks is lost when the document is encoded, which does not affect the
ids next to it.
"""

from typing import NamedTuple

import numpy as np

from jaxcoder.data.fim_text import DrawCuts, Ids, Parts, Piece, TextCutter, begins_inside_character
from jaxcoder.tokenizer.tokenizer import Tokenizer

_DIGITS = frozenset(b"0123456789")
_WHITESPACE = frozenset(b"\t\n\v\f\r ")
_PRINTABLE = frozenset(range(0x21, 0x7F))
_CONTINUATIONS = bytes(range(0x80, 0xC0))

# The properties of a token at its boundaries, in one byte. A boundary is safe if the low half of the token before it
# and the high half of the token after it have a common bit.
_ENDS_PRINTABLE, _BEGINS_WHITESPACE = 0x01, 0x10  # R1
_ENDS_WITH_DIGIT, _BEGINS_ANYHOW = 0x02, 0x20  # R2, the digit before
_ENDS_ANYHOW, _BEGINS_WITH_DIGIT = 0x04, 0x40  # R2, the digit behind
_SPECIAL = 0x77  # R3
_PARTIAL = 0x08  # its bytes are not complete characters; adjacent tokens of this kind are decoded together


def serves(tokenizer: Tokenizer) -> bool:
    """Whether the method is exact for this tokenizer: tiktoken is used only with StarCoder's pre-tokenizer."""
    return tokenizer.encoder_name == "tiktoken"


class Position(NamedTuple):
    """A position in a piece: `offset` bytes into token number `token`; offset 0 is the boundary before it."""

    token: int
    offset: int


class IdsCutter:
    """Cuts pieces by their ids, with tables of one entry per id.

    text_cutter: for pieces with invalid UTF-8 between their edges.
    """

    def __init__(self, tokenizer: Tokenizer, text_cutter: TextCutter):
        self._encode = tokenizer.encode
        self._tokenizer = tokenizer
        self._text_cutter = text_cutter
        is_used = tokenizer.valid_ids(tokenizer.vocab_size)
        self._bytes = [tokenizer.decode_bytes([id_]) if used else b"" for id_, used in enumerate(is_used.tolist())]
        self._kinds = np.full(len(self._bytes), _PARTIAL, np.uint8)
        self._num_characters = np.zeros(len(self._bytes), np.uint16)  # by their lead bytes
        for id_, content in enumerate(self._bytes):
            if id_ in tokenizer.special_ids:
                self._kinds[id_] = _SPECIAL
            elif content:
                self._kinds[id_] = _kind(content)
                self._num_characters[id_] = len(content.translate(None, _CONTINUATIONS))

    def __call__(self, piece: Piece, draw_cuts: DrawCuts) -> Parts:
        """Prefix, middle and suffix: the same ids as TextCutter's."""
        try:
            kinds = self._kinds.take(piece.ids)
        except IndexError:
            return self._text_cutter(piece, draw_cuts)  # raises DataError: the id is not in the vocabulary
        head, tail = 0, len(kinds)
        if (kinds & _PARTIAL).any():
            edges = self._edges(piece.ids, kinds)
            if edges is None:
                return self._text_cutter(piece, draw_cuts)
            head, tail = edges
        begins_whole, ends_whole = piece.begins_whole and head == 0, piece.ends_whole and tail == len(kinds)
        ids = piece.ids[head:tail]
        safe = _safe_boundaries(kinds[head:tail], begins_whole, ends_whole)
        first, second = self._locate(ids, draw_cuts)
        begin, end = Position(0, 0), Position(len(ids), 0)
        return (
            [piece.ids[:head], *self._part(ids, safe, begin, first)],
            self._part(ids, safe, first, second),
            [*self._part(ids, safe, second, end), piece.ids[tail:]],
        )

    def _locate(self, ids: np.ndarray, draw_cuts: DrawCuts) -> tuple[Position, Position]:
        """The positions of the two cuts: at the lead byte of the character, after all preceding ids without
        characters."""
        characters = self._num_characters.take(ids).cumsum(dtype=np.int32)
        cuts = draw_cuts(int(characters[-1]))
        # The token with the lead byte of the character after the cut.
        tokens = characters.searchsorted(np.array(cuts, np.int32), side="right").tolist()
        first, second = (
            Position(token, self._offset(ids[token], cut - int(characters[token - 1]) if token else cut))
            if token < len(ids)
            else Position(token, 0)
            for cut, token in zip(cuts, tokens, strict=True)
        )
        return first, second

    def _offset(self, token: int, number: int) -> int:
        """The offset of the lead byte of character `number` in a token's bytes."""
        content = self._bytes[token]
        if content.isascii():
            return number
        leads = [offset for offset, byte in enumerate(content) if not 0x80 <= byte < 0xC0]
        return leads[number]

    def _part(self, ids: np.ndarray, safe: bytes, begin: Position, end: Position) -> list[Ids]:
        """The ids of the text between two positions, encoded separately."""
        first, last = _first_safe(safe, begin), _last_safe(safe, end)
        if first >= last:
            return [self._encoded(ids, begin, end)]
        return [
            self._encoded(ids, begin, Position(first, 0)),
            ids[first:last],
            self._encoded(ids, Position(last, 0), end),
        ]

    def _encoded(self, ids: np.ndarray, begin: Position, end: Position) -> list[int]:
        if begin == end:
            return []
        content = b"".join([self._bytes[id_] for id_ in ids[begin.token : end.token].tolist()])
        if end.offset:
            content += self._bytes[ids[end.token]][: end.offset]
        return self._encode(content[begin.offset :].decode())

    def _edges(self, ids: np.ndarray, kinds: np.ndarray) -> tuple[int, int] | None:
        """The range of ids without the incomplete characters at the two edges; None if others are incomplete too.

        Only runs of tokens that are not complete characters need to be decoded.
        """
        head, tail = 0, len(ids)
        partial = np.flatnonzero(kinds & _PARTIAL)
        for run in np.split(partial, np.flatnonzero(np.diff(partial) > 1) + 1):
            start, stop = int(run[0]), int(run[-1]) + 1
            if self._is_text(ids[start:stop]):
                continue
            if start > 0 and begins_inside_character(self._bytes[ids[start]]):
                return None  # it continues a complete token
            clusters = self._clusters(ids[start:stop].tolist())
            if start == 0 and not self._is_text(ids[: clusters[1]]):
                head = start = clusters[1]
            if stop == len(ids) and start < stop and not self._is_text(ids[run[0] + clusters[-2] :]):
                tail = stop = int(run[0]) + clusters[-2]
            if not self._is_text(ids[start:stop]):
                return None
        return (head, tail) if head < tail else None

    def _is_text(self, ids: np.ndarray) -> bool:
        try:
            self._tokenizer.decode_bytes(ids.tolist()).decode()
        except UnicodeDecodeError:
            return False
        return True

    def _clusters(self, ids: list[int]) -> list[int]:
        """The starts of the groups of ids that share characters, and the end of the last."""
        starts = [i for i, id_ in enumerate(ids) if i == 0 or not begins_inside_character(self._bytes[id_])]
        return [*starts, len(ids)]


def _kind(content: bytes) -> int:
    kind = _BEGINS_ANYHOW | _ENDS_ANYHOW
    kind |= _BEGINS_WHITESPACE * (content[0] in _WHITESPACE) | _BEGINS_WITH_DIGIT * (content[0] in _DIGITS)
    kind |= _ENDS_PRINTABLE * (content[-1] in _PRINTABLE) | _ENDS_WITH_DIGIT * (content[-1] in _DIGITS)
    try:
        content.decode()
    except UnicodeDecodeError:
        kind |= _PARTIAL
    return kind


def _safe_boundaries(kinds: np.ndarray, begins_whole: bool, ends_whole: bool) -> bytes:
    """One byte per boundary, including those before the first and after the last token: 1 if it is safe."""
    safe = np.empty(len(kinds) + 1, bool)
    np.not_equal(kinds[:-1] & (kinds[1:] >> 4), 0, out=safe[1:-1])
    safe[0] = begins_whole or (kinds[0] >> 4) & _ENDS_ANYHOW
    safe[-1] = ends_whole or kinds[-1] & (_BEGINS_ANYHOW >> 4)
    return safe.tobytes()


def _first_safe(safe: bytes, position: Position) -> int:
    """The first safe boundary at or after the position, else the end of the piece."""
    found = safe.find(1, position.token + (position.offset > 0))
    return len(safe) - 1 if found < 0 else found


def _last_safe(safe: bytes, position: Position) -> int:
    """The last safe boundary at or before the position, else the begin of the piece."""
    return max(safe.rfind(1, 0, position.token + 1), 0)
