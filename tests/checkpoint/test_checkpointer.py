"""Saving, verifying, restoring: bit-exact, onto other meshes, after damage, after kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxcoder.checkpoint import arrays as array_files
from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.checkpoint.discover import discover_checkpoint
from jaxcoder.checkpoint.names import flatten_tree, unflatten_tree
from jaxcoder.config import CheckpointConfig, MeshConfig, ModelConfig, RunConfig
from jaxcoder.errors import CheckpointError
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.sharding.mesh import make_mesh

MODEL = ModelConfig(
    num_layers=2, embed_dim=16, num_heads=4, head_dim=4, mlp_dim=64, vocab_size=64, max_seq_len=32, num_kv_heads=1
)
RUN = RunConfig(name="test", model=MODEL, num_steps=10, global_batch_size=8)
KEEP_ALL = CheckpointConfig(save_every_steps=1, keep_last=100)


def init(config: ModelConfig = MODEL) -> GPTBigCode:
    return GPTBigCode(config, rngs=nnx.Rngs(0))


def values(seed: int, model=None) -> dict[str, jax.Array]:
    """A flat state of the model's shapes, all random."""
    rng = np.random.default_rng(seed)
    shapes = flatten_tree(model or jax.eval_shape(init), "params/") | {"step": jax.ShapeDtypeStruct((), jnp.int32)}
    return {name: jnp.asarray((rng.normal(size=leaf.shape) * 9).astype(leaf.dtype)) for name, leaf in shapes.items()}


def abstract(arrays):
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(array), err_msg=name)


def open_checkpointer(tmp_path, config=KEEP_ALL, **options) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoints", config, run=RUN, **options)


def test_round_trip_is_bit_exact_and_carries_metadata(tmp_path):
    arrays = values(0)
    arrays["params/wte"] = arrays["params/wte"].at[0, :4].set(jnp.array([-0.0, jnp.inf, 1e-45, jnp.nan]))
    with open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.save(3, arrays, {"samples_consumed": 24})
        checkpointer.wait()
        assert checkpointer.latest_step() == 3
        restored = checkpointer.restore(3, abstract(arrays))
        assert {n: np.asarray(a).tobytes() for n, a in restored.items()} == {
            n: np.asarray(a).tobytes() for n, a in arrays.items()
        }
        assert checkpointer.manifest(3).metadata == {"samples_consumed": 24}
        assert checkpointer.run_config(3) == RUN


def test_state_may_be_donated_right_after_save(tmp_path):
    arrays = values(0)
    expected = {name: np.array(array) for name, array in arrays.items()}
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, arrays, {})
        overwrite(arrays)
        checkpointer.wait()
        assert_same(checkpointer.restore(1, abstract(expected)), expected)


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_restores_onto_another_mesh(tmp_path, num_kv_heads):
    config = ModelConfig(**{**vars(MODEL), "num_kv_heads": num_kv_heads})
    run = RunConfig(**{**vars(RUN), "model": config})
    checkpointer = Checkpointer(tmp_path, KEEP_ALL, run=run)
    plain = jax.eval_shape(lambda: init(config))
    expected = {name: np.asarray(array) for name, array in values(0, plain).items() if name != "step"}
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))):
        model = unflatten_tree(jax.eval_shape(lambda: init(config)), dict(expected), "params/")
        flat = flatten_tree(model, "params/")
        assert flat["params/h/01/mlp/up/kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
        assert_same(flat, expected)
        checkpointer.save(1, flat, {})
        checkpointer.wait()
    assert checkpointer.manifest(1).mesh == {"data": 1, "fsdp": 4, "tensor": 2}
    for mesh in map(make_mesh, (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=1, tensor=4))):
        with jax.set_mesh(mesh):
            target = jax.eval_shape(lambda: init(config))
            arrays = checkpointer.restore(1, flatten_tree(target, "params/"))
            restored = unflatten_tree(target, arrays, "params/")
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
            assert leaf.sharding == NamedSharding(mesh, wanted.sharding.spec)
        assert arrays == {}  # taken out one by one, so that nothing exists twice
        assert_same(flatten_tree(restored, "params/"), expected)
    # And without any mesh.
    restored = unflatten_tree(plain, checkpointer.restore(1, flatten_tree(plain, "params/")), "params/")
    assert_same(flatten_tree(restored, "params/"), expected)


