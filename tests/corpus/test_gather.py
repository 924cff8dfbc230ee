import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxcoder.corpus.gather import HELD_OUT_FILE, MANIFEST_FILE, TRAIN_FILE, gather
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.io import atomic
from jaxcoder.io.document_files import read_documents

CODE = "def function_{0}(argument):\n    return argument + {0}\n"


def _tree(root: Path, packages: int = 10, files: int = 5) -> Path:
    for package in range(packages):
        for file in range(files):
            path = root / f"package{package}" / f"module{file}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(CODE.format(package * 1000 + file) * 3)
    return root


def _contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_what_comes_out(tmp_path):
    tree = _tree(tmp_path / "code")
    (tree / "package0" / "long.py").write_text("x = " + "1" * 2000)
    (tree / "package0" / "empty.py").write_text("")
    (tree / "package0" / "latin.py").write_bytes("# \xe9".encode("latin-1"))
    (tree / "package0" / "binary.py").write_bytes(b"\0\0")
    (tree / "package0" / "data.csv").write_text("1,2")
    (tree / "package1" / "copy.py").write_text(CODE.format(1001) * 3)
    summary = gather([tree], tmp_path / "corpus", held_out_fraction=0.25, seed=1)
    assert summary.files_found == 56
    assert summary.dropped == {
        "a line too long": 1,
        "empty": 1,
        "not UTF-8": 1,
        "binary": 1,
        "not a source file of python": 1,
        "exact copy of another file": 1,
    }
    train = list(read_documents(tmp_path / "corpus" / TRAIN_FILE))
    held_out = list(read_documents(tmp_path / "corpus" / HELD_OUT_FILE))
    assert (len(train), len(held_out)) == (40, 10) == (summary.train_documents, summary.held_out_documents)
    assert sum(len(document.text.encode()) for document in train) == summary.train_bytes
    assert {document.repo_name for document in held_out} == set(summary.held_out_packages)
    assert not {document.repo_name for document in train} & set(summary.held_out_packages)
    document = next(document for document in train + held_out if document.path == "package3/module2.py")
    assert (document.repo_name, document.lang) == ("code/package3", "python")
    assert document.text == (tree / document.path).read_text()
    assert "56 files found, 50 kept" in summary.lines()[0]


def test_vendored_copies_do_not_leak(tmp_path):
    tree = _tree(tmp_path / "code")
    for package in range(10):  # each vendors its neighbour, so that any split by name alone would leak
        vendor = tree / f"package{package}" / "_vendor"
        vendor.mkdir()
        for file in (tree / f"package{(package + 1) % 4}").glob("*.py"):
            (vendor / file.name).write_bytes(file.read_bytes())
    gather([tree], tmp_path / "corpus", held_out_fraction=0.3)
    sides = [{d.text for d in read_documents(tmp_path / "corpus" / name)} for name in (TRAIN_FILE, HELD_OUT_FILE)]
    assert sides[1] and not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 50


def test_deterministic_and_reused(tmp_path):
    tree = _tree(tmp_path / "code")
    first = gather([tree], tmp_path / "a")
    gather([tree], tmp_path / "b")
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    (tree / "package0" / "new.py").write_text(CODE.format(99))
    again = gather([tree], tmp_path / "a")
    assert again.reused and _contents(tmp_path / "a") == _contents(tmp_path / "b")
    assert again.train_documents == first.train_documents and again.lines()[1:] == first.lines()[1:]
    for arguments in ({"seed": 5}, {"max_bytes": 100}, {"held_out_fraction": 0.2}, {"languages": ["c"]}):
        with pytest.raises(DataError, match=f"gathered with other arguments .{next(iter(arguments))}"):
            gather([tree], tmp_path / "a", **arguments)


def test_damaged_output_is_made_anew(tmp_path):
    tree = _tree(tmp_path / "code")
    gather([tree], tmp_path / "a")
    good = _contents(tmp_path / "a")
    (tmp_path / "a" / TRAIN_FILE).write_bytes(b"cut")
    assert not gather([tree], tmp_path / "a").reused
    assert _contents(tmp_path / "a") == good
    (tmp_path / "a" / MANIFEST_FILE).unlink()
    (tmp_path / "a" / f".{TRAIN_FILE}.tmp123").write_bytes(b"left by a killed run")
    gather([tree], tmp_path / "a")
    assert _contents(tmp_path / "a") == good


def test_max_bytes(tmp_path):
    tree = _tree(tmp_path / "code", packages=20, files=10)
    summary = gather([tree], tmp_path / "a", max_bytes=5000)
    assert 5000 <= summary.train_bytes + summary.held_out_bytes < 5400
    assert summary.dropped["beyond max_bytes"] > 100
    packages = {document.repo_name for document in read_documents(tmp_path / "a" / TRAIN_FILE)}
    assert len(packages) > 10


