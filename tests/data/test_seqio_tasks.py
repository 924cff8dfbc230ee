"""Our tokenizer and corpora in the real seqio, and its Mixtures as token stores. Without the extra most of it skips."""

import importlib.util
import pickle
import random
import socket
import sys

import numpy as np
import pytest
from hostile import hostile_documents, hostile_text

from jaxcoder.config.schema import Corpus, DataConfig, Stage
from jaxcoder.data import seqio_import
from jaxcoder.data.build import build_store
from jaxcoder.data.seqio_import import documents_of, import_seqio
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import ConfigError, DataError, MissingExtraError
from jaxcoder.io.document_files import write_documents

HAS_SEQIO = importlib.util.find_spec("seqio") is not None
if HAS_SEQIO:
    import seqio
    import tensorflow as tf

    from jaxcoder.data.seqio_tasks import CodeVocabulary, add_mixture, add_task


def needs_seqio(test):
    reason = "needs the extra `seqio` (seqio and TensorFlow), in an environment of its own: see .ci/run"
    return pytest.mark.seqio(pytest.mark.skipif(not HAS_SEQIO, reason=reason)(test))


@pytest.fixture(autouse=True)
def registries():
    yield
    if HAS_SEQIO:
        seqio.TaskRegistry.reset()
        seqio.MixtureRegistry.reset()


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network is out of bounds")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def texts_of(rng, count):
    return [hostile_text(rng).encode() for _ in range(count)]


def text_task(name, examples, *, vocabulary=None, preprocessors=None, features=("inputs", "targets")):
    """A Task of `examples`: dicts of bytes. Without a vocabulary its features are text."""
    feature = (
        seqio.Feature(seqio.PassThroughVocabulary(0), dtype=tf.string, rank=0, add_eos=False)
        if vocabulary is None
        else seqio.Feature(vocabulary)
    )
    columns = {key: [example[key] for example in examples] for key in examples[0]}
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(columns),
            splits=["train"],
            num_input_examples={"train": len(examples)},
        ),
        preprocessors=preprocessors or [],
        output_features=dict.fromkeys(features, feature),
    )


def documents_in(store):
    """The stored documents' ids without their end tokens, sorted."""
    ids = store.read(0, store.num_tokens)
    return sorted(ids[a : b - 1].tolist() for a, b in zip(store.document_offsets, store.document_offsets[1:]))


# Without seqio --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(HAS_SEQIO, reason="seqio is installed")
def test_a_missing_extra_is_a_sentence(tokenizer, tmp_path):
    from jaxcoder.data import seqio_tasks

    for use in (
        lambda: seqio_tasks.CodeVocabulary(tokenizer),
        lambda: seqio_tasks.add_task("task", tmp_path, tokenizer=tokenizer),
        lambda: seqio_tasks.add_mixture("mixture", DataConfig(), seq_len=8),
        lambda: seqio_tasks.Examples("mixture"),
        lambda: import_seqio("mixture", tmp_path / "store"),
    ):
        with pytest.raises(MissingExtraError, match=r"needs the extra `seqio`: run `pip install -e .*\[seqio\]"):
            use()


def test_an_example_becomes_documents(tokenizer):
    from jaxcoder.data.seqio_tasks import Example

    end, pad = tokenizer.eos_id, tokenizer.fim.pad
    letters = tokenizer.encode("d") + tokenizer.encode("e")

    def ids(*values, separator=""):
        values = [value if isinstance(value, bytes) else np.array(value, np.int32) for value in values]
        documents = documents_of(Example(tuple(values), "task", {"path": "a.py"}), tokenizer, separator, 7)
        assert all((d.repo_name, d.path) == ("task", "a.py") for d in documents)
        return [tokenizer.encode_document(document) for document in documents]

    assert ids(b"de", b"f") == [tokenizer.encode("def")]
    assert ids(b"de", b"f", separator="\n") == [tokenizer.encode("de\nf")]
    assert ids(letters) == [letters]
    assert ids([*letters, end], [pad, *letters, end]) == [[*letters, pad, *letters]]
    assert ids([end, *letters, end, end, *letters, pad, end]) == [letters, [*letters, pad]]
    assert ids(letters, b"x", separator=" ") == [letters + tokenizer.encode(" x")]
    assert ids(b"", []) == ids(b"", b"", separator="\n") == ids([end]) == []
    assert ids(b"\xff") == [tokenizer.encode("\ufffd")]


