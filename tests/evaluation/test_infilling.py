"""Which lines are asked for, and how answers are scored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcoder.evaluation.infilling import edit_distance, edit_similarity, infill_scores, single_line_gaps
from jaxcoder.io.document import Document

SOURCE = '''"""A module that does a thing."""
import os

# a comment that is long enough
def first(value):
    total = value * 2  # twice

    return total + 1   
        ))))))))))))))
x = 1
'''
DOCUMENTS = [Document.from_text(SOURCE), Document.from_text(""), Document.from_text(SOURCE.replace("first", "second"))]
ASKED = {"import os", "def first(value):", "total = value * 2  # twice", "return total + 1"}


def test_the_lines_that_may_be_asked_for():
    gaps = single_line_gaps(DOCUMENTS[:1], count=100, seed=0)
    assert {gap.line for gap in gaps} == ASKED
    for gap in gaps:
        assert gap.prefix + gap.line + gap.suffix == SOURCE
        assert gap.prefix == "" or gap.prefix.rpartition("\n")[2].isspace() or gap.prefix.endswith("\n")


def test_the_choice_is_fixed_and_spread_over_documents():
    gaps = single_line_gaps(iter(DOCUMENTS), count=4, seed=1)
    assert gaps == single_line_gaps(DOCUMENTS, count=4, seed=1)
    assert single_line_gaps(DOCUMENTS, count=2, seed=1) == gaps[:2]
    assert gaps != single_line_gaps(DOCUMENTS, count=4, seed=2)
    around = ["second" in gap.prefix + gap.line + gap.suffix for gap in gaps]
    assert around[0] != around[1] and around[2] != around[3]


def test_what_is_around_a_line_is_limited_at_line_starts():
    lines = [f"variable_{number} = {number}\n" for number in range(100)]
    document = Document.from_text("".join(lines))
    for gap in single_line_gaps([document], count=20, seed=0, max_prefix_chars=60, max_suffix_chars=40):
        assert len(gap.prefix) <= 60 and len(gap.suffix) <= 40
        assert gap.prefix == "" or gap.prefix.startswith("variable_")
        assert gap.suffix.startswith("\n") and gap.suffix.endswith("\n")


class Echo:
    """Answers every gap with the next of the given texts."""

    def __init__(self, answers):
        self.answers = answers

    def complete(self, prompts, *, max_new_tokens, stop=()):
        raise NotImplementedError

    def infill(self, gaps, *, max_new_tokens, stop=()):
        assert stop == ("\n",) and len(gaps) == len(self.answers)
        return self.answers


def test_scores():
    gaps = single_line_gaps(DOCUMENTS[:1], count=4, seed=0)
    perfect = infill_scores(Echo([f"{gap.line}  " for gap in gaps]), gaps)
    assert (perfect.count, perfect.exact_match, perfect.edit_similarity) == (4, 1.0, 1.0)
    half = infill_scores(Echo([gaps[0].line, gaps[1].line, "", ""]), gaps)
    assert (half.exact_match, half.edit_similarity) == (0.5, 0.5) and half.answers[2] == ""
    assert infill_scores(Echo([]), []).count == 0


@pytest.mark.parametrize(
    "first, second, distance",
    [("", "", 0), ("abc", "abc", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_edit_distances(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance
    assert edit_similarity(first, second) == pytest.approx(1 - distance / max(len(first), len(second), 1))


@given(st.text("ab", max_size=6), st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_edit_distance_is_a_distance(a, b, c):
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
