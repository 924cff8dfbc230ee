"""A window as a person reads it: its ids as text and visible special tokens, FIM parts labelled."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np

from jaxcoder.formatting import escape_control
from jaxcoder.tokenizer.tokenizer import Tokenizer

TEXT, PREFIX, MIDDLE, SUFFIX, SPM_MIDDLE, SPECIAL = "text", "prefix", "middle", "suffix", "prefix and middle", "special"


class LabeledText(NamedTuple):
    """Text of one kind: TEXT outside of FIM, a part of a FIM piece, or the name of one SPECIAL token.

    In SPM order nothing separates prefix and middle, so they are one part, SPM_MIDDLE.
    """

    kind: str
    text: str


def labeled_texts(ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[LabeledText]:
    """A window, int32 [length], in order. Bytes that are no whole character become U+FFFD."""
    fim = tokenizer.fim
    kind, last = TEXT, None
    for is_special, group in groupby(ids.tolist(), tokenizer.is_special):
        if not is_special:
            yield LabeledText(kind, tokenizer.decode(group))
            last = None
            continue
        for id_, repeats in groupby(group):
            times = len(list(repeats))
            if id_ == tokenizer.eos_id:
                kind = TEXT
            elif fim and id_ == fim.prefix:
                kind = PREFIX
            elif fim and id_ == fim.suffix:
                kind, is_spm = SUFFIX, last == fim.prefix
            elif fim and id_ == fim.middle:
                kind = SPM_MIDDLE if is_spm else MIDDLE
            yield LabeledText(SPECIAL, tokenizer.decode([id_]) + (f" x {times}" if times > 1 else ""))
            last = id_


def printable(part: LabeledText, special_names: frozenset[str]) -> str:
    """The text with control characters escaped, so that it cannot command a terminal; text that spells a special token
    gets a backslash, so that it differs from one."""
    text = escape_control(part.text, keep="\n\t")
    if part.kind != SPECIAL:
        for name in special_names:
            text = text.replace(name, "\\" + name)
    return text
