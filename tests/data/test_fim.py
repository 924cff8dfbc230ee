"""FIM by its invariants, on hostile documents: nothing is lost, nothing is divided that is one, rates are as asked.

The checks here read the output only; they share no code with the implementation.
"""

import functools
import random
from itertools import product

import numpy as np
import pytest
from hostile import HOSTILE, SPECIALS, hostile_document
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcoder.config.schema import DataConfig
from jaxcoder.data.fim import Fim, draw_fim
from jaxcoder.data.randomness import Purpose, random_words
from jaxcoder.errors import ConfigError
from jaxcoder.io.document import Document, Part


def fim(tokenizer, window, *, sample=0, seed=1, fim_rate=1.0, fim_spm_rate=0.5):
    window = np.array(window, np.int32)
    transform = _made(tokenizer, DataConfig(fim_rate=fim_rate, fim_spm_rate=fim_spm_rate))
    result = transform(window, seed=seed, sample=sample)
    assert result.dtype == np.int32 and result.shape == window.shape
    return result.tolist()


_made = functools.cache(Fim)


def atoms(tokenizer, ids):
    """What ids stand for, whatever the tokens: stretches of bytes and special ids in turn."""
    result = []
    for token in ids:
        if tokenizer.is_special(token):
            result.append(token)
        elif result and isinstance(result[-1], bytes):
            result[-1] += tokenizer.decode_bytes([token])
        else:
            result.append(tokenizer.decode_bytes([token]))
    return result


def split(ids, token):
    parts = [[]]
    for id_ in ids:
        if id_ == token:
            parts.append([])
        else:
            parts[-1].append(id_)
    return parts


def psm_parts(tokenizer, piece):
    ids = tokenizer.fim
    assert piece[0] == ids.prefix
    prefix, rest = split(piece[1:], ids.suffix)
    suffix, middle = split(rest, ids.middle)
    return prefix, middle, suffix


def transformed(tokenizer, ids, *, sample, spm, seed=1):
    """The transformed form of one piece, whole: end tokens behind it are the room that it may take."""
    room = 3 * len(ids) + 40
    window = [*ids, *[tokenizer.eos_id] * room]
    result = fim(tokenizer, window, sample=sample, seed=seed, fim_spm_rate=float(spm))
    return result[: result.index(tokenizer.eos_id)]


def check_piece(tokenizer, ids, sample):
    psm = transformed(tokenizer, ids, sample=sample, spm=False)
    spm = transformed(tokenizer, ids, sample=sample, spm=True)
    prefix, middle, suffix = psm_parts(tokenizer, psm)
    marks = tokenizer.fim
    assert spm == [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix, *middle]
    assert atoms(tokenizer, prefix + middle + suffix) == atoms(tokenizer, ids)
    return prefix, middle, suffix


texts = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=6), max_size=10).map("".join)
parts = st.sampled_from(SPECIALS).map(lambda name: Part(special=name)) | texts.map(Part)


@given(parts=st.lists(parts, max_size=5), sample=st.integers(0, 2**40))
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_and_parts_are_encoded_apart(tokenizer, parts, sample):
    ids = tokenizer.encode_document(Document(tuple(parts)))
    if not ids:
        return
    three = check_piece(tokenizer, ids, sample)
    for part in three:
        # every stretch of text in a part is what encoding that text alone gives
        texts = [atom for atom in atoms(tokenizer, part) if isinstance(atom, bytes)]
        again = [token for text in texts for token in tokenizer.encode(text.decode())]
        assert [token for token in part if not tokenizer.is_special(token)] == again


def test_many_hostile_documents(tokenizer):
    rng = random.Random(3)
    for sample in range(800):
        ids = tokenizer.encode_document(hostile_document(rng))
        if ids:
            check_piece(tokenizer, ids, sample)


