"""Training with everything that the configuration asks for: other weights to begin with, and evaluation by generating.

The loop itself generates nothing (`jaxcoder/train` knows no inference); what its weights write is measured by what it
is handed from here. Further tasks join `evaluations`.
"""

from collections.abc import Callable, Mapping, Sequence

from jaxcoder.config import RunConfig
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import ConfigError
from jaxcoder.evaluation.infilling import infill_scores, single_line_gaps
from jaxcoder.inference.generate import TextGenerator
from jaxcoder.io.document import Document, Part
from jaxcoder.models.protocol import Decoder
from jaxcoder.recipes.start import open_weights
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.train.inputs import held_out_stores
from jaxcoder.train.loop import AlterBatch, Evaluation, TrainResult, train
from jaxcoder.train.profile import ProfileSteps

_DOCUMENTS_PER_GAP = 4  # read from a held-out store: some have no line that may be asked for
_SEED = 0


def pretrain(
    config: RunConfig,
    *,
    accept_config_change: bool = False,
    directory_is_shared: bool = False,
    profile_steps: ProfileSteps | None = None,
    alter_batch: AlterBatch | None = None,
) -> TrainResult:
    """`train.loop.train`, beginning with weights of any format, and measuring what `config.eval` asks for."""
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
    """What is measured beside the held-out loss."""
    return [HeldOutInfilling(config)] if config.eval.infill_gaps and held_out_stores(config.data) else []


class HeldOutInfilling:
    """Weights -> how well they infill lines of held-out files, always the same ones, greedily, in SPM order.

    Suffix first, prefix and middle stand side by side, which is the easier order for a small model.
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
            _document(store, number, self._tokenizer)
            for store in stores
            for number in range(min(store.num_documents, _DOCUMENTS_PER_GAP * count))
        ]
        self._gaps = single_line_gaps(documents, count=count, seed=_SEED)

    def __call__(self, model: Decoder, poll: Callable[[], object] = lambda: None) -> Mapping[str, float]:
        """eval/infill/{exact_match, edit_similarity, count}. Call with the model's mesh in scope; poll: called between
        batches."""
        generator = TextGenerator(model, self._tokenizer, spm=True, truncate=True)
        scores = infill_scores(generator, self._gaps, poll=poll)
        return {
            "eval/infill/exact_match": scores.exact_match,
            "eval/infill/edit_similarity": scores.edit_similarity,
            "eval/infill/count": scores.count,
        }


def _document(store: TokenStore, number: int, tokenizer: Tokenizer) -> Document:
    """The text of a document of a store (its end token left out); special tokens stand between its parts."""
    start, stop = (int(place) for place in store.document_offsets[number : number + 2])
    parts, ids = [], []
    for token in [*store.read(start, stop).tolist(), tokenizer.eos_id]:
        if not tokenizer.is_special(token):
            ids.append(token)
        elif ids:
            parts.append(Part(text=tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")))
            ids = []
    return Document(parts=tuple(parts))
