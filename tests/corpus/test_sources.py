import os
from collections import Counter

import pytest

from jaxcoder.corpus import sources
from jaxcoder.corpus.sources import Source, directory_sources, interpreter_sources, read_source, walk
from jaxcoder.errors import DataError


def _paths(root, skipped=None):
    return [file.path for file in walk(Source(root, "x"), Counter() if skipped is None else skipped)]


def test_walk_is_sorted_and_skips_caches(tmp_path):
    for name in [
        "b/z.py",
        "b/a.py",
        "a.py",
        ".git/x.py",
        "b/__pycache__/x.py",
        "node_modules/x.js",
        "q-1.dist-info/r.py",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "b" / ".hidden.py").write_text("x")
    assert _paths(tmp_path) == ["a.py", "b/.hidden.py", "b/a.py", "b/z.py"]


def test_links_and_odd_files(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.py").write_text("x")
    (tmp_path / "d" / "loop").symlink_to(tmp_path)
    (tmp_path / "to_file.py").symlink_to(tmp_path / "d" / "x.py")
    (tmp_path / "broken.py").symlink_to(tmp_path / "none")
    (tmp_path / "self.py").symlink_to(tmp_path / "self.py")
    os.mkfifo(tmp_path / "pipe.py")
    skipped = Counter()
    assert _paths(tmp_path, skipped) == ["to_file.py", "d/x.py"]
    assert skipped == {"link to a directory": 1, "broken link": 2, "not a regular file": 1}


def test_unreadable_directory_is_counted(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "x.py").write_text("x")
    scandir = os.scandir

    def refuses(path):
        if os.path.basename(path) == "d":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(sources.os, "scandir", refuses)
    skipped = Counter()
    assert _paths(tmp_path, skipped) == ["x.py"]
    assert skipped == {"unreadable directory": 1}


def test_deep_trees(tmp_path):
    deep = tmp_path.joinpath(*["d"] * 300)
    deep.mkdir(parents=True)
    (deep / "x.py").write_text("x")
    assert len(_paths(tmp_path)) == 1


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"x = 1\r\n", ("x = 1\r\n", None)),
        ("é".encode(), ("é", None)),
        (b"", ("", None)),
        ("é".encode("latin-1"), ("", "not UTF-8")),
        (b"\xed\xa0\x80", ("", "not UTF-8")),
        (b"ab\0c", ("", "binary")),
        (b"x" * ((4 << 20) + 1), ("", "larger than 4.0 MiB")),
    ],
)
def test_reading(tmp_path, content, expected):
    (tmp_path / "f").write_bytes(content)
    assert read_source(str(tmp_path / "f")) == expected
    assert read_source(str(tmp_path / "none")) == ("", "unreadable file")


def test_directories(tmp_path):
    for name in ("a/src", "b/src", "a/src/inner"):
        (tmp_path / name).mkdir(parents=True)
    found = directory_sources(
        [tmp_path / "a/src", tmp_path / "a/src/inner", tmp_path / "b/src", str(tmp_path / "a/src")]
    )
    assert [source.label for source in found] == ["src", "src-2"]
    with pytest.raises(DataError, match="does not exist"):
        directory_sources([tmp_path / "none"])
    (tmp_path / "f.py").write_text("")
    with pytest.raises(DataError, match="is a file"):
        directory_sources([tmp_path / "f.py"])


def test_the_interpreter_has_sources():
    found = interpreter_sources()
    assert found[0].label == "stdlib" and (found[0].root / "ast.py").exists()
    assert any(source.label.startswith("site-packages") for source in found)
