"""A document of a corpus: a list of parts, each ordinary text or one special token.

Special parts mark structure (file names, notebook cells, commit messages). Sentinels are never parsed out of text, so
text that spells one stays text.
"""

from dataclasses import dataclass

from jaxcoder.errors import DataError


@dataclass(frozen=True)
class Part:
    """Ordinary `text`, or the special token named `special` (StarCoder's spelling); never both.

    ids: the ids of the text, if they are given instead of computed. Encoding with another tokenizer is an error.
    """

    text: str = ""
    special: str | None = None
    ids: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.special is not None and (self.text or self.ids is not None):
            raise DataError(
                f"A document part is either text or a special token, but one has both ({self.special!r} and "
                f"{self.text[:20]!r}): split it into two parts."
            )


@dataclass(frozen=True)
class Document:
    """One document and its origin. lang: name of the language in lower case ("python")."""

    parts: tuple[Part, ...]
    repo_name: str = ""
    path: str = ""
    lang: str = ""

    @classmethod
    def from_text(cls, text: str, *, repo_name: str = "", path: str = "", lang: str = "") -> "Document":
        """A document of one text part."""
        return cls((Part(text),), repo_name=repo_name, path=path, lang=lang)

    @property
    def text(self) -> str:
        """The ordinary text of all parts, without the special tokens."""
        return "".join(part.text for part in self.parts)


def well_formed(text: str) -> str:
    """`text` with surrogates (from JSON escapes and file names) replaced, so that it can be encoded as UTF-8.

    A pair becomes its character, a lone surrogate U+FFFD.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
