"""`as_trained` gives what BigCode's Megatron-LM fork gave, piece for piece; and each switch alone what it says.

The oracle here is a literal reading of what is known of that code: slow, on the `tokenizers` library alone, and
sharing nothing with ours but the words that are drawn (the original's come from a generator in the order of access).
"""

import dataclasses
import random

import numpy as np
import pytest
import tokenizers
from hostile import hostile_document

from jaxcoder.config import DataConfig, ModelConfig, RunConfig
from jaxcoder.config.variant import SWITCHES, with_variant
from jaxcoder.data.fim import Fim
from jaxcoder.data.loader import batches
from jaxcoder.data.stream import SampleStream

MODEL = ModelConfig(num_layers=1, embed_dim=4, num_heads=2, head_dim=2, mlp_dim=8)
RUN = RunConfig(name="x", model=MODEL, num_steps=1, global_batch_size=1)
AS_TRAINED = with_variant(RUN, "as_trained").data


class Oracle:
    """One sample at a time, as in `GPTDataset.__getitem__` and `permute`."""

    def __init__(self, file, fim_rate, fim_spm_rate):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self.fim_rate, self.fim_spm_rate = fim_rate, fim_spm_rate
        self.end, self.prefix, self.middle, self.suffix, self.pad = map(
            self.tokenizer.token_to_id, ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
        )

    def sample(self, sample, seed, number):
        length = len(sample)
        piece_number = 0
        if self.end in sample:
            start, result = 0, []
            for place in [place for place in range(length) if sample[place] == self.end]:
                if place - start > 0:
                    result += self.permute(sample[start:place], self.words(seed, number, piece_number))
                    result += [self.end]
                start = place + 1
                piece_number += 1
            result += self.permute(sample[start:], self.words(seed, number, piece_number))
        else:
            result = self.permute(sample, self.words(seed, number, piece_number))
        if len(result) > length:
            result = result[:length]
        while len(result) < length:
            result = [*result, self.pad]
        return result

    def words(self, seed, number, piece):
        return [int(word) for word in np.random.Philox(key=seed, counter=[0, 0, piece, number]).random_raw(4)]

    def permute(self, ids, words):
        transform, order, *places = words
        if not transform < self.fim_rate * 2**64:
            return list(ids)
        contents = self.detokenize(ids)
        first, second = sorted(place * (len(contents) + 1) // 2**64 for place in places)
        prefix = self.tokenize(contents[:first])
        middle = self.tokenize(contents[first:second])
        suffix = self.tokenize(contents[second:])
        if order < self.fim_spm_rate * 2**64:
            return [self.prefix, self.suffix] + suffix + [self.middle] + prefix + middle
        return [self.prefix] + prefix + [self.suffix] + suffix + [self.middle] + middle

    def tokenize(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def detokenize(self, ids):
        """With the clean-up of spaces that the decoders of `transformers` had on."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        text = text.replace(" .", ".").replace(" ?", "?").replace(" !", "!").replace(" ,", ",")
        text = text.replace(" ' ", "'").replace(" n't", "n't").replace(" 'm", "'m").replace(" 's", "'s")
        return text.replace(" 've", "'ve").replace(" 're", "'re")


@pytest.fixture(scope="module")
def file(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory)
    return directory / "tokenizer.json"


def random_window(tokenizer, rng):
    """Hostile documents end to end, empty ones too, cut anywhere."""
    ids = []
    for _ in range(rng.randint(1, 5)):
        ids += tokenizer.encode_document(hostile_document(rng)) if rng.random() < 0.8 else []
        ids += [tokenizer.eos_id]
    start = rng.randrange(len(ids))
    return ids[start : rng.randint(start + 1, len(ids))]


@pytest.mark.parametrize("fim_rate", [0.5, 1.0])
def test_as_trained_is_megatron_piece_for_piece(tokenizer, file, fim_rate):
    oracle = Oracle(file, fim_rate, 0.5)
    transform = Fim(tokenizer, dataclasses.replace(AS_TRAINED, fim_rate=fim_rate))
    mended = Fim(tokenizer, DataConfig(fim_rate=fim_rate))
    rng, differences = random.Random(7), 0
    for number in range(2000):
        ids = random_window(tokenizer, rng)
        window = np.array(ids, np.int32)
        result = transform(window, seed=9, sample=number)
        assert result.tolist() == oracle.sample(ids, 9, number), (number, ids)
        differences += not np.array_equal(result, mended(window, seed=9, sample=number))
    assert differences > 200  # the defects are there, and the mended stream does not have them


def one(tokenizer, ids, *, sample=0, **switches):
    """The transformed window, in PSM order, with some switches on."""
    transform = Fim(tokenizer, DataConfig(fim_rate=1.0, fim_spm_rate=0.0, **switches))
    return transform(np.array(ids, np.int32), seed=3, sample=sample).tolist()


def text_of(tokenizer, ids):
    return tokenizer.decode([id_ for id_ in ids if id_ not in tokenizer.fim and id_ != tokenizer.eos_id])


def test_mended_is_the_default():
    assert DataConfig() == with_variant(RUN, "mended").data
    assert not any(getattr(DataConfig(), name) for name in SWITCHES)
    assert all(getattr(AS_TRAINED, name) for name in SWITCHES)


def test_clean_up_alone(tokenizer):
    """One cut piece, its three parts in order prefix, suffix, middle: so characters are counted, not read."""
    ids = [*tokenizer.encode("a , b . do n't 's"), tokenizer.special_id("<filename>"), *tokenizer.encode("\ue000 ?")]
    window = [*ids, *[tokenizer.eos_id] * 60]
    for sample in range(30):
        kept = text_of(tokenizer, one(tokenizer, window, sample=sample))
        eaten = text_of(tokenizer, one(tokenizer, window, sample=sample, fim_clean_up=True))
        assert sorted(kept) == sorted("a , b . do n't 's<filename>\ue000 ?")
        assert sorted(eaten) == sorted("a, b. don't's<filename>\ue000?")
        assert "<filename>" in eaten


def test_sentinels_as_text_alone(tokenizer):
    filename = tokenizer.special_id("<filename>")
    window = [*[filename] * 4, *[tokenizer.eos_id] * 60]
    cut_in_two = 0
    for sample in range(50):
        assert one(tokenizer, window, sample=sample).count(filename) == 4
        result = one(tokenizer, window, sample=sample, fim_sentinels_as_text=True)
        cut_in_two += result.count(filename) < 4
        assert len(text_of(tokenizer, result)) == 4 * len("<filename>")
    assert cut_in_two > 40
    spelled = [*tokenizer.encode("<filename>" * 9), *[tokenizer.eos_id] * 99]
    assert filename not in one(tokenizer, spelled)
    assert filename in one(tokenizer, spelled, fim_sentinels_as_text=True)


def test_replace_incomplete_alone(tokenizer):
    lead, *_, last = tokenizer.encode("\ue000")
    window = [last, *tokenizer.encode("ab"), tokenizer.special_id("<filename>"), lead]
    for sample in range(30):
        assert one(tokenizer, window, sample=sample)[:2] == [tokenizer.fim.prefix, last]
        result = one(tokenizer, [*window[:-1], *[tokenizer.eos_id] * 30], sample=sample, fim_replace_incomplete=True)
        assert last not in result or tokenizer.decode(result).count("\ufffd") == 1
        assert sorted(text_of(tokenizer, result)) == sorted("\ufffdab<filename>")


def test_drop_empty_pieces_alone(tokenizer):
    end, x = tokenizer.eos_id, tokenizer.encode("x")
    window = [end, end, *x, end, end, *x, end, *[end] * 9]
    kept, dropped = one(tokenizer, window), one(tokenizer, window, fim_drop_empty_pieces=True)
    assert kept[:2] == [end, end] and len(kept) == len(window)
    assert dropped.count(end) == 2 and dropped.count(tokenizer.fim.pad) == len(window) - 10
    assert [id_ for id_ in dropped if id_ not in (end, tokenizer.fim.pad)] == [id_ for id_ in kept if id_ != end]


def test_transform_empty_tail_alone(tokenizer):
    end, marks = tokenizer.eos_id, tokenizer.fim
    spare = DataConfig(fim_rate=1.0, fim_clean_up=True, fim_transform_empty_tail=True)
    window = np.array([*tokenizer.encode(" ! ! ! ! ! ! ! ! ! ! ! !"), end], np.int32)
    result = Fim(tokenizer, spare)(window, seed=3, sample=0).tolist()
    behind = result[result.index(end) + 1 :]
    assert [id_ for id_ in behind if id_ != marks.pad] == [marks.prefix, marks.suffix, marks.middle]
    without = Fim(tokenizer, dataclasses.replace(spare, fim_transform_empty_tail=False))(window, seed=3, sample=0)
    assert set(without.tolist()[result.index(end) + 1 :]) == {marks.pad}


def test_pad_in_loss_reaches_the_batches(store, tokenizer):
    """Windows of empty documents only become padding when they are dropped."""
    rules = dataclasses.replace(AS_TRAINED, fim_rate=1.0)
    for config, counted in ((rules, True), (dataclasses.replace(rules, pad_in_loss=False), False)):
        stream = SampleStream(store, tokenizer, config, seq_len=48, seed=3)
        with batches(stream, global_batch_size=64, first_sample=0) as source:
            batch = next(source)
        padded = batch.targets[:, -1] == tokenizer.fim.pad
        assert padded.any() and (batch.loss_mask[padded, -1] == counted).all() and batch.loss_mask[~padded].all()