def test_fragments_of_windows_keep_the_tokens_of_incomplete_characters(tokenizer):
    rng = random.Random(4)
    seen = 0
    for sample in range(800):
        whole = tokenizer.encode_document(hostile_document(rng))
        if len(whole) < 3:
            continue
        start = rng.randrange(len(whole) - 1)
        ids = whole[start : rng.randint(start + 1, len(whole))]
        prefix, middle, suffix = check_piece(tokenizer, ids, sample)
        first = tokenizer.decode_bytes([ids[0]])
        if not tokenizer.is_special(ids[0]) and 0x80 <= first[0] < 0xC0:
            assert prefix[0] == ids[0]
            seen += 1
        last = tokenizer.decode_bytes([ids[-1]])
        if not tokenizer.is_special(ids[-1]) and last[-1] >= 0xC0:  # a lead byte without what must follow
            assert (suffix or prefix)[-1] == ids[-1]
            seen += 1
    assert seen > 50


def test_incomplete_characters_are_never_replaced(tokenizer):
    ids = tokenizer.encode("\ue000")  # three bytes that the training text rarely joins
    assert len(ids) > 1
    for cut in range(1, len(ids)):
        for part in (ids[:cut], ids[cut:]):
            result = transformed(tokenizer, part, sample=0, spm=False)
            assert psm_parts(tokenizer, result) == (part, [], [])
        between = [*ids[cut:], *tokenizer.encode("ab"), *ids[:cut]]
        for sample in range(20):
            prefix, middle, suffix = check_piece(tokenizer, between, sample)
            assert prefix[: len(ids) - cut] == ids[cut:] and suffix[len(suffix) - cut :] == ids[:cut]


def test_whole_characters_beside_a_fragment_are_cut_like_any_other(tokenizer):
    spelled = tokenizer.encode("\ue000")
    ids = [spelled[-1], *tokenizer.encode("a\ue000b")]  # a lone last byte, then text with a character of several tokens
    suffixes = {tokenizer.decode(check_piece(tokenizer, ids, sample)[2]) for sample in range(80)}
    assert suffixes == {"a\ue000b", "\ue000b", "b", ""}


def test_text_that_spells_a_sentinel_stays_text(tokenizer):
    ids = tokenizer.encode("a<fim_prefix>b<|endoftext|>c<fim_middle>")
    assert not tokenizer.special_ids & set(ids)
    for sample in range(50):
        for part in check_piece(tokenizer, ids, sample):
            assert not tokenizer.special_ids & set(part)


def test_one_character_is_cut_at_both_sides(tokenizer):
    ids = tokenizer.encode("x")
    shapes = {tuple(map(len, check_piece(tokenizer, ids, sample))) for sample in range(60)}
    assert shapes == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}


def test_cuts_are_uniform_over_characters_and_both_ends(tokenizer):
    text = "añ中\U0001f600 b"  # 6 characters of one to four bytes: 7 places, 49 pairs
    counts = np.zeros((7, 7), int)
    trials = 2450
    for sample in range(trials):
        three = psm_parts(tokenizer, transformed(tokenizer, tokenizer.encode(text), sample=sample, spm=False))
        prefix, middle, _ = (tokenizer.decode(part) for part in three)
        counts[len(prefix), len(prefix) + len(middle)] += 1
    expected = trials / 49 * (2 - np.eye(7))
    used = np.triu_indices(7)
    chi_square = ((counts - expected)[used] ** 2 / expected[used]).sum()
    assert counts[np.tril_indices(7, -1)].sum() == 0
    assert chi_square < 27 + 6 * np.sqrt(2 * 27)


def test_empty_pieces_keep_their_end_tokens(tokenizer):
    end = tokenizer.eos_id
    assert fim(tokenizer, [end] * 9) == [end] * 9
    x = tokenizer.encode("x")
    result = fim(tokenizer, [end, end, *x, end, end, *x, *[end] * 12])
    pieces = split(result, end)
    assert pieces[0] == pieces[1] == pieces[3] == [] and len(pieces[2]) == len(pieces[4]) == 4
    assert set(map(len, pieces[5:])) == {0}


def test_the_last_piece_gets_no_end_token_and_the_rest_is_padding(tokenizer):
    # Few tokens become fewer when they are encoded again; the clean-up of spaces makes it sure.
    ids = tokenizer.encode(" !x ?y .z ,x" * 8)
    shrinks = Fim(tokenizer, DataConfig(fim_rate=1.0, fim_clean_up=True))
    for sample in range(100):
        result = shrinks(np.array(ids, np.int32), seed=1, sample=sample).tolist()
        pads = result.count(tokenizer.fim.pad)
        assert pads > 0 and result[-pads:] == [tokenizer.fim.pad] * pads
        inside = result[:-pads]
        assert tokenizer.eos_id not in inside
        assert len(tokenizer.decode_bytes(inside, show_specials=False)) == len("!x?y.z,x" * 8)


