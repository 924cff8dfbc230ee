import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcoder.corpus.extensions import LANGUAGES, ExtensionRule
from jaxcoder.corpus.filters import count_alphabetic, count_alphanumeric, has_visible_text, why_dropped


@given(st.text())
def test_counts_are_those_of_str(text):
    assert count_alphanumeric(text) == sum(map(str.isalnum, text))
    assert count_alphabetic(text) == sum(map(str.isalpha, text))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "empty"),
        (" \n\t\n", "empty"),
        ("x" * 1000 + "\n" * 20, None),
        ("x" * 1001 + "\n" * 20, "a line too long"),
        (("x" * 100 + "\n") * 9, None),
        (("x" * 100 + "\n") * 9 + "x" * 101, "lines too long on average"),
        ("x" + "+" * 3, None),
        ("xx" + "+" * 7, "too few alphanumeric characters"),
        ("é1" + "+" * 6, None),
        ('<?xml version="1.0"?>\nabc', "XML"),
    ],
)
def test_limits_are_strict(text, reason):
    assert why_dropped(text, "python", ExtensionRule()) == reason


def test_xml_within_the_first_hundred_characters():
    opening = "<?xml version="  # 14 characters
    inside = "y\n" * ((100 - len(opening)) // 2) + opening
    assert len(inside) == 100
    assert why_dropped(inside + "abc", "python", ExtensionRule()) == "XML"
    assert why_dropped("y" + inside + "abc", "python", ExtensionRule()) is None
    assert why_dropped(inside + "abc", "xslt", LANGUAGES["xslt"].rule("xsl")) is None


def test_rules_switch_filters_off():
    long_line = "x" * 5000
    assert why_dropped(long_line, "python", ExtensionRule(longest_line=None)) is None  # the mean goes with it
    assert why_dropped("x" * 600, "glsl", LANGUAGES["glsl"].rule("fsh")) == "a line too long"
    assert why_dropped("+" * 50, "sas", LANGUAGES["sas"].rule("sas")) is None
    rule = ExtensionRule(alphabetic=0.25)
    assert why_dropped("x123", "ada", rule) is None
    assert why_dropped("x1234", "ada", rule) == "too few letters"


@pytest.mark.parametrize("size, reason", [(99, True), (100, False), (5000, False), (5001, True)])
@pytest.mark.parametrize("language", ["json", "yaml"])
def test_sizes_of_data_files(language, size, reason):
    text = ("abcdefghi\n" * 600)[:size]
    expected = "size of a data file" if reason else None
    assert why_dropped(text, language, LANGUAGES[language].rule(language)) == expected


def test_html_needs_visible_text():
    assert has_visible_text("<p>" + "word " * 30 + "</p>")
    assert not has_visible_text("<p>" + "x" * 100 + "</p>")
    assert has_visible_text("<p>" + "x" * 101 + "</p>")
    assert not has_visible_text("<script>" + "word " * 300 + "</script><p>" + "x" * 101 + "</p>")
    assert not has_visible_text("<style>" + "word " * 30 + "</style>")
    assert not has_visible_text("<div class='x'></div>" * 100 + "x" * 150)
    assert not has_visible_text("<![if x]><!DOCTYPE [<!")
    html = "<p>" + "word " * 5 + "</p>"
    assert why_dropped(html, "html", ExtensionRule()) == "HTML with little visible text"
