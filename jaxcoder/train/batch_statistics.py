"""Statistics of a batch, counted on the host: bytes of text, and the shares of FIM and SPM pieces."""

import numpy as np

from jaxcoder.data.loader import Batch
from jaxcoder.tokenizer.tokenizer import Tokenizer


def text_bytes(batch: Batch, token_bytes: np.ndarray | None) -> int | None:
    """Bytes of text of the targets in the loss, for bits per byte; None for synthetic data, whose ids have no text."""
    return None if token_bytes is None else int(token_bytes[batch.targets[batch.loss_mask > 0]].sum(dtype=np.int64))


def fim_shares(batch: Batch, tokenizer: Tokenizer | None) -> dict[str, float]:
    """pieces (their number), fim_share of them, fim_spm_share of those; {} without FIM tokens.

    PSM order is <prefix> text <suffix> text <middle> text, SPM order <prefix> <suffix> text <middle> text.
    """
    if tokenizer is None or (fim := tokenizer.fim) is None:
        return {}
    ids = batch.inputs
    is_last = np.zeros(len(ids), bool) if ids.shape[1] == 0 else ids[:, -1] != tokenizer.eos_id
    pieces = int(np.count_nonzero(ids == tokenizer.eos_id) + np.count_nonzero(is_last))
    is_prefix = ids == fim.prefix
    count = int(np.count_nonzero(is_prefix))
    spm = int(np.count_nonzero(is_prefix[:, :-1] & (ids[:, 1:] == fim.suffix)))
    shares = {"pieces": pieces, "fim_share": count / max(pieces, 1)}
    return shares | ({"fim_spm_share": spm / count} if count else {})