def test_too_long_is_cut_at_the_right(tokenizer):
    ids = tokenizer.encode("def f(x):\n    return x + 1\n")
    whole = transformed(tokenizer, ids, sample=5, spm=False)
    assert fim(tokenizer, ids, sample=5, fim_spm_rate=0.0) == whole[: len(ids)]


@pytest.mark.parametrize("fim_rate, spm_rate", [(0.5, 0.5), (0.9, 0.25), (0.1, 0.8)])
def test_rates_are_within_their_bounds(tokenizer, fim_rate, spm_rate):
    text = "some text " * 20
    number, samples, marks = 30, 300, tokenizer.fim
    window = [*[*tokenizer.encode(text), tokenizer.eos_id] * number, *[tokenizer.eos_id] * (number * 40)]
    counts = {"plain": 0, "PSM": 0, "SPM": 0}
    for sample in range(samples):
        result = fim(tokenizer, window, sample=sample, fim_rate=fim_rate, fim_spm_rate=spm_rate)
        for piece in (piece for piece in split(result, tokenizer.eos_id) if piece):
            is_spm = piece[:2] == [marks.prefix, marks.suffix]
            counts["plain" if piece[0] != marks.prefix else "SPM" if is_spm else "PSM"] += 1
    total = number * samples
    assert sum(counts.values()) == total
    empty_prefix = 1 - (len(text) / (len(text) + 1)) ** 2  # then PSM cannot be told from SPM
    psm_rate = fim_rate * (1 - spm_rate) * (1 - empty_prefix)
    for name, rate in (("plain", 1 - fim_rate), ("PSM", psm_rate), ("SPM", fim_rate - psm_rate)):
        assert abs(counts[name] - total * rate) < 5 * np.sqrt(total * rate * (1 - rate)), (name, counts)


def test_the_four_words_of_a_draw_are_independent():
    draws = np.array([draw_of(piece) for draw_of in (draw_fim(1, s) for s in range(300)) for piece in range(60)], float)
    draws /= 2**64
    assert np.all(np.abs(draws.mean(axis=0) - 0.5) < 5 / np.sqrt(12 * len(draws)))
    correlation = np.corrcoef(draws.T)[np.triu_indices(4, 1)]
    assert np.all(np.abs(correlation) < 5 / np.sqrt(len(draws)))
    neighbours = np.corrcoef(draws[:-1].T, draws[1:].T)[:4, 4:]
    assert np.all(np.abs(neighbours) < 5 / np.sqrt(len(draws)))


def test_a_piece_is_a_function_of_seed_sample_and_number_alone(tokenizer):
    x, end = tokenizer.encode("def f(x): return x"), tokenizer.eos_id
    room = [end] * 200
    first = split(fim(tokenizer, [*x, end, *x, end, *room]), end)
    other = split(fim(tokenizer, [*tokenizer.encode("other"), end, *x, end, *room]), end)
    assert first[1] == other[1]
    assert first[0] != first[1] or fim(tokenizer, [*x, end, *room], sample=1) != fim(tokenizer, [*x, end, *room])
    assert len({draw_fim(seed, sample)(piece) for seed, sample, piece in product(range(5), repeat=3)}) == 125


def test_rate_zero_returns_the_window_and_needs_no_fim_tokens(tokenizer):
    window = np.array(tokenizer.encode("plain text"), np.int32)

    class Without:
        fim = None
        eos_id = tokenizer.eos_id

    same = Fim(Without(), DataConfig(fim_rate=0.0))(window, seed=0, sample=0)
    assert np.array_equal(same, window)
    with pytest.raises(ConfigError, match="fim_rate must be 0"):
        Fim(Without(), DataConfig(fim_rate=0.5))


def test_a_draw_is_the_words_of_its_place():
    draw_of = draw_fim(7, 11)
    for piece in (3, 0, 3, 2**40):  # in any order, again and again
        assert list(draw_of(piece)) == random_words(7, Purpose.FIM, 11, part=piece).tolist()
