from pathlib import Path

import pytest

from jaxcoder.corpus.extensions import LANGUAGES, ExtensionRule, classify, resolve_languages
from jaxcoder.errors import ConfigError

FACTS = Path(__file__).resolve().parents[3] / "shared" / "starcoder-facts.md"


def test_no_row_was_lost():
    used = [language for language in LANGUAGES.values() if language.kept]
    assert len(used) == 88
    assert sum(len(language.kept.split()) for language in used) == 266


@pytest.mark.skipif(not FACTS.exists(), reason=f"no {FACTS}")
def test_table_is_the_one_of_the_facts():
    section = FACTS.read_text().partition("## Appendix A.")[2].partition("## Appendix B.")[0]
    rows = [line.strip()[1:-1].split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(LANGUAGES)
    for row in rows:
        name, kept, departures, dropped = [cell.strip() for cell in row]
        language = LANGUAGES[name]
        assert language.kept.split() == ([] if kept.startswith("(none: ") else kept.split()), name
        assert language.dropped.split() == dropped.split(), name
        assert _departures(departures) == {
            extension: rule for extensions, rule in language.departures.items() for extension in extensions.split()
        }, name


def _departures(cell: str) -> dict[str, ExtensionRule]:
    fields: dict[str, dict] = {}
    extensions: list[str] = []
    for item in filter(None, map(str.strip, cell.split(";"))):
        head, colon, tail = item.partition(": ")
        if colon and head != "dedup note":
            extensions, item = head.split(","), tail
        key, value = {
            "LL": lambda x: ("longest_line", None if x == "off" else int(x)),
            "alnum": lambda x: ("alphanumeric", None),
            "alpha": lambda x: ("alphabetic", float(x)),
            "XML": lambda x: ("xml", False),
            "dedup": lambda x, item=item: ("near_dedup", item.partition(": ")[2]),
        }[item.split()[0]](item.split()[1])
        for extension in extensions:
            fields.setdefault(extension, {})[key] = value
    return {extension: ExtensionRule(**values) for extension, values in fields.items()}


@pytest.mark.parametrize(
    "name, languages, expected",
    [
        ("a.py", ("python",), ("python", ExtensionRule())),
        ("A.PY", ("python",), ("python", ExtensionRule())),
        ("a.pyi", ("python",), None),
        ("py", ("python",), None),
        ("Makefile", ("python",), None),
        ("a.py", ("c", "java"), None),
        ("a.tar.py", ("python",), ("python", ExtensionRule())),
        ("x.rkt", ("racket",), ("racket", None)),
        ("x.scrbl", ("racket",), ("racket", ExtensionRule())),
        ("x.fsh", ("glsl",), ("glsl", ExtensionRule(longest_line=500))),
        ("Makefile", ("makefile", "dockerfile"), ("makefile", ExtensionRule())),
        ("GNUmakefile", ("makefile",), ("makefile", ExtensionRule())),
        ("Makefile.txt", ("makefile",), ("makefile", ExtensionRule())),
        ("notes.txt", ("makefile",), None),
        ("LICENSE", ("makefile", "dockerfile"), None),
        ("Dockerfile", ("dockerfile", "makefile"), ("dockerfile", ExtensionRule())),
        ("Dockerfile.1", ("dockerfile",), ("dockerfile", ExtensionRule())),
        ("page.1", ("dockerfile",), None),
        ("x.cmake", ("cmake", "makefile"), ("cmake", ExtensionRule(longest_line=None))),
        (".py", ("python",), ("python", ExtensionRule())),
    ],
)
def test_classify(name, languages, expected):
    assert classify(name, languages) == expected


def test_languages_by_name():
    assert resolve_languages(["Python", "cpp", "python"]) == ("c++", "python")
    assert len(resolve_languages(["all"])) == 88
    with pytest.raises(ConfigError, match="did you mean `python`"):
        resolve_languages(["pyhton"])
    with pytest.raises(ConfigError, match="choose among ada"):
        resolve_languages(["swift"])
    with pytest.raises(ConfigError, match="name at least one"):
        resolve_languages([])