# The vocabulary -------------------------------------------------------------------------------------------------------


@needs_seqio
def test_vocabulary_has_the_ids_of_the_tokenizer(tokenizer):
    vocabulary = CodeVocabulary(tokenizer)
    rng = random.Random(3)
    texts = [hostile_text(rng) for _ in range(300)] + ["", "<|endoftext|><fim_prefix>", "a\0\0"]
    tensor = tf.stack([tf.constant(text) for text in texts])  # one by one: numpy's strings lose zero bytes at their end
    graph = list(tf.data.Dataset.from_tensor_slices(tensor).map(vocabulary.encode_tf).as_numpy_iterator())
    ragged = vocabulary.encode_tf(tensor).to_list()
    for text, in_graph, row in zip(texts, graph, ragged, strict=True):
        ids = tokenizer.encode(text)
        assert list(vocabulary.encode(text)) == in_graph.tolist() == row == ids
        assert vocabulary.decode(ids) == text
        assert vocabulary.decode_tf(tf.constant(ids, tf.int32)).numpy().decode() == text, repr(text)
    assert vocabulary.vocab_size == tokenizer.vocab_size
    assert (vocabulary.eos_id, vocabulary.bos_id, vocabulary.unk_id) == (tokenizer.eos_id, None, None)
    assert vocabulary.pad_id == 0


@needs_seqio
def test_vocabulary_decodes_up_to_the_end(tokenizer):
    vocabulary = CodeVocabulary(tokenizer)
    middle = tokenizer.special_id("<fim_middle>")
    row = [*tokenizer.encode("ab"), middle, tokenizer.eos_id, *tokenizer.encode("c")]
    assert vocabulary.decode(row) == vocabulary.decode(tf.constant(row)) == "ab<fim_middle>"
    batch = tf.constant([row, [tokenizer.eos_id] * len(row)])
    assert vocabulary.decode_tf(batch).numpy().tolist() == [b"ab<fim_middle>", b""]
    incomplete = tokenizer.encode("\u0378")[:1]  # spelled in two bytes
    assert vocabulary.decode(incomplete) == "\ufffd"
    assert vocabulary.decode_tf(tf.constant(incomplete)).numpy() == tokenizer.decode_bytes(incomplete)
    with pytest.raises(DataError, match="not in the vocabulary"):
        vocabulary.decode([tokenizer.vocab_size])
    assert vocabulary == CodeVocabulary(tokenizer) == pickle.loads(pickle.dumps(vocabulary))
    assert vocabulary != seqio.ByteVocabulary() and str(tokenizer.vocab_size) in str(vocabulary)


@needs_seqio
def test_vocabulary_in_a_task_and_a_feature_converter(tokenizer):
    """The usual preprocessors; and what becomes of pads: 0 fills, and has no weight in the loss."""
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    task = text_task("t", [{"targets": b"ab cd"}, {"targets": b"x"}], vocabulary=CodeVocabulary(tokenizer),
                     preprocessors=steps, features=["targets"])  # fmt: skip
    rows = [row["targets"].tolist() for row in task.get_dataset(shuffle=False).as_numpy_iterator()]
    assert rows == [tokenizer.encode(text) + [tokenizer.eos_id] for text in ("ab cd", "x")]
    converted = seqio.LMFeatureConverter(pack=False)(task.get_dataset(shuffle=False), {"targets": 12})
    for row, ids in zip(converted.as_numpy_iterator(), rows, strict=True):
        assert row["decoder_target_tokens"].tolist() == ids + [0] * (12 - len(ids))
        assert row["decoder_loss_weights"].sum() == sum(id_ != 0 for id_ in ids)


# Our corpora ----------------------------------------------------------------------------------------------------------


@needs_seqio
def test_a_store_is_a_task_of_documents(store, tokenizer):
    task = add_task("corpus", store.path)
    expected = store.read(0, store.num_tokens)
    rows = list(task.get_dataset(shuffle=False).as_numpy_iterator())
    assert np.array_equal(np.concatenate([row["targets"] for row in rows]), expected)
    assert [row["path"].decode() for row in rows] == store.documents["path"].to_pylist()
    assert task.num_input_examples("train") == store.num_documents
    shuffled = [row["targets"].tolist() for row in task.get_dataset(shuffle=True, seed=1).as_numpy_iterator()]
    assert shuffled != [row["targets"].tolist() for row in rows]
    assert sorted(shuffled) == sorted(row["targets"].tolist() for row in rows)
    again = [row["targets"].tolist() for row in task.get_dataset(shuffle=True, seed=1).as_numpy_iterator()]
    assert shuffled == again


