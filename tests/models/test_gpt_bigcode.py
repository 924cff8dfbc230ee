"""The decoder: initialisation, masks, cache, dropout, remat, and the same numbers on every mesh."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxcoder.config import ComputeConfig, MeshConfig, ModelConfig
from jaxcoder.kernels.dropout.api import make_key
from jaxcoder.models.gpt_bigcode import Dropout, GPTBigCode
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.sharding.ops import embedding_lookup, shard_map, specs_of
from jaxcoder.sharding.rules import ShardingRules

CONFIG = ModelConfig(
    num_layers=2, embed_dim=32, num_heads=4, head_dim=8, mlp_dim=128, vocab_size=96, max_seq_len=40, init_std=0.2
)
FP32 = ComputeConfig(dtype="float32", remat="none")
TOKENS = np.random.default_rng(0).integers(0, 96, (8, 40)).astype(np.int32)


def make(config=CONFIG, compute=FP32):
    return GPTBigCode(config, compute, rngs=nnx.Rngs(0))


def scores(model, tokens, **options):
    return np.asarray(jax.jit(lambda model: model.logits(model(tokens, **options)))(model))


def test_initialisation_is_as_trained():
    config = replace(CONFIG, num_layers=8, embed_dim=128, num_heads=16, mlp_dim=512, vocab_size=512)
    model = make(config)
    std = {path: float(jnp.std(leaf)) for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    std = {jax.tree_util.keystr(path).removesuffix(".value"): value for path, value in std.items()}
    residual = config.init_std / np.sqrt(2 * config.num_layers)
    for name, value in std.items():
        if name.endswith((".bias", ".scale")):
            assert value == 0.0, name
        else:
            expected = residual if name in (".h.attn.out.kernel", ".h.mlp.down.kernel") else config.init_std
            assert value == pytest.approx(expected, rel=0.03), name
    assert jnp.all(model.h.ln_1.scale[...] == 1.0) and jnp.all(model.ln_f.scale[...] == 1.0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_and_cached_decoding_agrees(kv_heads):
    config = replace(CONFIG, num_kv_heads=kv_heads)
    model = make(config)
    expected = scores(model, TOKENS)
    lengths = np.array([20, 13, 1, 5, 6, 7, 8, 20])
    prompts = np.where(np.arange(20) < lengths[:, None], TOKENS[:, :20], 0)
    cache = model.empty_cache(8, 40)
    hidden, cache = jax.jit(GPTBigCode.prefill)(model, prompts, jnp.asarray(lengths), cache)
    rows = np.arange(8)
    np.testing.assert_allclose(model.logits(hidden)[rows, lengths - 1], expected[rows, lengths - 1], atol=1e-5)
    decode = jax.jit(GPTBigCode.decode)
    for step in range(20):
        hidden, cache = decode(model, TOKENS[rows, lengths + step][:, None], cache)
        np.testing.assert_allclose(model.logits(hidden)[:, 0], expected[rows, lengths + step], atol=1e-5)


def test_documents_are_kept_apart():
    """Packed with segment ids and restarted positions, two documents score as each alone."""
    model = make()
    packed = jnp.asarray(TOKENS[:1])
    segments = jnp.asarray([[1] * 15 + [2] * 20 + [0] * 5])
    positions = jnp.asarray([[*range(15), *range(20), *range(5)]])
    got = scores(model, packed, segment_ids=segments, positions=positions)
    np.testing.assert_allclose(got[:, :15], scores(model, packed[:, :15]), atol=1e-5)
    np.testing.assert_allclose(got[:, 15:35], scores(model, packed[:, 15:35]), atol=1e-5)


def test_remat_and_attention_backends_change_nothing_but_rounding():
    def loss(model):
        return jnp.square(model.logits(model(TOKENS))).mean()

    expected = jax.jit(jax.grad(loss))(make())
    for options in ({"remat": "minimal"}, {"remat": "offload"}, {"remat": "block"}, {"attention": "blockwise"}):
        got = jax.jit(jax.grad(loss))(make(compute=replace(FP32, **options)))
        for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(got)):
            np.testing.assert_allclose(have, want, atol=1e-5)


def test_bfloat16_stays_near_float32():
    difference = scores(make(compute=replace(FP32, dtype="bfloat16")), TOKENS) - scores(make(), TOKENS)
    assert 0 < np.abs(difference).max() < 0.2 * scores(make(), TOKENS).std()


def test_activations_differ():
    exact = scores(make(replace(CONFIG, activation="gelu")), TOKENS)
    assert 1e-5 < np.abs(exact - scores(make(), TOKENS)).max() < 1e-1


def on_mesh(shape, config, dropout: bool):
    """Loss, gradients and parameter specs of one forward and backward pass on a mesh."""
    mesh = make_mesh(MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))

    def loss(model, tokens, dropout):
        logits = model.logits(model(tokens, dropout=dropout))
        picked = jnp.where(jnp.arange(config.vocab_size) == jnp.roll(tokens, -1, 1)[..., None], logits, 0).sum(-1)
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    with jax.set_mesh(mesh):
        model = jax.jit(lambda: GPTBigCode(config, FP32, rngs=nnx.Rngs(0)))()
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        batch = jax.device_put(TOKENS, rows)
        drawn = (
            Dropout(key=make_key(1, 2), rows=jax.device_put(np.arange(8, dtype=np.int32), rows)) if dropout else None
        )
        value, gradients = jax.jit(jax.value_and_grad(loss))(model, batch, drawn)
        specs = [[leaf.sharding.spec for leaf in jax.tree.leaves(tree)] for tree in (model, gradients)]
        return float(value), jax.tree.map(np.asarray, gradients), specs


# tests/train/test_step_meshes.py has more meshes, and multi-query attention
@pytest.mark.parametrize("shape, kv_heads", [((2, 2, 2), 2), ((1, 2, 4), 4)])
def test_every_mesh_gives_the_same_loss_and_gradients(shape, kv_heads):
    config = replace(CONFIG, num_kv_heads=kv_heads)
    expected, expected_gradients, _ = on_mesh((1, 1, 1), config, dropout=True)
    value, gradients, (weight_specs, gradient_specs) = on_mesh(shape, config, dropout=True)
    assert value == pytest.approx(expected, rel=1e-6)
    assert weight_specs == gradient_specs
    for want, have in zip(jax.tree.leaves(expected_gradients), jax.tree.leaves(gradients)):
        np.testing.assert_allclose(have, want, atol=1e-6)


def test_dropout_changes_with_the_step_and_drops_at_its_rate():
    model = make(replace(CONFIG, embed_dropout=0.0, residual_dropout=0.0, attention_dropout=0.9))
    rows = jnp.arange(8)
    drawn = [scores(model, TOKENS, dropout=Dropout(key=make_key(1, step), rows=rows)) for step in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-2
    assert np.abs(drawn[0] - scores(model, TOKENS)).max() > 1e-2


def test_rules_refuse_one_axis_twice():
    from jaxcoder.errors import ConfigError

    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1, tensor=2))):
        with pytest.raises(ConfigError, match="`heads` and `mlp`.*axis `tensor`"):
            ShardingRules().spec("heads", "mlp")


def collectives_of_the_embedding(length, config):
    """(op, elements of its result) of every collective in the embedding's forward and backward pass, on (1, 4, 2)."""
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))):
        model = jax.eval_shape(lambda: GPTBigCode(config, FP32, rngs=nnx.Rngs(0)))
        rules = model.rules.for_length(length)

        def gradients(model, tokens):
            embed = shard_map(
                lambda model, tokens: model._embed(tokens, None, None, rules),
                in_specs=(specs_of(model), rules.spec("batch", None)),
                out_specs=rules.spec("batch", "seq", None),
            )
            return jax.grad(lambda model: jnp.square(embed(model, tokens)).sum())(model).wte[...]

        tokens = jax.ShapeDtypeStruct(
            (256, length), jnp.int32, sharding=NamedSharding(jax.sharding.get_mesh(), rules.spec("batch", None))
        )
        text = jax.jit(gradients).lower(model, tokens).compile().as_text()
    ops = re.findall(r"= \w+\[([\d,]+)\]\S* (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", text)
    return sorted((op, int(np.prod([int(n) for n in shape.split(",")]))) for shape, op in ops)


