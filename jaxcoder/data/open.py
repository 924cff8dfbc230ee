"""From a run's config to its training stream and the schedule of its batches."""

from jaxcoder.config.schema import RunConfig
from jaxcoder.data.schedule import BatchSchedule
from jaxcoder.data.store import TokenStore
from jaxcoder.data.stream import SampleStream
from jaxcoder.errors import ConfigError

SYNTHETIC = "synthetic"


def open_stream(config: RunConfig) -> SampleStream:
    """The stream that a run trains on.

    Raises ConfigError if the run names no store, or if its caps allow fewer samples than it reads; DataError for stores
    that are missing, damaged or do not fit the model or one another.
    """
    data = config.data
    if not data.store and not data.corpora:
        raise ConfigError(
            "data.store is not set: give `--data STORE`, a token store made by `jaxcoder data build`, "
            "or `--data synthetic` to try the machine."
        )
    if data.store == SYNTHETIC:
        raise ConfigError("data.store is synthetic, which stands for no files: give `--data STORE`.")
    stores = [TokenStore.open(path) for path in store_paths(config)]
    for store in stores:
        store.check_vocabulary(config.model.vocab_size)
    tokenizer = stores[0].tokenizer()
    stream = SampleStream(stores, tokenizer, data, seq_len=config.model.max_seq_len, seed=config.seed)
    needed, _ = BatchSchedule.of(config.global_batch_size, data).samples_of(config.num_steps)
    there = stream.mixture.num_samples
    if there is not None and there < needed:
        raise ConfigError(
            f"the caps of data.corpora allow {there:,} samples, but num_steps {config.num_steps:,} reads {needed:,}: "
            "raise max_epochs of a corpus, or train for fewer steps."
        )
    return stream


def store_paths(config: RunConfig) -> list[str]:
    """The token stores of a run's training data."""
    return [corpus.store for corpus in config.data.corpora] or [config.data.store]