@needs_seqio
def test_a_store_is_a_task_of_windows_and_shards(store):
    task = add_task("windows", {"train": store.path, "validation": store.path}, seq_len=64)
    rows = [row["targets"] for row in task.get_dataset(shuffle=False).as_numpy_iterator()]
    assert np.array_equal(np.concatenate(rows), store.read(0, store.num_tokens // 64 * 64))
    shards = [
        task.get_dataset(shuffle=True, seed=5, split="validation", shard_info=seqio.ShardInfo(i, 3)) for i in range(3)
    ]
    assert sorted(row["targets"].tolist() for shard in shards for row in shard.as_numpy_iterator()) == sorted(
        row.tolist() for row in rows
    )


@needs_seqio
def test_documents_are_a_task(tokenizer, tmp_path):
    documents = hostile_documents(90)
    for i in range(3):
        write_documents(documents[i * 30 : i * 30 + 30], tmp_path / f"{i}.parquet")
    task = add_task("documents", tmp_path, tokenizer=tokenizer)
    expected = [tokenizer.encode_document(document) + [tokenizer.eos_id] for document in documents]
    assert [row["targets"].tolist() for row in task.get_dataset(shuffle=False).as_numpy_iterator()] == expected
    shard = task.get_dataset(shuffle=False, shard_info=seqio.ShardInfo(1, 3)).as_numpy_iterator()
    assert [row["targets"].tolist() for row in shard] == expected[30:60]
    with pytest.raises(DataError, match="give the tokenizer"):
        add_task("none", tmp_path)
    with pytest.raises(DataError, match="build the stores first"):
        add_task("none", tmp_path, tokenizer=tokenizer, seq_len=8)
    with pytest.raises(ConfigError, match="choose another"):
        add_task("documents", tmp_path, tokenizer=tokenizer)


@needs_seqio
def test_a_mixture_has_the_weights_of_the_configuration(store, tokenizer, tmp_path):
    write_documents(hostile_documents(300, seed=9), tmp_path / "d.parquet")
    other = build_store(tmp_path / "d.parquet", tokenizer, tmp_path / "other", seed=1)
    corpora = (Corpus(store=store.path, weight=0.75), Corpus(store=str(other.path), weight=0.25))
    staged = DataConfig(corpora=corpora, stages=(Stage(from_sample=0, weights=(1, 3)),))
    mixture = add_mixture("mix", staged, seq_len=32)
    assert [mixture.get_rate(task) for task in mixture.tasks] == [1, 3]
    mixture = add_mixture("own", DataConfig(corpora=corpora), seq_len=32)
    assert [mixture.get_rate(task) for task in mixture.tasks] == [0.75, 0.25]
    first = {row["targets"].tobytes() for row in mixture.tasks[0].get_dataset(shuffle=False).as_numpy_iterator()}
    drawn = mixture.get_dataset(shuffle=True, seed=3).take(1000).as_numpy_iterator()
    count = sum(row["targets"].tobytes() in first for row in drawn)
    assert abs(count - 750) < 5 * (1000 * 0.75 * 0.25) ** 0.5
    by_tokens = add_mixture(
        "tokens", DataConfig(corpora=tuple(Corpus(store=corpus.store) for corpus in corpora)), seq_len=32
    )
    assert [by_tokens.get_rate(task) for task in by_tokens.tasks] == [store.num_tokens, other.num_tokens]
    assert len(add_mixture("single", DataConfig(store=store.path), seq_len=32).tasks) == 1
    for data, name, match in (
        (DataConfig(corpora=(Corpus(store=store.path, max_epochs=2),)), "capped", "max_epochs"),
        (DataConfig(corpora=(Corpus(store=store.path, weight=-1),)), "negative", "0 or larger"),
        (DataConfig(store=store.path), "single", "already"),
    ):
        with pytest.raises(ConfigError, match=match):
            add_mixture(name, data, seq_len=32)


# Anyone's mixtures ----------------------------------------------------------------------------------------------------


@needs_seqio
def test_text_is_joined_and_encoded(tokenizer, tmp_path, offline):
    rng = random.Random(1)
    pairs = [dict(zip(("inputs", "targets"), texts_of(rng, 2), strict=True)) for _ in range(200)]
    text_task("a", pairs[:150])
    text_task("b", pairs[150:])
    seqio.MixtureRegistry.add("mixture", [("a", 1.0), ("b", 1.0)])
    joined = [pair["inputs"].decode() + "\n" + pair["targets"].decode() for pair in pairs]
    store = import_seqio("mixture", tmp_path / "store", tokenizer=tokenizer, separator="\n", part_characters=500)
    expected = sorted(tokenizer.encode(text) for text in joined if text != "\n")
    assert documents_in(store) == expected
    assert set(store.documents["repo_name"].to_pylist()) == {"a", "b"}
    assert not (tmp_path / "store.import").exists()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*")}
    import_seqio("mixture", tmp_path / "store", tokenizer=tokenizer, separator="\n", part_characters=500)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "store").rglob("*")}
    with pytest.raises(DataError, match="another import"):
        import_seqio("mixture", tmp_path / "store", tokenizer=tokenizer, part_characters=500)
    TokenStore.open(tmp_path / "store").verify()


