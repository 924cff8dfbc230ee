import errno
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcoder.errors import DataError
from jaxcoder.io import atomic
from jaxcoder.io.document import Document, Part, well_formed
from jaxcoder.io.document_files import read_documents, write_documents

STRUCTURED = [
    Document(
        (Part(special="<reponame>"), Part("me/it"), Part(special="<filename>"), Part("é.py")), "me/it", "é.py", "python"
    ),
    Document.from_text("print('<|endoftext|>')\r\n", path="b.py"),
    Document(()),
]
PLAIN = [
    Document.from_text(text, repo_name="r", path=f"{i}.py", lang="python") for i, text in enumerate(["a", "", "é\0"])
]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("documents, plain", [(STRUCTURED, False), (PLAIN, True)])
def test_round_trip(tmp_path, suffix, documents, plain):
    file = tmp_path / f"d{suffix}"
    assert write_documents(documents, file, plain=plain) == 3
    assert list(read_documents(file)) == documents
    again = tmp_path / f"again{suffix}"
    write_documents(documents, again, plain=plain)
    assert file.read_bytes() == again.read_bytes()


@given(texts=st.lists(st.text(st.characters()), max_size=4))
def test_any_text_survives(tmp_path_factory, texts):
    documents = [Document.from_text(text) for text in texts]
    for suffix in (".parquet", ".jsonl"):
        file = tmp_path_factory.mktemp("any") / f"d{suffix}"
        write_documents(documents, file)
        assert [document.text for document in read_documents(file)] == [well_formed(text) for text in texts]


def test_many_rows_keep_their_order(tmp_path):
    documents = [Document.from_text(str(i)) for i in range(2500)]
    write_documents(documents, tmp_path / "d.parquet", plain=True)
    assert list(read_documents(tmp_path / "d.parquet")) == documents


def test_directory_and_list_of_files(tmp_path):
    (tmp_path / "sub").mkdir()
    write_documents(PLAIN[:1], tmp_path / "b.parquet", plain=True)
    write_documents(PLAIN[1:2], tmp_path / "a.jsonl")
    with gzip.open(tmp_path / "sub" / "c.jsonl.gz", "wt") as file:
        file.write('{"content": "zipped"}\n\n')
    (tmp_path / "README").write_text("not documents")
    assert [document.text for document in read_documents(tmp_path)] == ["", "a", "zipped"]
    assert [document.text for document in read_documents([str(tmp_path / "b.parquet"), tmp_path / "sub"])] == [
        "a",
        "zipped",
    ]


def test_lone_surrogate_in_json_becomes_a_replacement(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"content": "a\\ud800"}')
    assert next(read_documents(tmp_path / "d.jsonl")).text == "a\ufffd"


def test_held_out_is_not_mixed_in(tmp_path):
    write_documents(PLAIN, tmp_path / "train.parquet")
    write_documents(PLAIN, tmp_path / "held_out.parquet")
    with pytest.raises(DataError, match="held_out.parquet next to other documents"):
        list(read_documents(tmp_path))
    assert len(list(read_documents([tmp_path / "train.parquet", tmp_path / "held_out.parquet"]))) == 6


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2 has no `parts` or `content`"),
        ('{"text": "x"}', "line 2 has no `parts` or `content`"),
        ('{"content": 5}', "line 2: `content` must be a string, not int"),
        ('{"content": null}', "line 2: `content` must be a string"),
        ('{"content": "x", "path": 5}', "must be strings or absent"),
        ('{"parts": "x"}', "line 2: `parts` must be a list"),
        ('{"parts": [{"text": "x", "special": "<filename>"}]}', "`parts` must be a list of objects"),
        ('{"parts": [{}]}', "`parts` must be a list of objects"),
        ("\\xff" * 3, "line 2 is not JSON"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "d.jsonl"
    file.write_text('{"content": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(file))
    assert str(file) in str(caught.value)


def test_bad_files_are_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(DataError, match="does not exist"):
        list(read_documents(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match="has no documents"):
        list(read_documents(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="not a file of documents"):
        list(read_documents(tmp_path / "a.txt"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_documents(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"code": ["x"], "stars": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"no column `parts` or `content` \(its columns are code, stars\)"):
        list(read_documents(tmp_path / "b.parquet"))
    pq.write_table(pa.table({"content": ["x", None]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="row 1: `content` must be a string"):
        list(read_documents(tmp_path / "c.parquet"))
    (tmp_path / "d.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        list(read_documents(tmp_path / "d.jsonl.gz"))


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="ends in .parquet or .jsonl"):
        write_documents(PLAIN, tmp_path / "d.csv")
    with pytest.raises(DataError, match="with its special tokens to the plain file"):
        write_documents(STRUCTURED, tmp_path / "d.parquet", plain=True)
    assert list(tmp_path.iterdir()) == []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(DataError, match=r"Cannot write .*d.jsonl \(No space left on device\)"):
        write_documents(PLAIN, tmp_path / "d.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "d.jsonl"
    write_documents(PLAIN, file)
    before = file.read_bytes()

    def breaks():
        yield PLAIN[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_documents(breaks(), file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_plain_rows_are_plain(tmp_path):
    write_documents(PLAIN[:1], tmp_path / "d.jsonl", plain=True)
    assert json.loads((tmp_path / "d.jsonl").read_text()) == {
        "content": "a",
        "repo_name": "r",
        "path": "0.py",
        "lang": "python",
    }
