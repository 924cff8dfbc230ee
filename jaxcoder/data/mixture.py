"""The mixture of corpora: sample i -> (corpus, its j-th sample), computed without a table or state, and invertible.

Between two changes (a stage with other weights, a corpus at its cap) the weights are constant, and a binary tree over
the corpora divides the samples: at every node, round(n * share) of the first n samples go left and the others right.
The number of samples of a corpus up to i, and the i of its j-th sample, take a few integer operations per level of the
tree; a corpus deviates from its exact share by at most half a sample per level. Weights are exact decimal fractions, so
the shares hold for a run of any length.

When a corpus reaches its cap, its weight becomes 0 and the others get its share in proportion to their own.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from jaxcoder.config.schema import Corpus, DataConfig, Stage
from jaxcoder.errors import ConfigError


class Phase(NamedTuple):
    """Weights of all corpora from sample `from_sample` on."""

    from_sample: int
    weights: tuple[Fraction, ...]


def make_mixture(data: DataConfig, windows_per_epoch: Sequence[int], num_tokens: Sequence[int]) -> "Mixture":
    """The mixture of a DataConfig (one store if it names no corpora) for corpora of these sizes.

    Raises ConfigError for a cap of less than one window.
    """
    corpora = data.corpora or [Corpus(store=data.store)] * len(num_tokens)
    caps: list[int | None] = []
    for number, (corpus, windows) in enumerate(zip(corpora, windows_per_epoch, strict=True)):
        cap = None if corpus.max_epochs is None else int(exact(corpus.max_epochs) * windows)
        if cap == 0:
            raise ConfigError(
                f"data.corpora.{number}.max_epochs is {corpus.max_epochs}, which is less than one window of the "
                f"{windows} of {corpus.store}: raise it, or leave the corpus out."
            )
        caps.append(cap)
    own = [size if corpus.weight is None else corpus.weight for corpus, size in zip(corpora, num_tokens, strict=True)]
    phases: list[Phase] = []
    for stage in data.stages or [Stage(from_sample=0)]:
        weights = [exact(weight) for weight in stage.weights or own]
        shares = tuple(weight / sum(weights) for weight in weights)
        if not phases or phases[-1].weights != shares:  # a stage may change the batch size only
            phases.append(Phase(stage.from_sample, shares))
    return Mixture(phases, caps)


class _Interval(NamedTuple):
    """Samples [start, stop) of one tree; stop None: no end. given: number of earlier samples of each corpus."""

    start: int
    stop: int | None
    tree: "_Tree"
    given: tuple[int, ...]


class Mixture:
    """The mixture of `phases` (sorted, the first from sample 0) with `caps` (maximum samples of each corpus, or None).

    num_samples: samples until every corpus with a weight has reached its cap; None without such an end.
    """

    def __init__(self, phases: Sequence[Phase], caps: Sequence[int | None]):
        self._intervals, self.num_samples = _intervals(phases, caps)
        self._starts = [interval.start for interval in self._intervals]
        self.num_corpora = len(caps)

    def source(self, index: int) -> tuple[int, int]:
        """(corpus, number of the sample within it) of sample `index`. ConfigError beyond `num_samples`."""
        interval = self._intervals[bisect_right(self._starts, index) - 1]
        if interval.stop is not None and index >= interval.stop:
            raise ConfigError(
                f"The mixture has {interval.stop} samples, so there is no sample {index}: raise max_epochs of a "
                "corpus, or train for fewer steps."
            )
        corpus, number = interval.tree.source(index - interval.start)
        return corpus, interval.given[corpus] + number

    def index_of(self, corpus: int, number: int) -> int | None:
        """The inverse of `source`: the index of sample `number` of `corpus`; None if it does not occur."""
        for interval in reversed(self._intervals):
            if number >= interval.given[corpus]:
                index = interval.tree.index_of(corpus, number - interval.given[corpus])
                if index is None or (interval.stop is not None and interval.start + index >= interval.stop):
                    return None
                return interval.start + index
        return None

    def counts(self, index: int) -> tuple[int, ...]:
        """Number of samples of each corpus among the first `index` samples."""
        interval = self._intervals[bisect_right(self._starts, index) - 1]
        last = index if interval.stop is None else min(index, interval.stop)
        return tuple(a + b for a, b in zip(interval.given, interval.tree.counts(last - interval.start), strict=True))


def exact(weight: float) -> Fraction:
    """The exact decimal fraction of a float's shortest representation: 0.1 is one tenth."""
    return Fraction(repr(float(weight)))


