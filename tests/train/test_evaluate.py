"""Held-out figures of languages and corpora against sums made token by token, and on several devices."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jaxcoder_configs.smoke import smoke

from jaxcoder.config import Corpus, DataConfig, EvalConfig, MeshConfig, RunConfig
from jaxcoder.data.build import build_store
from jaxcoder.data.loader import make_batch
from jaxcoder.io.document import Document
from jaxcoder.io.document_files import write_documents
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.tokenizer.train import train_tokenizer
from jaxcoder.train.evaluate import HeldOut, position_ranges
from jaxcoder.train.inputs import open_streams
from jaxcoder.train.state import initial_state

LANGUAGES = ("python", "c", "", "java")


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("stores")
    text = open(dataclasses.__file__, encoding="utf-8").read()
    tokenizer = train_tokenizer([text], 512)
    for name, size in (("train", 300), ("other", 170)):
        documents = [Document.from_text(text[i * size : (i + 1) * size], lang=LANGUAGES[i % 4]) for i in range(60)]
        documents[7] = Document.from_text(text[:700], lang="java")
        write_documents(documents, root / f"{name}.parquet")
        build_store(root / f"{name}.parquet", tokenizer, root / name, seed=0)
    return str(root / "train"), str(root / "other")


def config(data: DataConfig, **changes) -> RunConfig:
    run = dataclasses.replace(smoke(), data=data, eval=EvalConfig(num_windows=7))
    return dataclasses.replace(run, compute=dataclasses.replace(run.compute, dtype="float32"), **changes)


def evaluate(run: RunConfig, shape: tuple[int, int, int], monkeypatch) -> dict[str, float]:
    mesh_config = MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])
    everything = jax.devices()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: everything[: math.prod(shape)])
        mesh = make_mesh(mesh_config)
    _, streams, _ = open_streams(run)
    with jax.set_mesh(mesh):
        return HeldOut(run, streams, mesh)(jax.jit(lambda: initial_state(run))().model)


STRETCHES = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]


def one_by_one(run: RunConfig) -> dict[str, list[float]]:
    """[nats, tokens, bytes] of everything and of each language, corpus and stretch of positions, target by target."""
    _, streams, _ = open_streams(run)
    model, sums = initial_state(run).model, {}
    for name, stream in streams:
        (store,) = stream.stores
        documents = store.documents.to_pylist()
        for sample in range(min(run.eval.num_windows, stream.windows_per_epoch)):
            window = stream.sample(sample)[None]
            batch = make_batch(window, end_id=stream.end_id, pad_id=stream.pad_id, document_mask=False)
            losses = np.asarray(model.token_losses(jax.tree.map(np.asarray, batch)))[0]
            start = stream.locate(sample).start + 1
            for place, loss in enumerate(losses, start):
                first, last = next(s for s in STRETCHES if s[0] <= place - start <= s[1])
                document = [d for d in documents if d["start"] <= place][-1]
                token = int(store.read(place, place + 1)[0])
                of_language = f"eval/lang/{document['lang'] or 'unknown'}"
                for key in ("eval", of_language, f"eval/corpus/{name}", f"eval/position/{first}-{last}"):
                    of = sums.setdefault(key, [0.0, 0, 0])
                    of[0], of[1], of[2] = of[0] + float(loss), of[1] + 1, of[2] + int(store.token_bytes[token])
    return sums


def test_languages_and_corpora(stores, monkeypatch):
    first, second = (Corpus(store=store, eval_store=store) for store in stores)
    data = DataConfig(corpora=(first, dataclasses.replace(second, name="second")))
    run = config(data, microbatch_size=4)
    found, expected = evaluate(run, (1, 1, 1), monkeypatch), one_by_one(run)
    assert {name.rsplit("/", 1)[0] for name in found} == set(expected)
    assert {"eval/lang/java", "eval/lang/unknown", "eval/corpus/train", "eval/corpus/second"} <= set(expected)
    for key, (nats, tokens, size) in expected.items():
        assert found[f"{key}/tokens"] == tokens
        assert found[f"{key}/loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert found[f"{key}/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_meshes_agree(stores, monkeypatch):
    run = config(DataConfig(store=stores[0], eval_store=stores[1]))
    one, many = (evaluate(run, shape, monkeypatch) for shape in ((1, 1, 1), (2, 2, 2)))
    assert one.keys() == many.keys() and not any(name.startswith("eval/corpus") for name in one)
    for name in one:
        assert many[name] == pytest.approx(one[name], rel=1e-5)


def test_stretches_of_positions_cover_a_window_once():
    for length in (1, 2, 63, 64, 100, 1024, 8192):
        stretches = position_ranges(length)
        assert [first for first, _ in stretches] == [0, *(last + 1 for _, last in stretches[:-1])]
        assert stretches[-1][1] == length - 1 and len(stretches) <= 9
    assert position_ranges(8192)[:3] == [(0, 31), (32, 63), (64, 127)]
