import json

import pytest

from jaxcoder.errors import DataError
from jaxcoder.tokenizer.portable import TOKENIZER_FILES, check_output_directory
from jaxcoder.tokenizer.special_tokens import SPECIAL_TOKENS
from jaxcoder.tokenizer.tokenizer import Tokenizer


def test_files_for_other_loaders(tokenizer, tmp_path):
    """The settings with which transformers 4.57 and 5.0 to 5.23 give our ids (tried by hand; see portable.py)."""
    tokenizer.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(TOKENIZER_FILES)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["additional_special_tokens"] == list(SPECIAL_TOKENS)
    assert config["bos_token"] == config["eos_token"] == config["unk_token"] == "<|endoftext|>"
    assert "pad_token" not in config and "extra_special_tokens" not in config
    assert config["clean_up_tokenization_spaces"] is False
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert special["additional_special_tokens"] == list(SPECIAL_TOKENS)


def test_vocab_and_merges_make_the_same_tokenizer(tokenizer, tmp_path, stdlib_texts):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    tokenizer.save(tmp_path)
    backend = Backend(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert backend.encode(stdlib_texts[3]).ids == tokenizer.encode(stdlib_texts[3])


def test_saving_leaves_other_files(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tokenizer.save(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_output_directory(tokenizer, tmp_path):
    check_output_directory(tmp_path / "new", overwrite=False)
    check_output_directory(tmp_path, overwrite=False)
    tokenizer.save(tmp_path)
    with pytest.raises(DataError, match="--overwrite"):
        check_output_directory(tmp_path, overwrite=False)
    check_output_directory(tmp_path, overwrite=True)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DataError, match="contains other files .thesis.tex"):
        check_output_directory(tmp_path, overwrite=True)
    with pytest.raises(DataError, match="is a file"):
        check_output_directory(tmp_path / "thesis.tex", overwrite=True)


def test_a_directory_that_cannot_be_made(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot write"):
        tokenizer.save(tmp_path / "file" / "tokenizer")


def test_vocab_and_merges_are_read_without_tokenizer_json(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    read = Tokenizer.load(tmp_path)
    assert read.vocab_size == tokenizer.vocab_size and read.fim == tokenizer.fim and read.eos_id == tokenizer.eos_id
    for text in ("def f(x): return x", "  a\n\n\tb <fim_prefix>"):  # without digits, which GPT-2 does not split
        assert read.encode(text) == tokenizer.encode(text)
        assert read.decode(read.encode(text)) == text
    (tmp_path / "merges.txt").write_text("#version: 0.2\nx yyyy\n")
    with pytest.raises(DataError, match="vocab.json and merges.txt in .* are damaged"):
        Tokenizer.load(tmp_path)