@needs_seqio
def test_ids_pass_through_if_the_vocabulary_is_identical(tokenizer, tmp_path, offline):
    rng = random.Random(2)
    pairs = [dict(zip(("inputs", "targets"), texts_of(rng, 2), strict=True)) for _ in range(100)]
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    text_task("ours", pairs, vocabulary=CodeVocabulary(tokenizer), preprocessors=steps)
    text_task("bytes", pairs, vocabulary=seqio.ByteVocabulary(), preprocessors=steps)
    store = import_seqio("ours", tmp_path / "store", seed=4)  # the tokenizer comes with the ids
    ids = [tokenizer.encode(pair["inputs"].decode()) + tokenizer.encode(pair["targets"].decode()) for pair in pairs]
    assert documents_in(store) == sorted(row for row in ids if row)
    assert store.tokenizer_fingerprint == tokenizer.fingerprint
    text_bytes = sum(len(tokenizer.decode_bytes(row)) for row in ids)
    assert store.text_bytes == text_bytes
    with pytest.raises(DataError, match="'inputs' of the seqio Task bytes holds ids of another .*_pretokenized"):
        import_seqio("bytes", tmp_path / "other", tokenizer=tokenizer)
    assert not (tmp_path / "other").exists()
    store = import_seqio(
        "bytes", tmp_path / "other", tokenizer=tokenizer, features=["targets_pretokenized", "inputs_pretokenized"]
    )
    swapped = [tokenizer.encode((pair["targets"] + pair["inputs"]).decode()) for pair in pairs]
    assert documents_in(store) == sorted(row for row in swapped if row)


