"""Cutting from cached ids gives, id for id, what encoding the whole text again gives: on more than 20,000 documents."""

import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hostile import HOSTILE, hostile_document

from jaxcoder.config.schema import DataConfig
from jaxcoder.data.fim import Fim
from jaxcoder.data.fim_ids import IdsCutter, serves
from jaxcoder.data.fim_text import Piece, TextCutter
from jaxcoder.errors import DataError
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def rich_tokenizer():
    """Every hostile snippet has tokens here, and they join: merges across all that the rules must keep apart."""
    rng = random.Random(9)
    return train_tokenizer(["".join(rng.choices(HOSTILE, k=30)) for _ in range(3000)], vocab_size=3000)


@pytest.fixture(scope="module", params=["poor", "rich"])
def any_tokenizer(request, tokenizer, rich_tokenizer):
    return tokenizer if request.param == "poor" else rich_tokenizer


def flat(parts):
    return [[int(id_) for stretch in part for id_ in stretch] for part in parts]


class Compare:
    """Runs both ways over pieces with given cuts, and counts."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.whole = TextCutter(tokenizer)
        self.fast = IdsCutter(tokenizer, self._fall_back)
        self.pieces = self.fallen_back = 0

    def _fall_back(self, piece, draw_cuts):
        self.fallen_back += 1
        return self.whole(piece, draw_cuts)

    def __call__(self, ids, rng, *, begins_whole=True, ends_whole=True):
        if not len(ids):
            return
        piece = Piece(np.array(ids, np.int32), begins_whole, ends_whole)
        words = rng.random(), rng.random(), rng.random()

        def cuts(count):  # uniform, or close together, or at the ends
            first, second = (int(word * (count + 1)) for word in words[:2])
            if words[2] < 0.2:
                second = min(first + int(words[2] * 20), count)
            elif words[2] < 0.3:
                first, second = (0, second) if words[2] < 0.25 else (first, count)
            return min(first, second), max(first, second)

        self.pieces += 1
        assert flat(self.fast(piece, cuts)) == flat(self.whole(piece, cuts)), (ids, words)


def test_whole_documents(any_tokenizer):
    rng, compare = random.Random(1), Compare(any_tokenizer)
    for _ in range(15_000):
        compare(any_tokenizer.encode_document(hostile_document(rng)), rng)
    assert compare.pieces > 11_000 and compare.fallen_back == 0


def test_pieces_that_the_window_cuts(any_tokenizer):
    """Incomplete characters at the edges, and edges at which the rest of the text is encoded otherwise."""
    rng, compare = random.Random(2), Compare(any_tokenizer)
    otherwise = 0
    for _ in range(8_000):
        whole = any_tokenizer.encode_document(hostile_document(rng))
        if len(whole) < 2:
            continue
        start, stop = sorted(rng.sample(range(len(whole) + 1), 2))
        ids = whole[start:stop]
        compare(ids, rng, begins_whole=start == 0, ends_whole=stop == len(whole))
        text = any_tokenizer.decode_bytes(ids)
        if any_tokenizer.special_ids.isdisjoint(ids) and len(text.decode(errors="ignore").encode()) == len(text):
            otherwise += any_tokenizer.encode(text.decode()) != ids
    assert compare.pieces > 5_000 and otherwise > 10
    assert compare.fallen_back < compare.pieces / 20  # pieces of nothing but incomplete characters


def test_random_strings(any_tokenizer):
    """Characters from all over Unicode, unassigned and private ones too, beside blanks, digits and quotes."""
    rng, compare = random.Random(3), Compare(any_tokenizer)
    pools = (range(0x80), range(0x80, 0x800), range(0x800, 0xD800), range(0xE000, 0x10000), range(0x10000, 0x110000))
    for _ in range(8_000):
        size = rng.choice((1, 2, 3, 8, 30))
        text = "".join(
            rng.choice(" \t\r\n\f\v019'st.\u00a0\u3000\x1c\x85\u0660²") if rng.random() < 0.5
            else chr(rng.choice(rng.choice(pools)))
            for _ in range(size)
        )  # fmt: skip
        compare(any_tokenizer.encode(text), rng)
    assert compare.pieces == 8_000 and compare.fallen_back == 0


def test_every_cut_of_small_pieces(any_tokenizer):
    rng, compare = random.Random(4), Compare(any_tokenizer)
    for snippet in HOSTILE:
        ids = any_tokenizer.encode(snippet + rng.choice(HOSTILE))
        piece = Piece(np.array(ids, np.int32), True, True)
        count = len(any_tokenizer.decode(ids))
        for first in range(count + 1):
            for second in range(first, count + 1):
                both = [flat(cut(piece, lambda _, a=first, b=second: (a, b))) for cut in (compare.fast, compare.whole)]
                assert both[0] == both[1], (snippet, first, second)


def test_bytes_that_are_no_text(any_tokenizer):
    """No text gives such ids; a store of another kind might hold them."""
    rng, compare = random.Random(5), Compare(any_tokenizer)
    for _ in range(2_000):
        ids = [rng.randrange(any_tokenizer.vocab_size) for _ in range(rng.randint(1, 6))]
        if any_tokenizer.eos_id in ids or any_tokenizer.encode(any_tokenizer.decode(ids)) == ids:
            continue
        piece = Piece(np.array(ids, np.int32), False, False)
        cut = [compare.fast(piece, lambda count: (count // 3, count // 2)) for _ in range(2)]
        assert flat(cut[0]) == flat(cut[1])
        assert any_tokenizer.decode_bytes(sum(flat(cut[0]), [])) == any_tokenizer.decode_bytes(ids)
    assert compare.fallen_back > 100


def test_only_a_few_bytes_are_encoded_again():
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sources]
    tokenizer = train_tokenizer(texts[:20], vocab_size=2000)
    encoded = []
    rng, compare = random.Random(6), Compare(tokenizer)
    pieces = [tokenizer.encode(text) for text in texts]
    compare.fast._encode = lambda text: encoded.append(len(text)) or tokenizer.encode(text)
    for ids in pieces:
        for _ in range(5):
            compare(ids, rng)
    assert compare.fallen_back == 0
    assert sum(encoded) < 40 * compare.pieces and sum(encoded) < 0.01 * 5 * sum(map(len, texts))


def test_an_id_that_the_tokenizer_lacks(tokenizer):
    window = np.array([tokenizer.vocab_size + 3] * 9, np.int32)
    with pytest.raises(DataError, match="is not in the vocabulary"):
        Fim(tokenizer, DataConfig(fim_rate=1.0))(window, seed=0, sample=0)


def test_another_pre_tokenizer_is_encoded_whole(tokenizer):
    """GPT-2's keeps runs of digits together, so a boundary beside a digit is not safe there."""
    spec = tokenizers.Tokenizer(tokenizers.models.BPE())
    spec.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    spec.decoder = tokenizers.decoders.ByteLevel()
    names = [tokenizer.decode([id_]) for id_ in sorted(tokenizer.special_ids)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=names, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    spec.train_from_iterator(["1234 5678 123456 x = 12345"] * 50, trainer)
    other = Tokenizer(spec.to_str().encode())
    assert serves(tokenizer) and not serves(other)
    text = "x = 1234567812345678 "
    transform = Fim(other, DataConfig(fim_rate=1.0, fim_spm_rate=0.0))
    window = np.array([*other.encode(text), *[other.eos_id] * 60], np.int32)
    marks = other.fim
    for sample in range(100):
        result = transform(window, seed=0, sample=sample).tolist()
        suffix, middle = result.index(marks.suffix), result.index(marks.middle)
        for part in (result[1:suffix], result[suffix + 1 : middle], result[middle + 1 : result.index(other.eos_id)]):
            assert part == other.encode(other.decode(part))
