"""Text from tokens: stop strings and characters across token boundaries, and what may be shown while streaming."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcoder.errors import ConfigError
from jaxcoder.inference.text import TextAssembler


class Bytes:
    """A tokenizer whose token i stands for pieces[i]."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)


def assemble(pieces, stop=(), complete=True):
    """(text, whether stopped, what was shown after each token and at the end)."""
    assembler = TextAssembler(Bytes(pieces), stop)
    shown = []
    for token in range(len(pieces)):
        if assembler.push(token):
            break
        shown.append(assembler.take())
    assembler.finish(complete=complete)
    shown.append(assembler.take(final=True))
    return assembler.text, assembler.stopped, shown


def first_complete_stop(text, stop):
    """The text before the stop string that is complete first, found character by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    st.text(alphabet="abé漢\n", max_size=30),
    st.lists(st.text(alphabet="abé漢\n", min_size=1, max_size=4), max_size=4),
    st.data(),
)
def test_stop_strings_do_not_depend_on_token_boundaries(text, stop, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    got, stopped, shown = assemble(pieces, stop)
    assert (got, stopped) == first_complete_stop(text, stop)
    assert "".join(shown) == got


@given(st.lists(st.binary(max_size=5), max_size=8))
def test_any_bytes_decode_as_they_do_at_once(pieces):
    text, _, shown = assemble(pieces)
    assert text == "".join(shown) == b"".join(pieces).decode(errors="replace")


def test_characters_are_shown_whole():
    smile = "😀".encode()
    text, _, shown = assemble([b"a" + smile[:1], smile[1:3], smile[3:] + b"b"])
    assert text == "a😀b" and shown == ["a", "", "😀b", ""]


def test_a_character_that_was_cut_off_is_dropped_and_a_broken_one_replaced():
    pieces = [b"a", "é".encode()[:1]]
    assert assemble(pieces, complete=False)[0] == "a"
    assert assemble(pieces, complete=True)[0] == "a\ufffd"


def test_what_may_begin_a_stop_string_waits():
    text, stopped, shown = assemble([b"x\n", b"de", b"x"], stop=["\ndef"])
    assert (text, stopped, shown) == ("x\ndex", False, ["x", "", "\ndex", ""])
    text, stopped, shown = assemble([b"x\n", b"de", b"f y"], stop=["\ndef"])
    assert (text, stopped, shown) == ("x", True, ["x", "", ""])


def test_an_end_that_waited_is_shown_when_nothing_follows():
    assert assemble([b"x\nde"], stop=["\ndef"])[2] == ["x", "\nde"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="empty"):
        TextAssembler(Bytes([]), ["a", ""])