def test_other_languages(tmp_path):
    tree = _tree(tmp_path / "code")
    (tree / "package0" / "a.c").write_text("int main(void) { return 0; }\n")
    (tree / "package1" / "x.cats").write_text("int x;\n")
    summary = gather([tree], tmp_path / "a", languages=["c", "python"])
    assert summary.dropped == {"an extension that StarCoder left out": 1}
    assert summary.train_documents + summary.held_out_documents == 51


def test_nothing_held_out_on_request(tmp_path):
    summary = gather([_tree(tmp_path / "code", packages=1, files=1)], tmp_path / "a", held_out_fraction=0)
    assert (summary.train_documents, summary.held_out_documents) == (1, 0)
    assert list(read_documents(tmp_path / "a" / HELD_OUT_FILE)) == []


def _bad_trees(root: Path) -> dict[str, Path]:
    trees = {name: root / name for name in ("empty", "binary", "other", "filtered", "single")}
    for tree in trees.values():
        tree.mkdir()
    (trees["binary"] / "a.py").write_bytes(b"\0")
    (trees["binary"] / "b.py").write_bytes(b"\xff\xfe")
    (trees["other"] / "README").write_text("hello")
    (trees["filtered"] / "a.py").write_text("x" * 5000)
    (trees["single"] / "a.py").write_text(CODE.format(1))
    return trees | {"missing": root / "missing", "file": root / "other" / "README"}


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "does not exist"),
        ("file", "is a file"),
        ("empty", "holds no files"),
        ("binary", r"No file under .*binary can be used \(1 binary, 1 not UTF-8\)"),
        ("other", "1 not a source file of python"),
        ("filtered", "1 a line too long"),
        ("single", "is one package"),
    ],
)
def test_trees_without_usable_code(tmp_path, kind, message):
    (tmp_path / "trees").mkdir()
    with pytest.raises(DataError, match=message):
        gather([_bad_trees(tmp_path / "trees")[kind]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"held_out_fraction": 1.0}, "held_out_fraction is 1.0"),
        ({"held_out_fraction": -0.1}, "held_out_fraction is -0.1"),
        ({"held_out_fraction": float("nan")}, "held_out_fraction is nan"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"languages": ["pyton"]}, "did you mean `python`"),
    ],
)
def test_impossible_arguments(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        gather([tmp_path], tmp_path / "out", **arguments)


def test_output_directory_of_something_else(tmp_path):
    tree = _tree(tmp_path / "code")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"other files \(thesis.tex\)"):
        gather([tree], tmp_path / "out")
    assert _contents(tmp_path / "out") == {"thesis.tex": b"precious"}
    (tmp_path / "file").write_text("precious")
    with pytest.raises(DataError, match="file"):
        gather([tree], tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST_FILE).write_text(json.dumps({"format": "somebody else's"}))
    with pytest.raises(DataError, match="another format"):
        gather([tree], tmp_path / "other")


def test_full_disk(tmp_path, monkeypatch):
    tree = _tree(tmp_path / "code")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(DataError, match=r"Cannot write .*train.parquet \(No space left on device\)"):
        gather([tree], tmp_path / "out")
    assert _contents(tmp_path / "out") == {}
    monkeypatch.undo()
    assert gather([tree], tmp_path / "out").train_documents > 0


def test_a_file_that_changes_meanwhile(tmp_path):
    class Changes:
        def __init__(self, file):
            self.file = file

        def start(self, what, total, unit):
            if what.startswith("Writing"):
                self.file.write_text("changed")

        def advance(self, amount, note=""): ...

        def finish(self, summary=""): ...

    tree = _tree(tmp_path / "code")
    with pytest.raises(DataError, match="changed while it was gathered"):
        gather([tree], tmp_path / "out", progress=Changes(tree / "package1" / "module1.py"))
    assert not list((tmp_path / "out").glob("*"))


def test_file_names_that_are_not_utf8(tmp_path):
    tree = _tree(tmp_path / "code")
    try:
        (Path(os.fsdecode(os.fsencode(tree) + b"/package1/\xff.py"))).write_text(CODE.format(5))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    gather([tree], tmp_path / "out", held_out_fraction=0)
    assert "package1/\ufffd.py" in {document.path for document in read_documents(tmp_path / "out" / TRAIN_FILE)}


def test_killed_at_any_time(tmp_path):
    tree = _tree(tmp_path / "code", packages=30, files=20)
    gather([tree], tmp_path / "expected")
    code = (
        "import sys; from jaxcoder.corpus.gather import gather; print('go', flush=True); "
        "gather(sys.argv[1:2], sys.argv[2])"
    )
    for delay in (0.005, 0.04, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tree), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    gather([tree], tmp_path / "out")
    assert _contents(tmp_path / "out") == _contents(tmp_path / "expected")