def test_no_activation_is_gathered_for_the_embedding_gradient():
    """XLA's own partitioning of a gather replicates activations in the backward pass; ours gathers the table, and
    activations once over `tensor`: a device has 64 rows of 512 tokens, and in the stream half of each."""
    config = replace(CONFIG, max_seq_len=512, vocab_size=1024)
    D = config.embed_dim
    tokens, positions, activations = 512 * D, 256 * D, 64 * 512 * D  # the two tables, and the activations
    assert [found for found in collectives_of_the_embedding(512, config) if found[0] != "all-reduce"] == [
        ("all-gather", positions), ("all-gather", tokens), ("all-gather", activations),
        ("reduce-scatter", tokens // 4), ("reduce-scatter", activations // 2),
    ]  # fmt: skip


def test_frequent_tokens_lose_nothing_of_their_gradient():
    """In bfloat16 one by one, a sum of ones would end at 256."""
    ids = jnp.asarray([0] * 5000 + [1])
    table = jnp.zeros((2, 4), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda table: embedding_lookup(table, ids, None).astype(jnp.float32).sum()))(table)
    assert float(gradient[0, 0]) == pytest.approx(5000, rel=0.005) and gradient[1, 0] == 1


@pytest.mark.parametrize("length", [40, 39], ids=["split", "whole"])
def test_sequences_of_any_length_score_the_same_on_a_mesh(length):
    """40 tokens are split over the four devices of `tensor`, 39 stay whole."""
    tokens = TOKENS[:, :length]
    expected = scores(make(), tokens)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))) as _:
        model = jax.jit(make)()
        rows = jax.device_put(tokens, NamedSharding(jax.sharding.get_mesh(), PartitionSpec(("data", "fsdp"))))
        hidden = jax.jit(lambda model, rows: model(rows))(model, rows)
        assert hidden.sharding.spec[1] == ("tensor" if length == 40 else None)
        np.testing.assert_allclose(scores(model, rows), expected, atol=1e-5)
