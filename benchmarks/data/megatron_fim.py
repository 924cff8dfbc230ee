"""Fill-in-the-middle as BigCode's Megatron-LM fork does it, next to jaxcoder's transform of cached ids.

python -m benchmarks.data.megatron_fim
python -m benchmarks.data.megatron_fim --fim-rate 1
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

from benchmarks import command
from jaxcoder.benchmarks import fim
from jaxcoder.benchmarks.fim import add_arguments
from jaxcoder.benchmarks.measure import Report

__all__ = ["add_arguments", "run"]

_CLEAN_UP = (".", "?", "!", ",")
_CLEAN_UP_CONTRACTIONS = ("n't", "'m", "'s", "'ve", "'re")


def run(args: argparse.Namespace) -> Report:
    from jaxcoder.config.schema import DataConfig
    from jaxcoder.config.variant import SWITCHES
    from jaxcoder.data.fim import Fim
    from jaxcoder.data.fim_text import TextCutter

    texts, tokenizer = fim.corpus(args)
    windows, num_pieces = fim.make_windows(texts, tokenizer, args.windows, args.seq_len)
    rules = DataConfig(fim_rate=args.fim_rate)
    transforms = {
        "no piece is transformed": Fim(tokenizer, replace(rules, fim_rate=1e-18)),
        "from cached ids": Fim(tokenizer, rules),
        "decode, cut and encode again": Fim(tokenizer, rules, cut=TextCutter(tokenizer)),
        "the same, variant as_trained": Fim(tokenizer, replace(rules, **dict.fromkeys(SWITCHES, True))),
        "Megatron": megatron_fim(tokenizer, args.fim_rate, rules.fim_spm_rate),
    }
    fim.check_equal(windows, transforms["from cached ids"], transforms["decode, cut and encode again"])
    fim.check_equal(windows[:8], transforms["the same, variant as_trained"], transforms["Megatron"])
    return fim.report(args, windows, num_pieces, tokenizer, transforms, baseline="Megatron")


def megatron_fim(tokenizer, fim_rate: float, fim_spm_rate: float) -> Callable:
    """The transform of BigCode's Megatron-LM fork, with the `tokenizers` library and jaxcoder's draws.

    Pieces are decoded (with the clean-up of spaces that `transformers` then had), cut, and encoded part by part.
    """
    import tempfile

    import numpy as np
    import tokenizers

    from jaxcoder.data.fim import draw_fim
    from jaxcoder.data.randomness import happens

    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        backend = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
    fim, end_id = tokenizer.fim, tokenizer.eos_id

    def detokenize(ids):
        text = backend.decode(ids, skip_special_tokens=False)
        for mark in _CLEAN_UP:
            text = text.replace(f" {mark}", mark)
        text = text.replace(" ' ", "'")
        for contraction in _CLEAN_UP_CONTRACTIONS:
            text = text.replace(f" {contraction}", contraction)
        return text

    def tokenize(text):
        return np.array(backend.encode(text, add_special_tokens=False).ids, np.int64)

    def permute(ids, draw):
        if not happens(draw.transform, fim_rate):
            return ids
        text = detokenize(ids)
        first, second = draw.cuts(len(text))
        prefix, middle, suffix = tokenize(text[:first]), tokenize(text[first:second]), tokenize(text[second:])
        if happens(draw.order, fim_spm_rate):
            return np.concatenate([[fim.prefix, fim.suffix], suffix, [fim.middle], prefix, middle])
        return np.concatenate([[fim.prefix], prefix, [fim.suffix], suffix, [fim.middle], middle])

    def transform(window, *, seed, sample):
        draw_of = draw_fim(seed, sample)
        start, parts = 0, []
        ends = np.flatnonzero(window == end_id).tolist()
        for number, stop in enumerate(ends):
            if stop > start:
                parts += [permute(window[start:stop], draw_of(number)), [end_id]]
            start = stop + 1
        parts.append(permute(window[start:], draw_of(len(ends))))
        result = np.concatenate(parts)[: len(window)]
        return np.pad(result, (0, len(window) - len(result)), constant_values=fim.pad)

    return transform


if __name__ == "__main__":
    sys.exit(command.main(sys.modules[__name__]))
