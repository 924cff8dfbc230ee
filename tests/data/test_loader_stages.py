"""The loader with mixtures and stages: the same contents for any hosts, threads, restarts and changes of hosts."""

import random

import numpy as np
import pytest
from hostile import hostile_documents

from jaxcoder.config.schema import Corpus, DataConfig, Stage
from jaxcoder.data.build import build_store
from jaxcoder.data.loader import batches
from jaxcoder.data.schedule import BatchSchedule, StepHistory
from jaxcoder.data.stream import SampleStream
from jaxcoder.errors import ConfigError
from jaxcoder.io.document_files import write_documents

STAGES = (
    Stage(from_sample=0, global_batch_size=8),
    Stage(from_sample=60, global_batch_size=24),  # inside the eighth batch, which is finished first
    Stage(from_sample=100, weights=(0.0, 1.0)),
    Stage(from_sample=300, weights=(1.0, 1.0), global_batch_size=8),
)
SIZE = 16
SPANS = [
    *((8 * n, 8) for n in range(8)),
    (64, 24),
    (88, 24),
    *((112 + 16 * n, 16) for n in range(12)),
    (304, 8),
    (312, 8),
]


@pytest.fixture(scope="module")
def stream(store, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("second")
    write_documents(hostile_documents(150, seed=9), root / "documents.jsonl")
    second = build_store(root / "documents.jsonl", tokenizer, root / "store", seed=2)
    corpora = (Corpus(store=store.path, weight=0.6), Corpus(store=second.path, weight=0.4, max_epochs=40.0))
    data = DataConfig(corpora=corpora, stages=STAGES, document_mask=True)
    return SampleStream([store, second], tokenizer, data, seq_len=48, seed=3)


@pytest.fixture(scope="module")
def expected(stream):
    """(inputs, targets) of every step, from the samples themselves."""
    steps = []
    for first, size in SPANS:
        windows = np.stack([stream.sample(index) for index in range(first, first + size)])
        steps.append((windows[:, :-1], windows[:, 1:]))
    return steps


def take(stream, steps, **arguments):
    with batches(stream, global_batch_size=SIZE, stages=STAGES, **arguments) as source:
        return [next(source) for _ in range(steps)]


def assert_steps(shares, expected):
    """shares: for each host, its batches; together they are the steps expected."""
    for host_batches, (inputs, targets) in zip(zip(*shares, strict=True), expected, strict=True):
        assert np.array_equal(np.concatenate([batch.inputs for batch in host_batches]), inputs)
        assert np.array_equal(np.concatenate([batch.targets for batch in host_batches]), targets)


def test_schedule():
    schedule = BatchSchedule(SIZE, STAGES)
    assert [schedule.samples_of(batch) for batch in range(len(SPANS))] == SPANS
    assert schedule.batch_sizes == {8, 16, 24}
    for batch, (first, size) in enumerate(SPANS):
        assert [schedule.batch_of(first + row) for row in (0, size - 1)] == [(batch, 0), (batch, size - 1)]
        resumed = BatchSchedule(SIZE, STAGES, batch=batch, sample=first)
        assert [resumed.samples_of(later) for later in range(batch, len(SPANS))] == SPANS[batch:]
    assert BatchSchedule(4).samples_of(10) == (40, 4)
    skipped = BatchSchedule(64, (Stage(from_sample=0), Stage(from_sample=3, global_batch_size=2), Stage(from_sample=5)))
    assert [skipped.samples_of(batch) for batch in range(3)] == [(0, 64), (64, 64), (128, 64)]


def test_history_follows_the_log_where_there_is_one():
    plain = StepHistory(SIZE, STAGES)
    assert [plain.samples_of(step) for step in range(1, len(SPANS) + 1)] == SPANS and plain.last_step == 0
    # Ten steps of 8 by another config, every one logged; then three by this one, only the last logged.
    logged = StepHistory(SIZE, (), [*((step, 8 * step) for step in range(1, 11)), (13, 128)])
    assert logged.last_step == 13
    assert [logged.samples_of(step) for step in (1, 10, 11, 12, 13, 14)] == [
        (0, 8), (72, 8), (80, 16), (96, 16), (112, 16), (128, 16),
    ]  # fmt: skip
    for step in range(1, 20):
        first, size = logged.samples_of(step)
        assert [logged.step_of(first + row) for row in (0, size - 1)] == [(step, 0), (step, size - 1)]


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_same_contents_for_any_hosts_and_threads(stream, expected, hosts, num_threads):
    shares = [
        take(stream, len(SPANS), first_sample=0, process_index=host, process_count=hosts, num_threads=num_threads)
        for host in range(hosts)
    ]
    assert_steps(shares, expected)


@pytest.mark.parametrize("seed", range(6))
def test_restarts_and_changes_of_hosts_anywhere(stream, expected, seed):
    """Random stretches of a run, each on another number of hosts: the state handed on is the samples consumed."""
    rng = random.Random(seed)
    step = consumed = 0
    while step < len(SPANS):
        hosts, count = rng.choice([1, 2, 4, 8]), min(rng.randint(1, 7), len(SPANS) - step)
        shares, states = [], set()
        for host in range(hosts):
            with batches(stream, global_batch_size=SIZE, stages=STAGES, first_sample=consumed, process_index=host,
                         process_count=hosts, num_threads=rng.choice([1, 2])) as source:  # fmt: skip
                shares.append([next(source) for _ in range(count)])
                states.add(source.samples_consumed)
        assert_steps(shares, expected[step : step + count])
        (consumed,) = states
        step += count


def test_hosts_must_divide_every_stage(stream):
    with pytest.raises(ConfigError, match="global_batch_size 8 .* multiple of 16"):
        batches(stream, global_batch_size=16, stages=STAGES, first_sample=0, process_count=16)