@needs_seqio
def test_a_store_survives_the_way_through_seqio(store, tmp_path):
    """Documents and windows of one of our stores, special tokens and cut characters included."""
    add_task("documents", store.path)
    copy = import_seqio("documents", tmp_path / "documents")
    assert documents_in(copy) == [row for row in documents_in(store) if row]
    fields = ("repo_name", "path", "lang")
    origins = [
        set(zip(*(each.documents[field].to_pylist() for field in fields), strict=True)) for each in (copy, store)
    ]
    assert len(origins[0]) > 100 and origins[0] <= origins[1]
    add_task("windows", store.path, seq_len=50)
    windows = import_seqio("windows", tmp_path / "windows")
    ids = store.read(0, store.num_tokens // 50 * 50)
    count = np.bincount(ids, minlength=store.vocab_size)
    again = np.bincount(windows.read(0, windows.num_tokens), minlength=store.vocab_size)
    count[store.tokenizer().eos_id] = again[store.tokenizer().eos_id] = 0
    assert np.array_equal(count, again)


@needs_seqio
def test_examples_at_the_rates_of_the_mixture(tokenizer, tmp_path):
    text_task("a", [{"targets": b"x"}] * 10, features=["targets"])
    text_task("b", [{"targets": b"def"}] * 1000, features=["targets"])
    seqio.MixtureRegistry.add("mixture", [("a", 3.0), ("b", 1.0)])
    store = import_seqio("mixture", tmp_path / "store", tokenizer=tokenizer, num_examples=400)
    names = store.documents["repo_name"].to_pylist()
    assert (names.count("a"), names.count("b")) == (300, 100)


@needs_seqio
@pytest.mark.parametrize("killed_after", [0, 1, 3, "reading", "building", "the end"])
def test_an_interrupted_import_goes_on_to_the_same_bytes(tokenizer, tmp_path, monkeypatch, killed_after):
    rng = random.Random(6)
    text_task("t", [{"targets": text} for text in texts_of(rng, 120)], features=["targets"])

    def run(name):
        return import_seqio("t", tmp_path / name, tokenizer=tokenizer, part_characters=400)

    class Killed(Exception):
        pass

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if killed_after == "reading":
            patch.setattr(seqio_import, "build_store", killed)
        elif killed_after == "building":
            patch.setattr(seqio_import.Directory, "write", killed)
        elif killed_after == "the end":
            patch.setattr(seqio_import._Parts, "remove", killed)
        else:
            write = seqio_import._Parts.write

            def some(self, number, *rest):
                return killed() if number == killed_after else write(self, number, *rest)

            patch.setattr(seqio_import._Parts, "write", some)
        with pytest.raises(Killed):
            run("killed")
    assert run("killed").manifest["files"] == run("whole").manifest["files"]
    assert not (tmp_path / "killed.import").exists()


@needs_seqio
def test_refusals(tokenizer, tmp_path, monkeypatch):
    text_task("t", [{"targets": b"x", "number": 1}], features=["targets"])
    text_task("empty", [{"targets": b""}], features=["targets"])

    def refused(match, name="t", output="store", error=DataError, **options):
        with pytest.raises(error, match=match):
            import_seqio(name, tmp_path / output, **({"tokenizer": tokenizer} | options))

    refused("no Mixture or Task 'u' .it has empty, t.", name="u")
    refused("no split 'test' .it has train.", split="test", output="a")
    refused("no feature 'inputs'", features=["inputs"], output="b")
    refused("'number' .* neither text nor", features=["number"], output="c")
    refused("give --tokenizer", tokenizer=None, output="d")
    refused("holds no text", name="empty", output="e")
    refused("module no_such_module", modules=["no_such_module"], output="f")
    refused("0 examples", num_examples=0, error=ConfigError)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    refused("is not empty", output="full")
    (tmp_path / "my_tasks.py").write_text("raise ModuleNotFoundError('no module named elsewhere')")
    monkeypatch.chdir(tmp_path)
    refused("elsewhere", modules=["my_tasks"], output="g")


@needs_seqio
def test_a_task_that_changes_is_found_out(tokenizer, tmp_path, monkeypatch):
    rng = random.Random(8)
    text_task("t", [{"targets": text} for text in texts_of(rng, 60)], features=["targets"])
    with monkeypatch.context() as patch:
        patch.setattr(seqio_import, "_COMPLETE", "missing/complete.json")
        patch.setattr(seqio_import._Parts, "complete", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            import_seqio("t", tmp_path / "store", tokenizer=tokenizer, part_characters=300)
    seqio.TaskRegistry.reset()
    text_task("t", [{"targets": text} for text in texts_of(rng, 60)], features=["targets"])
    with pytest.raises(DataError, match="gives other examples than before"):
        import_seqio("t", tmp_path / "store", tokenizer=tokenizer, part_characters=300)


@needs_seqio
def test_the_command_finds_a_module_beside_it(tokenizer, tmp_path, monkeypatch, capsys):
    import argparse

    from jaxcoder.cli import data

    (tmp_path / "my_seqio_tasks.py").write_text(
        "import seqio, tensorflow as tf\n"
        "text = seqio.Feature(seqio.PassThroughVocabulary(0), dtype=tf.string, rank=0, add_eos=False)\n"
        "def rows(split, shuffle_files, seed=None):\n"
        "    return tf.data.Dataset.from_tensor_slices({'targets': ['x = 1', 'y']})\n"
        "source = seqio.FunctionDataSource(rows, splits=['test'])\n"
        "seqio.TaskRegistry.add('mine', source, output_features={'targets': text})\n"
    )
    tokenizer.save(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    words = "import-seqio mine --module-import my_seqio_tasks --split test --tokenizer tokenizer --output-dir store"
    assert not data.run(parser.parse_args(words.split()))
    assert documents_in(TokenStore.open(tmp_path / "store")) == sorted(map(tokenizer.encode, ("x = 1", "y")))
    assert "2 documents" in capsys.readouterr().out
    sys.modules.pop("my_seqio_tasks")