def test_retention(tmp_path):
    config = CheckpointConfig(save_every_steps=2, keep_last=2, keep_every_steps=4)
    arrays = {"params/wte": jnp.ones((2, 2))}
    with open_checkpointer(tmp_path, config) as checkpointer:
        saved = [step for step in range(1, 13) if checkpointer.save(step, arrays, {})]
        assert saved == [2, 4, 6, 8, 10, 12]
        checkpointer.save(13, arrays, {}, force=True)
        checkpointer.wait()
        assert checkpointer.steps() == [4, 8, 12, 13]


def test_a_finished_step_is_not_written_again(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(1, {"params/wte": jnp.ones((2, 2))}, {})
        manifest = tmp_path / "checkpoints/1/manifest.json"
        checkpointer.wait()
        before = manifest.stat().st_mtime_ns
        assert not checkpointer.save(1, {"params/wte": jnp.ones((2, 2))}, {}, force=True)
        assert manifest.stat().st_mtime_ns == before


def test_saves_when_time_has_passed(tmp_path):
    config = CheckpointConfig(save_every_steps=1000, save_every_seconds=0.2)
    checkpointer = open_checkpointer(tmp_path, config)
    assert not checkpointer.is_due(1)
    time.sleep(0.21)
    assert checkpointer.is_due(2)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def _largest(step: Path) -> Path:
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "cut": (lambda step: _cut(_largest(step)), "bytes and was written with"),
    "flipped bit": (lambda step: _flip(_largest(step)), "was altered"),
    "missing file": (lambda step: _largest(step).unlink(), "is missing"),
    "no commit marker": (lambda step: (step / "state/commit_success.txt").unlink(), "commit marker"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "not finished"),
    "cut manifest": (lambda step: _cut(step / "manifest.json"), "damaged"),
    "edited manifest": (
        lambda step: (step / "manifest.json").write_text(
            (step / "manifest.json").read_text().replace('"samples": 2', '"samples": 3')
        ),
        "damaged",
    ),
    "altered config": (lambda step: _flip(step / "config.json"), "config.json was altered"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped_loudly(tmp_path, damage, caplog):
    break_it, words = DAMAGES[damage]
    checkpointer = open_checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(step, {"params/wte": jnp.full((64, 64), float(step))}, {"samples": step})
    checkpointer.wait()
    path = tmp_path / "checkpoints" / "2"
    break_it(path)
    assert checkpointer.latest_step() == 1
    (message,) = caplog.messages
    assert str(path) in message and words in message
    with pytest.raises(CheckpointError, match="cannot be used"):
        discover_checkpoint(tmp_path, step=2)
    # Going on from step 1 must not count the bad one among those to keep.
    config = CheckpointConfig(save_every_steps=1, keep_last=1)
    again = open_checkpointer(tmp_path, config)
    assert again.latest_step() == 1
    again.save(2, {"params/wte": jnp.full((64, 64), 7.0)}, {"samples": 2})
    again.wait()
    assert again.latest_step() == 2 and again.steps() == [2]


def test_bad_later_step_does_not_push_out_good_ones(tmp_path):
    arrays = {"params/wte": jnp.ones((64, 64))}
    checkpointer = open_checkpointer(tmp_path)
    for step in (1, 5):
        checkpointer.save(step, arrays, {})
    checkpointer.wait()
    _flip(_largest(tmp_path / "checkpoints" / "5"))
    again = open_checkpointer(tmp_path, CheckpointConfig(save_every_steps=1, keep_last=1))
    assert again.latest_step() == 1
    again.save(2, arrays, {})
    again.wait()
    assert again.latest_step() == 2


def test_foreign_model_is_refused_by_name(tmp_path):
    arrays = values(0)
    checkpointer = open_checkpointer(tmp_path)
    checkpointer.save(1, arrays, {})
    checkpointer.wait()
    target = abstract(arrays)
    target["params/wpe"] = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    target["params/h/02/ln_1/bias"] = target.pop("params/h/01/ln_1/bias")
    with pytest.raises(CheckpointError) as error:
        checkpointer.restore(1, target)
    for words in (
        "params/h/02/ln_1/bias is missing",
        "params/h/01/ln_1/bias is unexpected",
        "params/wpe has shape (32, 16), expected (64, 16)",
    ):
        assert words in str(error.value)


def test_failed_save_is_raised_by_poll_and_keeps_the_last(tmp_path, monkeypatch):
    arrays = {"params/wte": jnp.ones((4, 4))}
    checkpointer = open_checkpointer(tmp_path)
    checkpointer.save(1, arrays, {})
    checkpointer.wait()

    class Full:
        def result(self):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

    monkeypatch.setattr(array_files, "save_async", lambda path, arrays: Full())
    checkpointer.save(2, arrays, {})
    with pytest.raises(CheckpointError, match="step 2 .*the disk is full.*is of step 1. .* more than 64 bytes"):
        for _ in range(200):
            checkpointer.poll()
            time.sleep(0.01)
    checkpointer.poll()  # logged once
    assert checkpointer.latest_step() == 1
    assert not (tmp_path / "checkpoints" / "2").exists()


def test_a_real_full_disk(tmp_path):
    """RLIMIT_FSIZE stands in for it: every write beyond 100 kB fails."""
    script = """
        import resource, signal, sys
        import jax.numpy as jnp
        sys.path.insert(0, sys.argv[2])
        import test_checkpointer as t
        from pathlib import Path
        checkpointer = t.open_checkpointer(Path(sys.argv[1]))
        checkpointer.save(1, {"params/wte": jnp.ones((8, 8))}, {})
        checkpointer.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpointer.save(2, {"params/wte": jnp.ones((1000, 1000))}, {})
            checkpointer.wait()
        except t.CheckpointError as error:
            print(error)
        print("latest", checkpointer.latest_step())
    """
    done = _python(script, tmp_path)
    assert "the disk is full" in done.stdout and "more than 3.8 MiB" in done.stdout and "latest 1" in done.stdout, (
        done.stdout + done.stderr
    )


def test_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    script = """
        import sys, time
        import jax.numpy as jnp
        sys.path.insert(0, sys.argv[2])
        import test_checkpointer as t
        from pathlib import Path
        checkpointer = t.open_checkpointer(Path(sys.argv[1]), t.CheckpointConfig(save_every_steps=1, keep_last=1))
        for step in range(1, 10_000):
            checkpointer.save(step, {f"params/{i}": jnp.full((256, 1024), float(step)) for i in range(8)}, {})
            print(step, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(Path(__file__).parent)]
    delays = np.random.default_rng(0).uniform(0.0, 0.3, size=3)
    last = 0
    for delay in delays:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
        for _ in range(3):  # the save of `seen` has begun, so the one before it is whole
            seen = int(process.stdout.readline())
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        seen = int((process.communicate()[0].split() or [seen])[-1])
        checkpointer = open_checkpointer(tmp_path)
        last = checkpointer.latest_step()
        assert last in (seen - 1, seen)
        assert [
            path.name for path in (tmp_path / "checkpoints").iterdir() if not (path / "manifest.json").exists()
        ] == []
        restored = checkpointer.restore(
            last,
            {"params/0": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}
            | {f"params/{i}": jax.ShapeDtypeStruct((256, 1024), jnp.float32) for i in range(1, 8)},
        )
        assert all(float(array.min()) == float(array.max()) == last for array in restored.values())
        shutil.rmtree(tmp_path / "checkpoints")


def test_tokenizer_files_are_saved_with_the_weights(tmp_path):
    with open_checkpointer(tmp_path, tokenizer_files={"tokenizer.json": b"{}"}) as checkpointer:
        checkpointer.save(1, {"params/wte": jnp.ones((4, 4))}, {})
    assert (tmp_path / "checkpoints/1/tokenizer/tokenizer.json").read_text() == "{}"


def test_discovery(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        discover_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        discover_checkpoint(tmp_path)
    with open_checkpointer(tmp_path) as checkpointer:
        for step in (9, 10):
            checkpointer.save(step, {"params/wte": jnp.ones((4, 4))}, {})
    newest = tmp_path / "checkpoints" / "10"
    assert [Path(discover_checkpoint(path)) for path in (tmp_path, tmp_path / "checkpoints", newest)] == [newest] * 3
    assert Path(discover_checkpoint(tmp_path, step=9)) == tmp_path / "checkpoints" / "9"
    with pytest.raises(CheckpointError, match="no step 8: there are 9, 10"):
        discover_checkpoint(tmp_path, step=8)


def test_nothing_of_a_module_system_is_on_disk(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, values(0), {})
    metadata = json.loads((tmp_path / "checkpoints/1/state/state/_METADATA").read_text())
    names = [entry["key_metadata"][0]["key"] for entry in metadata["tree_metadata"].values()]
    assert sorted(names) == sorted(values(0))


def _environment() -> dict[str, str]:
    return os.environ | {"JAX_NUM_CPU_DEVICES": "1"}


def _python(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments), str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment())
