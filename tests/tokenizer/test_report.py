"""The tokenizer report: its numbers against counts made by hand, any kind of tokenizer, the same bytes every time."""

import argparse
import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxcoder.cli import tokenizer as command
from jaxcoder.errors import ConfigError, DataError
from jaxcoder.io.document import Document, Part
from jaxcoder.io.document_files import write_documents
from jaxcoder.tokenizer.report import kind_of, load_any, measure, short_names, take_sample, tokenizer_report

TEXTS = {
    "python": ["x = 12  \n\n", "é" * 30, "def f(a1):\n    return a1 + 42\n"],
    "c": ["int main() { return 0; }\n"],
    "": ["?"],
}


@pytest.fixture
def corpus(tmp_path):
    documents = [Document.from_text(text, lang=lang) for lang, texts in TEXTS.items() for text in texts]
    structured = Document((Part("a"), Part("b"), Part(special="<filename>"), Part("\ud83d\ude00 1")), lang="c")
    write_documents([*documents, structured, Document(())], tmp_path / "corpus.parquet")
    return tmp_path / "corpus.parquet"


@pytest.fixture
def wordpiece(tmp_path):
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([text for texts in TEXTS.values() for text in texts], trainer)
    (tmp_path / "wordpiece").mkdir()
    backend.save(str(tmp_path / "wordpiece" / "tokenizer.json"))
    return tmp_path / "wordpiece"


@pytest.fixture
def bpe(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "bpe")
    return tmp_path / "bpe"


def test_counts(tokenizer, corpus, bpe):
    report = tokenizer_report(corpus, [bpe])
    (measured,) = report.measured
    texts = {"python": TEXTS["python"], "c": [*TEXTS["c"], "ab", "\U0001f600 1"], "(none)": ["?"]}
    for language, of_language in texts.items():
        tokens = sum(len(tokenizer.encode(text)) for text in of_language)
        num_bytes = sum(len(text.encode()) for text in of_language)
        assert measured.languages[language] == (tokens, num_bytes)
        assert report.bytes_per_token(measured, language) == num_bytes / tokens
    everything = [id_ for of_language in texts.values() for text in of_language for id_ in tokenizer.encode(text)]
    assert measured.num_tokens == len(everything) and measured.counts.tolist() == [
        everything.count(id_) for id_ in range(tokenizer.vocab_size)
    ]
    assert set(measured.unused) == {*range(tokenizer.vocab_size)} - {*everything} - tokenizer.special_ids
    pieces = [tokenizer.decode_bytes([id_]) for id_ in everything]
    for kind in ("digits", "whitespace"):
        chosen = [piece for piece in pieces if kind_of(piece) == kind]
        assert measured.share(kind) == (len(chosen) / len(pieces), len(b"".join(chosen)) / len(b"".join(pieces)))
    assert measured.share("digits")[0] > 0 < measured.share("whitespace")[0]
    assert measured.exact_bytes == measured.num_bytes == report.sample.num_bytes == report.sample.corpus_bytes
    lengths = [len(token) for _, token, _ in measured.longest()]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == max(map(len, measured.tokens.values()))


def test_kinds():
    assert [kind_of(token) for token in (b"1", b" 12", b"\t\n", b" ", b"1a", b"", "\u3000".encode(), b"\xe3\x80")] == [
        "digits", "digits", "whitespace", "whitespace", "other", "other", "whitespace", "other",
    ]  # fmt: skip


def test_other_kinds_of_tokenizers_side_by_side(corpus, bpe, wordpiece):
    report = tokenizer_report(corpus, [bpe, wordpiece])
    first, second = report.measured
    assert (first.name, second.name) == ("bpe", "wordpiece")
    backend = tokenizers.Tokenizer.from_file(str(wordpiece / "tokenizer.json"))
    texts = [text for texts in TEXTS.values() for text in texts] + ["ab", "\U0001f600 1"]
    assert second.num_tokens == sum(len(backend.encode(text, add_special_tokens=False).ids) for text in texts)
    assert second.exact_bytes < second.num_bytes == first.num_bytes
    assert report.bytes_per_token(second) > 0 and "WordPiece" in second.encoder
    assert all(b"##" not in token for token in second.tokens.values())


