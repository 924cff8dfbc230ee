import pytest

from jaxcoder.errors import DataError
from jaxcoder.io.document import Document, Part, well_formed


def test_text_is_what_the_parts_hold():
    document = Document((Part(special="<reponame>"), Part("a/b"), Part("\n"), Part("x = 1")), path="x.py")
    assert document.text == "a/b\nx = 1"
    assert Document.from_text("x", lang="python") == Document((Part("x"),), lang="python")


def test_a_part_is_not_both():
    with pytest.raises(DataError, match="either text or a special token"):
        Part("text", "<filename>")


@pytest.mark.parametrize(
    "text, mended",
    [("plain", "plain"), ("é😀", "é😀"), ("a\ud800b", "a\ufffdb"), ("\ud83d\ude00", "😀"), ("\udc80", "\ufffd")],
)
def test_surrogates_are_mended(text, mended):
    assert well_formed(text) == mended
