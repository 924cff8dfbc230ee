"""benchmarks/cross_entropy: the variants agree, and the counts are those of the programs."""

import json
import subprocess

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from benchmarks import command
from benchmarks.cross_entropy import compiled
from benchmarks.cross_entropy.variants import VARIANTS
from jaxcoder.config import MeshConfig
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.sharding.rules import ShardingRules

RULES = ShardingRules()


def test_every_variant_gives_the_same_loss_and_gradients():
    rng = np.random.default_rng(0)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    with jax.set_mesh(mesh):
        specs = [RULES.spec(*dims) for dims in (("batch", "seq", None), ("vocab", "embed"), *[("batch", None)] * 2)]
        arrays = rng.normal(size=(2, 8, 16)), rng.normal(size=(32, 16)), rng.integers(0, 32, (2, 8)), rng.random((2, 8))
        dtypes = np.float32, np.float32, np.int32, np.float32
        placed = [
            jax.device_put(x.astype(dtype), NamedSharding(mesh, spec)) for x, dtype, spec in zip(arrays, dtypes, specs)
        ]
        found = {}
        for name, variant in VARIANTS.items():
            total = jax.jit(jax.value_and_grad(lambda *x: variant(*x, chunk_size=4, rules=RULES), argnums=(0, 1)))
            found[name] = jax.tree.leaves(total(*placed))
    for name in VARIANTS:
        for a, b in zip(found[name], found["whole"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


MATMULS = {"one pass": 3, "tokens, twice": 4, "vocabulary, twice": 4, "whole": 3}


@pytest.mark.parametrize("variant, matmuls", MATMULS.items())
def test_matmuls_memory_and_collectives_are_counted(variant, matmuls):
    tokens, embed_dim, vocab_size, tensor, chunk = 256, 64, 2048, 4, 64
    found = compiled.figures(jax.devices(), variant, 2, tensor, tokens, embed_dim, vocab_size, chunk)
    assert found["flops"] == matmuls * 2 * tokens * embed_dim * vocab_size / tensor
    assert found["cycles"] is None  # of TPUs only
    assert found["temporaries"] > 0
    assert found["collectives"]["all-gather"] >= 2 and found["sent"] > tokens * embed_dim * 2
    if variant == "one pass":  # hidden, table, and three numbers a token for every chunk
        assert found["collectives"]["all-gather"] == 2 + tokens // chunk


def test_the_table(monkeypatch, tmp_path, capsys):
    seen = []

    def run_module(module, option, text, **_):
        case = json.loads(text)
        seen.append(tuple(case))
        flops = 3 * 2 * 8192 * 6144 * 49152 / case[3]
        figures = dict(temporaries=2**20, flops=flops, cycles=1e8, collectives={}, sent=0)
        return subprocess.CompletedProcess([], 0, "COMPILED " + json.dumps(figures), "")

    monkeypatch.setattr(command, "run_module", run_module)
    monkeypatch.setattr(compiled, "_libtpu_version", lambda: "1.2.3")
    output = tmp_path / "figures.json"
    assert command.main(compiled, ["--mesh", "2x4", "--chunks", "2048", "8192", "--output", str(output)]) == 0
    assert [case[1] for case in seen] == [
        variant for variant in VARIANTS for _ in range(1 if variant == "whole" else 2)
    ]
    rows = json.loads(output.read_text())["rows"]
    assert all(row["matmuls"] == 3 and row["temporaries"] == 1 for row in rows)
    assert rows[0]["of_peak"] == pytest.approx(100 * 6 * 8192 * 6144 * 49152 / 4 / 262144 / 1e8)
    assert "one pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [(["--mesh", "3x2"], "whose product is 8"), (["--mesh", "2x4", "--variants", "half"], "got `half`")],
)
def test_bad_input(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "_libtpu_version", lambda: "1.2.3")
    assert command.main(compiled, arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_compiler(monkeypatch, capsys):
    def version(name):
        raise compiled.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compiled.importlib.metadata, "version", version)
    assert command.main(compiled, []) == 2
    assert "[tpu]" in capsys.readouterr().err
