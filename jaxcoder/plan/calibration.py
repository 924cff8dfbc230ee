"""The time model compared with published runs: predicted over published step time for each, and their range.

The efficiencies of time_model.py were not fitted to these runs, so the ratios show how far a prediction may be off for
a run that is tuned as well as these were.
"""

from dataclasses import dataclass, replace
from functools import cache

from jaxcoder.config import MeshConfig, RunConfig
from jaxcoder.formatting import plural
from jaxcoder.models.flops import num_parameters
from jaxcoder.plan.published import RUNS, STARCODER, PublishedRun
from jaxcoder.plan.time_model import StepTime, step_time
from jaxcoder.plan.topology import Topology, parse_topology
from jaxcoder.plan.workload import DecoderShape, Layout, work_of

MIN_MODELS = 3
"""Fewest different models whose ratios give a range."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    run: PublishedRun
    topology: Topology
    published: float
    """Seconds per step."""
    predicted: StepTime

    @property
    def ratio(self) -> float:
        """Predicted over published: above 1 the model is too slow."""
        return self.predicted.expected / self.published

    @property
    def published_mfu(self) -> float:
        """In the convention of models/flops.py: causal attention, recomputation not counted."""
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
    """Published over predicted seconds, of the fastest and the slowest run relative to its prediction."""

    fastest: float
    slowest: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How well the time model is tested on a platform. range: None with fewer than MIN_MODELS models."""

    runs: int
    models: int
    range: Range | None

    def __str__(self) -> str:
        count = f"{plural(self.runs, 'published run')} of {plural(self.models, 'model')}"
        return count if self.range else f"not calibrated: {count}"


@cache
def calibration(platform: str) -> Calibration:
    """platform: "tpu" or "cuda"."""
    found = [comparison for comparison in comparisons() if comparison.topology.platform == platform]
    factors = [1 / comparison.ratio for comparison in found]
    models = len({comparison.run.decoder for comparison in found})
    factor_range = Range(fastest=min(factors), slowest=max(factors)) if models >= MIN_MODELS else None
    return Calibration(runs=len(found), models=models, range=factor_range)


def starcoder_prediction(config: RunConfig) -> float | None:
    """Predicted tokens/s per GPU of BigCode's own run (`STARCODER`); None unless `config` has that model."""
    if num_parameters(config.model) != STARCODER.parameters:
        return None
    # Pipeline stages are not modelled: the original's 4 stages count as weight sharding.
    original = replace(config, mesh=MeshConfig(data=8, fsdp=16, tensor=4), global_batch_size=512, microbatch_size=128)
    topology = parse_topology(STARCODER.topology)
    work = work_of(DecoderShape.of(config.model), Layout.of(original))
    seconds = step_time(work, topology, original.mesh, "flash").expected
    return 512 * config.model.max_seq_len / seconds / topology.chips
