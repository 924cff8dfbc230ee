"""What is installed: a wheel, unpacked away from the checkout, that can train by a configuration's name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's contents, as pip would lay them out."""
    directory = tmp_path_factory.mktemp("wheel")
    tree = directory / "tree"  # a build leaves files behind, and old ones would end up in the wheel
    for name in ("jaxcoder", "configs", "launch"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    finished = subprocess.run(
        [*build, "--wheel-dir", str(directory), str(tree)], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    (wheel,) = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(directory / "site")
    return directory / "site"


def test_every_file_of_the_package_is_in_the_wheel(installed):
    for folder, name in (("jaxcoder", "jaxcoder"), ("configs", "jaxcoder_configs")):
        sources = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        sources |= {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.jinja")}
        assert sources == {
            path.relative_to(installed / name)
            for path in (installed / name).rglob("*")
            if path.suffix in (".py", ".jinja")
        }


def test_the_launch_files_are_in_the_wheel(installed):
    here, there = (
        {path.name for path in folder.iterdir()} for folder in (ROOT / "launch", installed / "jaxcoder_launch")
    )
    assert here == there


def test_the_wheel_trains_outside_the_checkout(installed, tmp_path):
    code = "import sys, jaxcoder; from jaxcoder.cli.main import main; print(jaxcoder.__file__); sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_NUM_CPU_DEVICES": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", code, "train", "smoke", "--data", "synthetic", "--steps", "2"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert str(installed) in finished.stdout
    assert (tmp_path / "runs" / "smoke" / "checkpoints" / "2" / "manifest.json").is_file()