def test_the_sample_is_even_of_complete_documents_and_reproducible(tmp_path, tokenizer):
    documents = [Document.from_text(f"{i:04}" * (1 + i % 7), lang="a" if i % 2 else "b") for i in range(2000)]
    write_documents(documents, tmp_path / "d.jsonl")
    sample = take_sample(tmp_path / "d.jsonl", max_bytes=8000, seed=1)
    assert 7900 < sample.num_bytes <= 8000
    assert (sample.corpus_documents, sample.corpus_bytes) == (2000, sum(len(d.text) for d in documents))
    assert {text for _, text in sample.texts} <= {document.text for document in documents}
    numbers = [int(text[:4]) for _, text in sample.texts]
    assert numbers == sorted(numbers) and 800 < sum(numbers) / len(numbers) < 1200
    mean = sum(len(text) for _, text in sample.texts) / len(sample.texts)
    assert abs(mean - 16) < 1.5  # small documents are not favoured
    assert sample.texts == take_sample(tmp_path / "d.jsonl", max_bytes=8000, seed=1).texts
    assert sample.texts != take_sample(tmp_path / "d.jsonl", max_bytes=8000, seed=2).texts
    everything = take_sample(tmp_path / "d.jsonl")
    assert [text for _, text in everything.texts] == [document.text for document in documents]
    write_documents([Document.from_text("é" * 100)], tmp_path / "one.jsonl")
    assert take_sample(tmp_path / "one.jsonl", max_bytes=31).texts == [("(none)", "é" * 15)]
    assert measure(tokenizer, everything, name="t").num_bytes == everything.num_bytes


def test_names():
    assert short_names(["a/tok/tokenizer.json", "b/other.json"]) == ["tok", "other.json"]
    assert short_names(["a/tok", "b/tok/"]) == ["a/tok", "b/tok"]
    assert short_names(["tokenizer.json"]) == ["tokenizer.json"]
    assert short_names(["a", "a"]) == ["a", "a"]


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_prints_a_table_and_writes_files(corpus, bpe, wordpiece, tmp_path, capsys):
    def report(name):
        outputs = [word for suffix in ("png", "json") for word in ("--output", tmp_path / f"{name}.{suffix}")]
        assert not run("report", corpus, "--tokenizer", bpe, "--tokenizer", wordpiece, *outputs)
        return [(tmp_path / f"{name}.{suffix}").read_bytes() for suffix in ("png", "json")]

    first = report("first")
    printed = capsys.readouterr().out
    assert "(all of it)" in printed and "Longest tokens" in printed and "100.00%" in printed
    row = next(line for line in printed.splitlines() if line.startswith("python"))
    content = json.loads(first[1])
    by_json = [entry["languages"]["python"]["bytes_per_token"] for entry in content["tokenizers"]]
    assert [float(cell) for cell in row.split()[2:]] == pytest.approx(by_json, rel=1e-3)
    assert first[0].startswith(b"\x89PNG") and first == report("second")
    assert "texts" not in content["sample"]
    assert content["tokenizers"][0]["num_unused"] == len(content["tokenizers"][0]["unused_ids"])


def test_refusals(corpus, bpe, tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.json or \.png"):
        run("report", corpus, "--tokenizer", bpe, "--output", tmp_path / "report.txt")
    with pytest.raises(ConfigError, match="positive"):
        run("report", corpus, "--tokenizer", bpe, "--max-megabytes", 0)
    with pytest.raises(DataError, match="Cannot read the tokenizer"):
        load_any(tmp_path / "none")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer.json"):
        load_any(tmp_path / "bad.json")
    write_documents([Document(())], tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="no text"):
        run("report", tmp_path / "empty.jsonl", "--tokenizer", bpe)
