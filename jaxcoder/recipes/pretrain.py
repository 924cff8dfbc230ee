"""Training with initial weights of any format and with evaluations that generate text.

`jaxcoder/train` does not import inference or conversion: `pretrain` passes both to it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from jaxcoder.config import RunConfig
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import ConfigError
from jaxcoder.evaluation.infilling import infill_scores, single_line_gaps
from jaxcoder.inference.generate import TextGenerator
from jaxcoder.io.document import Document, Part
from jaxcoder.models.protocol import Decoder, Model
from jaxcoder.recipes.initial_weights import open_weights
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.train.inputs import held_out_stores
from jaxcoder.train.loop import AlterBatch, Evaluation, TrainResult, train
from jaxcoder.train.profile import ProfileSteps

_DOCUMENTS_PER_GAP = 4  # documents read per gap: not every document has a suitable line
_SEED = 0


def pretrain(
    config: RunConfig,
    *,
    accept_config_change: bool = False,
    directory_is_shared: bool = False,
    profile_steps: ProfileSteps | None = None,
    alter_batch: AlterBatch | None = None,
) -> TrainResult:
    """`train.loop.train` with `open_weights` and the evaluations that `config.eval` asks for."""
    return train(
        config,
        accept_config_change=accept_config_change,
        directory_is_shared=directory_is_shared,
        open_weights=open_weights,
        evaluations=evaluations(config),
        profile_steps=profile_steps,
        alter_batch=alter_batch,
    )


def evaluations(config: RunConfig) -> Sequence[Evaluation]:
    """Evaluations in addition to the held-out loss."""
    return [HeldOutInfilling(config)] if config.eval.infill_gaps and held_out_stores(config.data) else []


class HeldOutInfilling:
    """Greedy infilling of a fixed set of single lines of held-out files.

    In SPM order, where prefix and middle are adjacent: easier than PSM for a small model.
    """

    def __init__(self, config: RunConfig):
        """Reads the files. ConfigError if the tokenizer of the held-out stores has no FIM tokens."""
        stores = [TokenStore.open(path) for _, path in held_out_stores(config.data)]
        self._tokenizer = stores[0].tokenizer()
        count = config.eval.infill_gaps
        if self._tokenizer.fim is None:
            raise ConfigError(
                f"eval.infill_gaps is {count}, but the tokenizer of {stores[0].path} has no FIM tokens: set it to 0."
            )
        documents = [
            _read_document(store, number, self._tokenizer)
            for store in stores
            for number in range(min(store.num_documents, _DOCUMENTS_PER_GAP * count))
        ]
        self._gaps = single_line_gaps(documents, count=count, seed=_SEED)

    def __call__(self, model: Model, poll: Callable[[], object] = lambda: None) -> Mapping[str, float]:
        """eval/infill/{exact_match, edit_similarity, count} of a decoder. Call with its mesh in scope; `poll` is called
        between batches."""
        generator = TextGenerator(cast(Decoder, model), self._tokenizer, spm=True, truncate=True)
        scores = infill_scores(generator, self._gaps, poll=poll)
        return {
            "eval/infill/exact_match": scores.exact_match,
            "eval/infill/edit_similarity": scores.edit_similarity,
            "eval/infill/count": scores.count,
        }


def _read_document(store: TokenStore, number: int, tokenizer: Tokenizer) -> Document:
    """The text parts of a document of the store, without its special tokens."""
    start, stop = map(int, store.document_offsets[number : number + 2])
    runs = itertools.groupby(store.read(start, stop).tolist(), tokenizer.is_special)
    texts = [tokenizer.decode_bytes(list(ids)).decode(errors="replace") for is_special, ids in runs if not is_special]
    return Document(parts=tuple(Part(text=text) for text in texts))
