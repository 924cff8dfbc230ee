"""Builds that are killed for real, again and again: the process tree at once, its owner alone, or one of the
workers."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import hostile_documents

from jaxcoder.data.build import WorkSizes, build_store
from jaxcoder.io.document_files import write_documents

SIZES = {"shard_tokens": 8192, "sizes": WorkSizes(5000, 20_000)}
SCRIPT = """
import sys
from jaxcoder.data.build import WorkSizes, build_store
from jaxcoder.tasks import ProcessPool
from jaxcoder.tokenizer.tokenizer import Tokenizer

if __name__ == "__main__":
    documents, tokenizer, output = sys.argv[1:]
    sizes = {"shard_tokens": 8192, "sizes": WorkSizes(5000, 20_000)}
    build_store(documents, Tokenizer.load(tokenizer), output, seed=1, mapper=ProcessPool(2), **sizes)
"""


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def processes_of(group: int) -> list[int]:
    """The living processes of a process group, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, of = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if entry.name.isdigit() and int(of) == group and state != "Z":
                found.append(int(entry.name))
    return sorted(found)


def kill_some(process: subprocess.Popen, rng: random.Random) -> str:
    """SIGKILL to the whole tree in a random order, to the owner alone, or to one process below it."""
    group = processes_of(process.pid)
    how = rng.choice(["tree", "owner", "worker"])
    victims = {"tree": rng.sample(group, len(group)), "owner": [process.pid], "worker": [rng.choice(group)]}[how]
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    return how


def drill(tokenizer, directory: Path, num_kills: int, seed: float) -> None:
    documents = directory / "documents.parquet"
    write_documents(hostile_documents(1500), documents)
    tokenizer.save(directory / "tokenizer")
    build_store(documents, tokenizer, directory / "undisturbed", seed=1, **SIZES)
    undisturbed = content(directory / "undisturbed")
    (directory / "script.py").write_text(SCRIPT)
    output = directory / "killed"
    command = [sys.executable, directory / "script.py", documents, directory / "tokenizer", output]
    rng, kills, finished, runs = random.Random(seed), 0, 0, 0
    took = 3.0  # seconds of a build, about; the last one that was left alone says better
    while kills < num_kills or not finished:
        runs += 1
        assert runs < 10 * num_kills + 10
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        started = time.monotonic()
        if kills < num_kills:
            time.sleep(rng.uniform(0, took))
            if process.poll() is None and processes_of(process.pid):
                kill_some(process, rng)
                kills += 1
        process.wait(120)
        took = max(took, time.monotonic() - started) if process.returncode == 0 else took
        deadline = time.monotonic() + 30
        while processes_of(process.pid):  # what an owner leaves behind ends by itself
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if (output / "manifest.json").exists() and process.returncode == 0:
            assert content(output) == undisturbed
            finished += 1
            subprocess.run(["rm", "-r", output], check=True)
    assert kills == num_kills


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_three_kills(tokenizer, tmp_path):
    drill(tokenizer, tmp_path, 3, seed=time.time())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_twenty_kills(tokenizer, tmp_path):
    drill(tokenizer, tmp_path, 20, seed=time.time())
