from hypothesis import given
from hypothesis import strategies as st

from jaxcoder.corpus.split import KeptFile, choose_held_out, linked_packages, packages_of, without_copies


def _file(package, path, content, size=10):
    return KeptFile(f"/{path}", package, path, "python", content.encode(), size)


def test_packages_of_a_package_root():
    paths = ["six.py", "a/x.py", "a/b/y.py", "big/z.py", ".odd"]
    sizes = dict.fromkeys(paths, 1) | {"big/z.py": 1000}
    assert packages_of(sizes, is_package_root=True) == {
        "six.py": "six",
        "a/x.py": "a",
        "a/b/y.py": "a",
        "big/z.py": "big",
        ".odd": ".odd",
    }


def test_a_wrapper_is_not_a_package():
    sizes = {"src/p/a/x.py": 500, "src/p/a/y.py": 100, "src/p/b.py": 400, "setup.py": 10}
    assert packages_of(sizes, is_package_root=False) == {
        "src/p/a/x.py": "src/p/a",
        "src/p/a/y.py": "src/p/a",
        "src/p/b.py": "src/p/b",
        "setup.py": "setup",
    }
    assert set(packages_of({"a/x.py": 80, "b/x.py": 20}, is_package_root=False).values()) == {"a", "b"}
    assert packages_of({}, is_package_root=False) == {}


def test_packages_that_share_a_file_are_linked():
    files = [_file("a", "a/1", "one"), _file("b", "b/1", "one"), _file("b", "b/2", "two"), _file("c", "c/1", "two")]
    files += [_file("d", "d/1", "three")]
    assert linked_packages(files) == [("a", "b", "c"), ("d",)]
    assert choose_held_out(files, 0.5, seed=0) == {"d"}


def test_size_of_the_held_out_set():
    files = [_file(f"p{i}", f"p{i}/x", str(i)) for i in range(100)]
    held_out = choose_held_out(files, 0.1, seed=0)
    assert len(held_out) == 10
    assert held_out == choose_held_out(files[::-1], 0.1, seed=0)
    assert held_out != choose_held_out(files, 0.1, seed=1)
    assert len(held_out & choose_held_out(files[:-1], 0.1, seed=0)) >= 8
    assert choose_held_out(files, 0.0, seed=0) == frozenset()
    assert choose_held_out(files[:1], 0.5, seed=0) == frozenset()


def test_at_least_the_smallest_is_held_out():
    files = [_file("a", "a/x", "1", 100), _file("b", "b/x", "2", 40)]
    assert choose_held_out(files, 0.01, seed=0) == {"b"}


def test_packages_of_the_same_files_cannot_be_split():
    assert choose_held_out([_file("a", "a/x", "same"), _file("b", "b/x", "same")], 0.5, seed=0) == frozenset()


def test_when_everything_hangs_together_copies_stay_in_training():
    files = [_file(name, f"{name}/license", "same") for name in "abc"]
    files += [_file(name, f"{name}/own", name, 10 + i) for i, name in enumerate("abc")]
    held_out = choose_held_out(files, 0.05, seed=0)
    assert held_out == {"a"}
    unique = without_copies(files, held_out)
    assert [file.path for file in unique] == ["a/own", "b/license", "b/own", "c/own"]


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9), st.integers(1, 100)), max_size=30),
    st.floats(0, 0.9),
    st.integers(0, 3),
)
def test_no_text_on_both_sides_and_none_lost(rows, fraction, seed):
    files = [_file(package, f"{package}/{i}", str(text), size) for i, (package, text, size) in enumerate(rows)]
    held_out = choose_held_out(files, fraction, seed)
    unique = without_copies(files, held_out)
    assert len({file.digest for file in unique}) == len(unique)
    assert {file.digest for file in unique} == {file.digest for file in files}
    in_training = {file.digest for file in files if file.repo_name not in held_out}
    assert not any(file.digest in in_training for file in unique if file.repo_name in held_out)
    packages = {file.repo_name for file in files}
    assert held_out < packages or not packages
    assert {file.repo_name in held_out for file in unique} == (
        {True, False} if held_out else {False} if files else set()
    )
    owners = [{file.repo_name for file in files if file.digest == digest} for digest in {file.digest for file in files}]
    splittable = len(linked_packages(files)) > 1 or any(len(names) == 1 for names in owners)
    assert bool(held_out) == (fraction > 0 and len(packages) > 1 and splittable)
