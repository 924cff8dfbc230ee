"""A document: what travels from the corpus to the token store.

A document is a list of parts, and a part is ordinary text or one special token. Structure (file names, notebook cells,
commit messages) is carried by special parts; nothing ever looks for a sentinel inside text, so text that happens to
spell one stays text.
"""

from dataclasses import dataclass

from jaxcoder.errors import DataError


@dataclass(frozen=True)
class Part:
    """Ordinary `text`, or the special token named `special` (StarCoder's spelling); never both.

    ids: the ids of the text, where something else than its text decides them (it was encoded elsewhere, in other
    pieces). They count for the tokenizer that they belong to; any other refuses them.
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
    """One document and where it came from; `lang` is the language's name in lower case ("python")."""

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
    """`text` with surrogates replaced: a pair becomes its character, a lone one U+FFFD (UTF-8 cannot hold either).

    Such strings come from JSON escapes and from file names; everything else passes unchanged.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
