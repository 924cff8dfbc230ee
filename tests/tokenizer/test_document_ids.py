"""Parts of a document that bring their own ids: kept for the tokenizer that made them, refused by any other."""

import pytest

from jaxcoder.errors import DataError
from jaxcoder.io.document import Document, Part
from jaxcoder.io.document_files import read_documents, write_documents


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_parts_may_bring_their_ids(tokenizer, tmp_path, suffix):
    """Ids that the text alone would not give ("def" letter by letter) survive the file and are taken as they are."""
    letters = tuple(id_ for letter in "def" for id_ in tokenizer.encode(letter))
    parts = (Part("x"), Part(special="<filename>"), Part("def", ids=letters), Part("", ids=()), Part("def"))
    documents = [Document(parts, path="a.py"), Document.from_text("print(1)", path="b.py"), Document(())]
    write_documents(documents, tmp_path / f"d{suffix}", with_ids=True)
    assert list(read_documents(tmp_path / f"d{suffix}")) == documents
    ids = tokenizer.encode_document(documents[0])
    filename = tokenizer.special_id("<filename>")
    assert ids == [*tokenizer.encode("x"), filename, *letters, *tokenizer.encode("def")]
    assert len(letters) == 3 != len(tokenizer.encode("def"))
    with pytest.raises(DataError, match="with its ids"):
        write_documents(documents, tmp_path / f"other{suffix}")


@pytest.mark.parametrize("part", [Part("dex", ids=(1, 2)), Part("<filename>", ids=(5,)), Part("d", ids=(10**6,))])
def test_ids_of_another_tokenizer_are_refused(tokenizer, part):
    with pytest.raises(DataError, match="use the tokenizer that|another tokenizer"):
        tokenizer.encode_document(Document((part,)))
