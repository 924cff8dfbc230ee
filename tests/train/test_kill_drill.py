"""Runs that are killed for real, at random moments and in the middle of saves, and whose newest checkpoint is damaged:
their weights, optimizer state and losses at the end are those of a run that nobody disturbed."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxcoder.checkpoint.discover import open_checkpoint, steps_in
from jaxcoder.checkpoint.manifest import MANIFEST
from jaxcoder.record.metrics import read_metrics

NUM_STEPS = 30
CONFIG = f"""
from dataclasses import replace
from jaxcoder.config import CheckpointConfig, MeshConfig
from jaxcoder_configs.smoke import smoke

def drill():
    run = smoke()
    model = replace(run.model, embed_dim=256, num_heads=4, head_dim=64, mlp_dim=1024, max_seq_len=32)
    return replace(
        run,
        name="drill",
        model=model,
        num_steps={NUM_STEPS},
        global_batch_size=2,
        data=replace(run.data, store="synthetic"),
        compute=replace(run.compute, dtype="float32"),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        checkpoint=CheckpointConfig(save_every_steps=2, keep_last=2),
    )
"""


class Drill:
    def __init__(self, directory: Path, seed: int):
        self.random = random.Random(seed)
        self.config = directory / "drill.py"
        self.config.write_text(CONFIG)
        self.environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}

    def start(self, output: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "jaxcoder.cli.main", "train", str(self.config), "--output-dir", str(output)]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finish(self, output: Path) -> str:
        """Its stderr."""
        process = self.start(output)
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        return errors.decode()

    def kill(self, output: Path, *, while_saving: bool, seconds: float) -> bool:
        """Whether it was killed before it had finished."""
        process = self.start(output)
        began = time.monotonic()
        before = set(steps_in(output / "checkpoints"))
        while process.poll() is None and time.monotonic() - began < seconds:
            if while_saving and any(
                not (output / "checkpoints" / str(step) / MANIFEST).exists()
                for step in set(steps_in(output / "checkpoints")) - before
            ):
                break
            time.sleep(0.001)
        process.kill()
        process.communicate()
        return process.returncode != 0


def damage_newest(output: Path, how: random.Random) -> None:
    """Truncates or alters the largest file of the newest checkpoint."""
    newest = max(steps_in(output / "checkpoints"))
    files = [path for path in (output / "checkpoints" / str(newest)).rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if how.random() < 0.5:
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 4
    victim.write_bytes(content)


def arrays(output: Path) -> dict[str, bytes]:
    """The files' own hashes of the last checkpoint's arrays, by name."""
    import jax

    from jaxcoder.checkpoint import arrays as array_files

    directory, manifest = open_checkpoint(str(output))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=one) for name, info in manifest.arrays.items()
    }
    return {name: np.asarray(array).tobytes() for name, array in array_files.load(directory, targets).items()}


def losses(output: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(output / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, float]:
    """A complete run, and the seconds it took."""
    directory = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    Drill(directory, 0).finish(directory / "run")
    return directory / "run", time.monotonic() - began


def drill(directory: Path, undisturbed: tuple[Path, float], *, kills: int, seed: int) -> None:
    work, (expected, duration) = Drill(directory, seed), undisturbed
    output, killed = directory / "disturbed", 0
    while killed < kills:
        saving = killed % 2 == 0
        if not work.kill(output, while_saving=saving, seconds=duration if saving else work.random.uniform(0, duration)):
            # It was done already: another run of the same, so that the rest of the kills hit something.
            assert arrays(output) == arrays(expected)
            output = directory / f"disturbed-{killed}"
            continue
        killed += 1
        complete = [
            s for s in steps_in(output / "checkpoints") if (output / "checkpoints" / str(s) / MANIFEST).exists()
        ]
        if killed % 3 == 0 and len(complete) > 1 and max(complete) == max(steps_in(output / "checkpoints")):
            damage_newest(output, work.random)
    work.finish(output)
    assert losses(output) == losses(expected)
    assert [step for step, _ in losses(output)] == list(range(1, NUM_STEPS + 1))
    assert arrays(output) == arrays(expected)


def test_a_kill_in_the_middle_of_a_save(undisturbed, tmp_path):
    drill(tmp_path, undisturbed, kills=1, seed=1)


@pytest.mark.slow
def test_twenty_kills(undisturbed, tmp_path):
    drill(tmp_path, undisturbed, kills=20, seed=int(time.time()))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(undisturbed, tmp_path):
    work, run = Drill(tmp_path, 0), shutil.copytree(undisturbed[0], tmp_path / "run")
    damage_newest(run, work.random)
    logged = work.finish(run)
    assert f"checkpoints/{NUM_STEPS}" in logged and "Continuing after step" in logged
    assert arrays(run) == arrays(undisturbed[0]) and losses(run) == losses(undisturbed[0])