def _intervals(phases: Sequence[Phase], caps: Sequence[int | None]) -> tuple[list[_Interval], int | None]:
    intervals: list[_Interval] = []
    given = (0,) * len(caps)
    ends = [phase.from_sample for phase in phases[1:]]
    for phase, end in zip(phases, [*ends, None], strict=True):
        start = phase.from_sample
        while end is None or start < end:
            left = [None if cap is None else cap - done for cap, done in zip(caps, given, strict=True)]
            weights = [
                w if rest is None or rest > 0 else Fraction(0) for w, rest in zip(phase.weights, left, strict=True)
            ]
            if not any(weights):
                return intervals, start
            tree = _Tree(weights)
            stop = min((start + n for n in tree.samples_until_cap(left)), default=None)
            if end is not None:
                stop = end if stop is None else min(stop, end)
            intervals.append(_Interval(start, stop, tree, given))
            if stop is None:
                return intervals, None
            given = tuple(a + b for a, b in zip(given, tree.counts(stop - start), strict=True))
            start = stop
    raise AssertionError("the last phase has no end")


class _Node(NamedTuple):
    """Of the first n samples at this node, round(n * share) go left (halves are rounded up)."""

    share: Fraction
    left: "_Node | int"
    right: "_Node | int"

    def num_left(self, n: int) -> int:
        a, b = self.share.numerator, self.share.denominator
        return (2 * n * a + b) // (2 * b)

    def from_left(self, j: int) -> int:
        """The inverse of num_left: the smallest n with num_left(n + 1) > j."""
        a, b = self.share.numerator, self.share.denominator
        return -((-(2 * j + 1) * b) // (2 * a)) - 1

    def from_right(self, j: int) -> int:
        a, b = self.share.numerator, self.share.denominator
        return (2 * j + 1) * b // (2 * (b - a))


class _Tree:
    """A binary tree whose leaves are the corpora with a weight. The two lightest nodes are joined first (as in Huffman
    coding), so that corpora with large shares have short paths and small deviations."""

    def __init__(self, weights: Sequence[Fraction]):
        self._num_corpora = len(weights)
        nodes: list[tuple[Fraction, _Node | int]] = [(weight, c) for c, weight in enumerate(weights) if weight > 0]
        while len(nodes) > 1:
            nodes.sort(key=lambda node: node[0])  # stable: ties stay in order
            (light, a), (heavy, b), *rest = nodes
            nodes = [*rest, (light + heavy, _Node(heavy / (light + heavy), b, a))]
        self._root = nodes[0][1]
        self._paths: dict[int, list[tuple[_Node, bool]]] = {}
        self._add_paths(self._root, [])

    def _add_paths(self, node: "_Node | int", path: list[tuple[_Node, bool]]) -> None:
        if isinstance(node, int):
            self._paths[node] = path
            return
        self._add_paths(node.left, [*path, (node, True)])
        self._add_paths(node.right, [*path, (node, False)])

    def source(self, n: int) -> tuple[int, int]:
        node = self._root
        while not isinstance(node, int):
            left = node.num_left(n)
            goes_left = node.num_left(n + 1) > left
            node, n = (node.left, left) if goes_left else (node.right, n - left)
        return node, n

    def index_of(self, corpus: int, j: int) -> int | None:
        if corpus not in self._paths:
            return None
        for node, is_left in reversed(self._paths[corpus]):
            j = node.from_left(j) if is_left else node.from_right(j)
        return j

    def counts(self, n: int) -> tuple[int, ...]:
        result = [0] * self._num_corpora
        for corpus, path in self._paths.items():
            count = n
            for node, is_left in path:
                left = node.num_left(count)
                count = left if is_left else count - left
            result[corpus] = count
        return tuple(result)

    def samples_until_cap(self, left: Sequence[int | None]) -> list[int]:
        """For each corpus with a cap, the number of samples after which it is reached. left: samples until the cap."""
        last = (self.index_of(c, rest - 1) for c, rest in enumerate(left) if rest is not None)
        return [index + 1 for index in last if index is not None]
