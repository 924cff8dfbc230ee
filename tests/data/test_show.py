"""Windows for people: nothing is lost, parts of FIM are told apart, nothing can command the terminal; and
inspection."""

import argparse
import io

import numpy as np
import pytest

from jaxcoder.cli import data as data_command
from jaxcoder.cli import data_look
from jaxcoder.config.schema import DataConfig
from jaxcoder.data.lengths import by_language, length_bins
from jaxcoder.data.show import MIDDLE, PREFIX, SPECIAL, SPM_MIDDLE, SUFFIX, TEXT, LabeledText, labeled_texts, printable
from jaxcoder.data.stream import SampleStream


def test_fim_parts_are_told_apart(tokenizer):
    fim, end = tokenizer.fim, tokenizer.eos_id
    a, b, c, d = (tokenizer.encode(text) for text in ("alpha", "beta", "gamma", "delta"))
    ids = [*d, end, fim.prefix, *a, fim.suffix, *c, fim.middle, *b, end]
    ids += [fim.prefix, fim.suffix, *c, fim.middle, *a, *b, end, *d, fim.pad, fim.pad]
    found = list(labeled_texts(np.array(ids, np.int32), tokenizer))
    assert [part for part in found if part.kind != SPECIAL] == [
        (TEXT, "delta"), (PREFIX, "alpha"), (SUFFIX, "gamma"), (MIDDLE, "beta"), (SUFFIX, "gamma"),
        (SPM_MIDDLE, "alphabeta"), (TEXT, "delta"),
    ]  # fmt: skip
    assert found[-1] == (SPECIAL, "<fim_pad> x 2")


def test_nothing_of_a_window_is_lost(store, tokenizer):
    stream = SampleStream(store, tokenizer, DataConfig(), seq_len=64, seed=1)
    for index in range(200):
        window, text = stream.sample(index), ""
        for kind, part in labeled_texts(window, tokenizer):
            name, _, times = part.partition(" x ") if kind == SPECIAL else (part, "", "")
            text += name * int(times or 1)
        assert text == tokenizer.decode(window.tolist()) or "\ufffd" in text  # a character of which FIM left a part


def test_text_cannot_command_the_terminal_or_pass_for_a_special_token():
    names = frozenset({"<fim_prefix>"})
    assert printable(LabeledText(TEXT, "a\x1b[31m\r\x00b\n\tc\u202e"), names) == "a\\x1b[31m\\r\\x00b\n\tc\\u202e"
    assert printable(LabeledText(TEXT, "x<fim_prefix>"), names) == "x\\<fim_prefix>"
    assert printable(LabeledText(SPECIAL, "<fim_prefix>"), names) == "<fim_prefix>"


def test_colours_on_a_terminal(tokenizer, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    fim = tokenizer.fim
    ids = np.array([fim.prefix, *tokenizer.encode("[red]a"), fim.suffix, fim.middle], np.int32)
    data_look.print_window(ids, tokenizer, frozenset())
    assert "\x1b[36m[red]a" in terminal.getvalue() and "\x1b[7m<fim_prefix>" in terminal.getvalue()


# --- inspect ---------------------------------------------------------------------------------------------------------


def run(*words):
    parser = argparse.ArgumentParser()
    data_command.add_arguments(parser)
    return data_command.run(parser.parse_args([str(word) for word in words]))


def test_numbers_of_a_store(store):
    (row,) = by_language(store)
    assert row == ("python", store.num_documents, store.num_tokens, store.text_bytes)
    documents, tokens = length_bins(store)
    lengths = np.diff(store.document_offsets)
    assert documents.sum() == store.num_documents and tokens.sum() == store.num_tokens
    for k in range(len(documents)):
        inside = (lengths >= 2**k) & (lengths < 2 ** (k + 1))
        assert (documents[k], tokens[k]) == (inside.sum(), lengths[inside].sum())


def test_inspect_draws_and_adds_up(store, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run("inspect", store.path, store.path, "--picture", tmp_path / "lengths.png")
    printed = capsys.readouterr().out
    assert f"total {2 * store.num_tokens:,} tokens of 2,400 documents" in printed
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
