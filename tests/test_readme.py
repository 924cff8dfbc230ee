"""The commands of the README and the guide, run as they stand, in order, with `jaxcoder` being this checkout's."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def block(page: str, heading: str, language: str) -> str:
    """The first fenced block of a language under a heading."""
    return re.search(rf"```{language}\n(.*?)```", page.split(heading, 1)[1], re.S)[1]


def test_step_by_step(tmp_path):
    program = tmp_path / "jaxcoder"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m jaxcoder.cli.main "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def run(script: str, *command: str) -> None:
        finished = subprocess.run(
            [*command, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr

    run(block(GUIDE, "# Step by step", "bash"), "sh", "-ec")
    run(block(GUIDE, "## Token store", "bash"), "sh", "-ec")
    run(block(GUIDE, "## Completion", "python"), sys.executable, "-c")
    run("jaxcoder train smoke --data synthetic", "sh", "-ec")
    assert "jaxcoder train smoke --data synthetic" in GUIDE


def test_the_two_commands_are_one_line_each():
    commands = [block(README, "## Try it", "bash"), block(README, "<!-- test command -->", "bash")]
    for command in commands:
        assert command.count("\n") == 1 and command.startswith("python3 -m venv .venv && ")


def test_the_table_of_configurations_is_true():
    from jaxcoder.config.load import load_run
    from jaxcoder.models.flops import num_parameters

    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (\d+) \| ([\d,]+) \| (\d+) \| ([\d,]+) \|$", README, re.M)
    assert len(rows) == 7
    for name, *numbers in rows:
        model = load_run(name).model
        expected = [num_parameters(model), model.num_layers, model.embed_dim, model.num_heads, model.max_seq_len]
        assert [int(number.replace(",", "")) for number in numbers] == expected, name


def test_paths_in_the_docs_exist():
    """Every file that the docs name, as `room/file.py` or from the top of the repository."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {
        (page.name, path)
        for page in pages
        for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|md|json))`", page.read_text(encoding="utf-8"))
    }
    for page in [*pages, *(ROOT / "benchmarks").rglob("*.md")]:
        for module in re.findall(r"python -m (benchmarks(?:\.[a-z_]+){2})", page.read_text(encoding="utf-8")):
            named.add((page.name, module.replace(".", "/") + ".py"))
    assert len(named) > 30
    missing = [
        (page, path) for page, path in named if not any((top / path).exists() for top in (ROOT, ROOT / "jaxcoder"))
    ]
    assert not missing
