"""Incremental decoding of tokens to text: no character is split, no text returned that a stop string may remove.

Stop strings are matched in the text, not in the tokens. Of several, the first one to be complete counts, so the result
does not depend on token boundaries.
"""

import codecs
from collections.abc import Sequence

from jaxcoder.errors import ConfigError
from jaxcoder.tokenizer.tokenizer import Tokenizer


def check_stop(stop: Sequence[str]) -> None:
    """Raises ConfigError for an empty stop string, which would end every text."""
    if "" in stop:
        raise ConfigError("A stop string is empty, which every text contains: leave it out.")


class TextAssembler:
    """The text of one row.

    text: the complete characters decoded so far, up to the stop string. stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        check_stop(stop)
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._taken = 0
        self.text, self.stopped = "", False

    def push(self, token: int) -> bool:
        """Adds a token that is not special; returns `stopped`, after which tokens are ignored."""
        if not self.stopped:
            self._append(self._decoder.decode(self._tokenizer.decode_bytes([token])))
        return self.stopped

    def finish(self, *, complete: bool) -> None:
        """Ends the text. An incomplete character becomes U+FFFD if the answer is complete; in a truncated answer it is
        dropped."""
        if complete and not self.stopped:
            self._append(self._decoder.decode(b"", final=True))

    def take(self, *, final: bool = False) -> str:
        """New text since the last call, without an end that may be the start of a stop string, unless `final`."""
        end = len(self.text) - (0 if final or self.stopped else self._possible_stop())
        start, self._taken = self._taken, max(self._taken, end)
        return self.text[start:end]

    def _append(self, new: str) -> None:
        before = len(self.text)
        self.text += new
        # A stop string that was not complete before ends in the new text.
        starts = ((self.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stop)
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)[1]]

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
