"""The time model beside published runs: predicted over published for each, and the range that follows.

Nothing is fitted to these runs: the efficiencies of time_model.py have other sources. What the ratios come to is
therefore how far a plan may be off for a run that is tuned as well as those were.
"""

from dataclasses import dataclass, replace
from functools import cache

from jaxcoder.plan.published import RUNS, PublishedRun
from jaxcoder.plan.time_model import StepTime, step_time
from jaxcoder.plan.topology import Topology, parse_topology
from jaxcoder.plan.workload import work_of


@dataclass(frozen=True, kw_only=True)
class Comparison:
    run: PublishedRun
    topology: Topology
    published: float
    """Seconds a step."""
    predicted: StepTime

    @property
    def ratio(self) -> float:
        """Predicted over published: above 1 the model is too slow."""
        return self.predicted.expected / self.published

    @property
    def published_mfu(self) -> float:
        """In our convention: causal attention, nothing recomputed."""
        decoder, chips = self.run.decoder, self.topology.chips
        tokens = self.run.layout.batch * decoder.seq_len
        peak = self.topology.chip.peak_flops * self.topology.chip.devices_per_chip
        return tokens * decoder.model_flops() / chips / self.published / peak


@cache
def comparisons() -> tuple[Comparison, ...]:
    found = []
    for run in RUNS:
        topology = parse_topology(run.topology, run.num_slices)
        topology = replace(topology, network_bandwidth=run.network_bandwidth)
        time = step_time(work_of(run.decoder, run.layout), topology, run.layout.mesh, run.attention)
        published = run.step_seconds(topology.chips)
        found.append(Comparison(run=run, topology=topology, published=published, predicted=time))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Published over predicted, of the runs on one platform: what a prediction is multiplied by."""

    fastest: float
    slowest: float
    runs: int


@cache
def calibrated_range(platform: str) -> Range:
    factors = [1 / found.ratio for found in comparisons() if found.topology.platform == platform]
    return Range(fastest=min(factors), slowest=max(factors), runs=len(factors))
