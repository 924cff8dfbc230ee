"""Which corpus sample i comes from, and which of that corpus's samples it is: by arithmetic, without table or state.

Between two changes (a stage with other weights begins, a corpus reaches its cap) the weights are constant, and a binary
tree over the corpora shares the samples out: at every node, of the first n samples, the nearest whole number to
n * share goes left and the others right. So how many samples a corpus gave up to i, and which i its j-th sample was,
take a few integer operations for each level of the tree; a corpus is never further from its exact share than half a
sample for each level. Weights are read as the decimal fractions that they are written as and nothing is rounded, so a
run of any length has exactly these shares.

When a corpus reaches its cap, its weight becomes 0 and the others take its share in proportion to their own.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from jaxcoder.config.schema import Corpus, DataConfig, Stage
from jaxcoder.errors import ConfigError


class Phase(NamedTuple):
    """Weights that hold from sample `from_sample` on, one for each corpus."""

    from_sample: int
    weights: tuple[Fraction, ...]


def make_mixture(data: DataConfig, windows_per_epoch: Sequence[int], num_tokens: Sequence[int]) -> "Mixture":
    """The mixture of a DataConfig (one store if it names no corpora) for corpora of these sizes.

    Raises ConfigError for a cap that allows no window.
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
        if not phases or phases[-1].weights != shares:  # a stage that only changes the batch size goes on as it was
            phases.append(Phase(stage.from_sample, shares))
    return Mixture(phases, caps)


class _Interval(NamedTuple):
    """Samples [start, stop) share one tree; `given` is what each corpus gave before them. stop None: without end."""

    start: int
    stop: int | None
    tree: "_Tree"
    given: tuple[int, ...]


class Mixture:
    """The rule for `phases` (sorted, the first from sample 0) and `caps` (most samples of each corpus, None: no cap).

    num_samples: samples after which every corpus with a weight has reached its cap; None if that never happens.
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
                f"The mixture has {interval.stop} samples and sample {index} was asked for: raise max_epochs of a "
                "corpus, or train for fewer steps."
            )
        corpus, number = interval.tree.source(index - interval.start)
        return corpus, interval.given[corpus] + number

    def index_of(self, corpus: int, number: int) -> int | None:
        """The sample that is number `number` of `corpus`: the inverse of `source`; None if it never comes."""
        for interval in reversed(self._intervals):
            if number >= interval.given[corpus]:
                index = interval.tree.index_of(corpus, number - interval.given[corpus])
                if index is None or (interval.stop is not None and interval.start + index >= interval.stop):
                    return None
                return interval.start + index
        return None

    def counts(self, index: int) -> tuple[int, ...]:
        """How many of the first `index` samples each corpus gives."""
        interval = self._intervals[bisect_right(self._starts, index) - 1]
        last = index if interval.stop is None else min(index, interval.stop)
        return tuple(a + b for a, b in zip(interval.given, interval.tree.counts(last - interval.start), strict=True))


def exact(weight: float) -> Fraction:
    """The decimal fraction that a float is written as: 0.1 is one tenth."""
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
                w if room is None or room > 0 else Fraction(0) for w, room in zip(phase.weights, left, strict=True)
            ]
            if not any(weights):
                return intervals, start
            tree = _Tree(weights)
            stop = min((start + n for n in tree.exhausted(left)), default=None)
            if end is not None:
                stop = end if stop is None else min(stop, end)
            intervals.append(_Interval(start, stop, tree, given))
            if stop is None:
                return intervals, None
            given = tuple(a + b for a, b in zip(given, tree.counts(stop - start), strict=True))
            start = stop
    raise AssertionError("the last phase has no end")


class _Node(NamedTuple):
    """Of the first n samples that come here, round(n * share) go left, halves rounded up."""

    share: Fraction
    left: "_Node | int"
    right: "_Node | int"

    def num_left(self, n: int) -> int:
        a, b = self.share.numerator, self.share.denominator
        return (2 * n * a + b) // (2 * b)

    def from_left(self, j: int) -> int:
        """Which sample here is number j on the left: the smallest n with num_left(n + 1) > j."""
        a, b = self.share.numerator, self.share.denominator
        return -((-(2 * j + 1) * b) // (2 * a)) - 1

    def from_right(self, j: int) -> int:
        a, b = self.share.numerator, self.share.denominator
        return (2 * j + 1) * b // (2 * (b - a))


class _Tree:
    """The corpora with a weight, as leaves of a binary tree; the lightest two are joined first, so that corpora with
    large shares, where an error counts most, lie near the root."""

    def __init__(self, weights: Sequence[Fraction]):
        self._num_corpora = len(weights)
        nodes: list[tuple[Fraction, _Node | int]] = [(weight, c) for c, weight in enumerate(weights) if weight > 0]
        while len(nodes) > 1:
            nodes.sort(key=lambda node: node[0])  # stable: ties stay in order
            (light, a), (heavy, b), *rest = nodes
            nodes = [*rest, (light + heavy, _Node(heavy / (light + heavy), b, a))]
        self._root = nodes[0][1]
        self._paths: dict[int, list[tuple[_Node, bool]]] = {}
        self._note_paths(self._root, [])

    def _note_paths(self, node: "_Node | int", path: list[tuple[_Node, bool]]) -> None:
        if isinstance(node, int):
            self._paths[node] = path
            return
        self._note_paths(node.left, [*path, (node, True)])
        self._note_paths(node.right, [*path, (node, False)])

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

    def exhausted(self, left: Sequence[int | None]) -> list[int]:
        """For each capped corpus, the number of samples after which it has given all that it may."""
        return [self.index_of(c, room - 1) + 1 for c, room in enumerate(left) if room is not None and c in self._paths]
