"""The house's rules on imports: who may import whom, what is heavy, what is never imported. Read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxcoder"
EVERYONE = {"protocols", "errors", "compat", "formatting", "__init__"}  # __init__ holds the version
EVERYTHING = {path.stem for path in PACKAGE.iterdir() if path.is_dir()} | {"tasks"}

# Room -> the rooms that it may import: the table of the design.
ALLOWED = {
    "__init__": set(),
    "__main__": {"cli"},
    "cli": EVERYTHING,
    "recipes": EVERYTHING - {"cli"},
    "benchmarks": EVERYTHING - {"cli", "recipes"},
    "drill": EVERYTHING - {"cli", "recipes"},
    "serve": {"inference", "attribution"},
    "evaluation": {"tokenizer", "io", "tasks"},
    "plan": {"runtime", "data", "train", "models", "kernels", "sharding", "config"},
    "train": {
        "runtime", "models", "kernels", "data", "checkpoint", "sharding", "record", "tokenizer", "config", "io",
    },
    "inference": {"models", "kernels", "sharding", "checkpoint", "convert", "tokenizer", "config"},
    "attribution": {"corpus", "data", "tokenizer", "tasks", "io"},
    "report": {"record", "io"},
    "doctor": {"record", "io", "config"},
    "convert": {"models", "checkpoint", "tokenizer", "io", "config"},
    "models": {"kernels", "sharding", "config"},
    "checkpoint": {"sharding", "config", "io"},
    "data": {"tokenizer", "tasks", "io", "config"},
    "corpus": {"tokenizer", "tasks", "io", "config"},
    "record": {"io", "config"},
    "runtime": {"io", "config"},
    "tokenizer": {"tasks", "io", "config"},
    "sharding": {"config"},
    "kernels": set(),
    "tasks": {"io"},
    "config": set(),
    "io": set(),
    "formatting": set(),
    "protocols": set(),
    "errors": set(),
    "compat": set(),
}  # fmt: skip

WITHOUT_JAX = ("tokenizer", "corpus", "config", "io", "record", "report", "doctor", "tasks", "data")
JAX_FAMILY = {"jax", "jaxlib", "flax", "optax", "orbax"}
MAY_IMPORT_JAX = {"data/loader.py"}
MAY_IMPORT_TENSORFLOW = {"data/seqio_tasks.py"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import of a file, the lazy ones inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def target_room(name: str) -> str:
    """ "jaxcoder.data.store.TokenStore" -> "data"; "jaxcoder.__version__" -> "__init__"."""
    parts = name.split(".")
    if len(parts) == 1 or not ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()):
        return "__init__"
    return parts[1]


def is_jaxcoder(name: str) -> bool:
    return name.split(".")[0] == "jaxcoder"


def test_every_room_is_in_the_table():
    assert {room_of(path) for path in modules()} <= ALLOWED.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    room = room_of(path)
    allowed = ALLOWED[room] | EVERYONE | {room}
    wrong = [f"{path}:{line} imports {name}" for line, name in imported(path)
             if is_jaxcoder(name) and target_room(name) not in allowed]  # fmt: skip
    assert not wrong, f"`{room}` may import {sorted(allowed)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("room", WITHOUT_JAX)
def test_rooms_without_jax(room):
    wrong = [
        f"{path}:{line} imports {name}"
        for path in modules()
        if room_of(path) == room and str(path.relative_to(PACKAGE)) not in MAY_IMPORT_JAX
        for line, name in imported(path)
        if name.split(".")[0] in JAX_FAMILY
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_torch_or_tensorflow():
    wrong = [
        f"{path}:{line} imports {name}"
        for path in modules()
        if str(path.relative_to(PACKAGE)) not in MAY_IMPORT_TENSORFLOW
        for line, name in imported(path)
        if name.split(".")[0] in {"torch", "tensorflow", "transformers", "seqio", "tensorflow_datasets"}
    ]
    assert not wrong, "\n".join(wrong)


def test_runtime_alone_touches_environment_jax_config_and_signals():
    wrong = []
    for path in modules():
        if room_of(path) == "runtime":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "os.environ", "os.getenv", "os.putenv", "jax.config", "jax.distributed", "signal.signal",
            ):  # fmt: skip
                wrong.append(f"{path}:{node.lineno} uses {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_configs_import_only_the_config_room():
    for path in sorted((PACKAGE.parent / "configs").rglob("*.py")):
        for line, name in imported(path):
            allowed = name.startswith(("jaxcoder.config", "jaxcoder_configs")) or name.split(".")[0] in {
                "dataclasses", "collections", "math", "typing", "functools",
            }  # fmt: skip
            assert allowed, f"{path}:{line} imports {name}"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_command_line_imports_nothing_heavy():
    heavy = ["jax", "jaxlib", "numpy", "rich", "matplotlib", "flax", "orbax", "grain", "pyarrow", "tokenizers"]
    code = f"import sys, jaxcoder.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_data_rooms_load_without_jax():
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in modules()
        if room_of(path) in WITHOUT_JAX and str(path.relative_to(PACKAGE)) not in MAY_IMPORT_JAX | MAY_IMPORT_TENSORFLOW
    ]
    code = f"import sys, importlib; [importlib.import_module(name) for name in {names}]; print('jax' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_every_package_is_packed():
    """setup.cfg lists packages one by one: a new room must be added there, or it is missing from the wheel."""
    listed = (PACKAGE.parent / "setup.cfg").read_text(encoding="utf-8").split()
    for path in PACKAGE.rglob("*.py"):
        assert ".".join(path.parent.relative_to(PACKAGE.parent).parts) in listed, f"{path.parent} is not in setup.cfg"
