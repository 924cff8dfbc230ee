"""The loader: the same global batches for any hosts, threads and restarts; masks, positions and segments by hand."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxcoder.config.schema import DataConfig
from jaxcoder.data.loader import Batch, batches, make_batch
from jaxcoder.data.stream import SampleStream, SyntheticStream
from jaxcoder.errors import ConfigError, DataError

END, PAD = 0, 4


@pytest.fixture(scope="module")
def stream(store, tokenizer):
    return SampleStream(store, tokenizer, DataConfig(document_mask=True), seq_len=48, seed=3)


def take(stream, steps, **arguments):
    with batches(stream, **arguments) as source:
        return [next(source) for _ in range(steps)]


def assert_same(first: Batch, second: Batch):
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one, other) and one.dtype == other.dtype


def test_rows_are_the_samples_in_order(stream):
    for step, batch in enumerate(take(stream, 4, global_batch_size=8, first_sample=40)):
        for row in range(8):
            window = stream.sample(40 + step * 8 + row)
            assert np.array_equal(batch.inputs[row], window[:-1])
            assert np.array_equal(batch.targets[row], window[1:])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("num_threads", [1, 5])
def test_same_batches_for_any_hosts_and_threads(stream, hosts, num_threads):
    expected = take(stream, 5, global_batch_size=8, first_sample=0)
    shares = [
        take(
            stream,
            5,
            global_batch_size=8,
            first_sample=0,
            process_index=host,
            process_count=hosts,
            num_threads=num_threads,
        )
        for host in range(hosts)
    ]
    for step in range(5):
        joined = Batch(*(np.concatenate(arrays) for arrays in zip(*(share[step] for share in shares), strict=True)))
        assert_same(joined, expected[step])


def test_restart_anywhere_with_other_hosts_and_batch_sizes(stream):
    per_epoch = stream.windows_per_epoch
    begin = per_epoch - 20  # across the end of an epoch
    undisturbed = take(stream, 8, global_batch_size=8, first_sample=begin)
    with batches(stream, global_batch_size=8, first_sample=begin) as source:
        for step in range(3):
            assert_same(next(source), undisturbed[step])
        consumed = source.samples_consumed
    assert consumed == begin + 24
    share = {"global_batch_size": 8, "first_sample": consumed, "process_count": 2}
    halves = [take(stream, 5, process_index=host, **share) for host in (0, 1)]
    for step in range(5):
        assert np.array_equal(np.concatenate([half[step].inputs for half in halves]), undisturbed[3 + step].inputs)
    larger = take(stream, 1, global_batch_size=16, first_sample=consumed)[0]
    assert np.array_equal(larger.inputs, np.concatenate([batch.inputs for batch in undisturbed[3:5]]))


def test_counts_consumed_samples_of_all_hosts(stream):
    with batches(stream, global_batch_size=12, first_sample=100, process_index=1, process_count=3) as source:
        assert source.samples_consumed == 100
        for step, _ in zip(range(1, 4), source, strict=False):
            assert source.samples_consumed == 100 + 12 * step


def test_without_document_mask():
    windows = np.array([[7, END, 8, 9, PAD, PAD], [7, PAD, 8, 9, 5, 6]], np.int32)
    batch = make_batch(windows, end_id=END, pad_id=PAD, document_mask=False)
    assert np.array_equal(batch.inputs, windows[:, :-1]) and np.array_equal(batch.targets, windows[:, 1:])
    # padding is what stands at the right end, not an id: a pad token inside a document counts
    assert batch.loss_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]] and batch.loss_mask.dtype == np.float32
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4]] * 2 and batch.positions.dtype == np.int32
    assert batch.segment_ids is None
    counted = make_batch(windows, end_id=END, pad_id=PAD, document_mask=False, pad_in_loss=True)
    assert counted.loss_mask.all() and counted.loss_mask.dtype == np.float32


def test_with_document_mask():
    windows = np.array(
        [
            [7, 8, END, 9, END, END, 5, 6, 5],  # an empty document is one too
            [END, 7, 8, 9, 5, END, PAD, PAD, PAD],
            [1, 2, 3, END, 5, 6, 7, PAD, PAD],
        ],
        np.int32,
    )
    batch = make_batch(windows, end_id=END, pad_id=PAD, document_mask=True)
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 3, 4, 4], [1, 2, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 2, 2, 2, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 0, 0], [0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.loss_mask.tolist() == [[1] * 8, [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch.segment_ids.dtype == batch.positions.dtype == np.int32


def test_segments_of_real_windows(stream, tokenizer):
    for batch in take(stream, 10, global_batch_size=8, first_sample=0):
        for inputs, segments, positions in zip(batch.inputs, batch.segment_ids, batch.positions, strict=True):
            filled = segments > 0
            assert (np.diff(segments[filled]) >= 0).all() and not segments[~filled].any()
            new = np.flatnonzero(np.diff(segments[filled])) + 1
            assert (inputs[new - 1] == tokenizer.eos_id).all()  # a piece is one segment with its end
            assert set(np.flatnonzero(inputs[filled][:-1] == tokenizer.eos_id) + 1) == set(new)
            assert (positions[new] == 0).all() and positions.max() < 48


def test_synthetic_batches():
    source = SyntheticStream(vocab_size=100, seq_len=16, seed=0)
    batch = take(source, 1, global_batch_size=4, first_sample=0)[0]
    assert batch.inputs.shape == (4, 16) and batch.loss_mask.all() and batch.segment_ids is None


def test_hosts_that_cannot_share_the_batch(stream):
    with pytest.raises(ConfigError, match="global_batch_size 10 .* multiple of 4"):
        batches(stream, global_batch_size=10, first_sample=0, process_count=4)


def num_loader_threads():
    return sum("grain" in thread.name for thread in threading.enumerate())


def test_threads_end_with_the_context(stream):
    assert num_loader_threads() == 0
    with batches(stream, global_batch_size=8, first_sample=0) as source:
        next(source)
        assert num_loader_threads() > 0
    with pytest.raises(RuntimeError, match="out"), batches(stream, global_batch_size=8, first_sample=0) as source:
        next(source)
        raise RuntimeError("out of the loop")
    source.close()
    assert num_loader_threads() == 0


class _Damaged(SyntheticStream):
    def sample(self, index):
        if index == 9:
            raise DataError("The token store is damaged: copy it again.")
        return super().sample(index)


def test_errors_of_the_stream_come_out_as_they_are():
    with batches(_Damaged(vocab_size=100, seq_len=16, seed=0), global_batch_size=4, first_sample=0) as source:
        next(source), next(source)
        with pytest.raises(DataError, match="damaged"):
            next(source)


def test_a_process_that_forgets_to_close_ends():
    code = (
        "from jaxcoder.data.loader import batches\nfrom jaxcoder.data.stream import SyntheticStream\n"
        "next(batches(SyntheticStream(vocab_size=9, seq_len=8, seed=0), global_batch_size=4, first_sample=0))\n"
        "raise SystemExit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 3 and "Traceback" not in done.stderr
