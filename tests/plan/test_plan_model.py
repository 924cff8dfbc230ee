"""The formulas of work, links and seconds; published runs; the search and the ways to fit, with a fake compiler."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxcoder_configs.starcoder import starcoderbase, starcoderbase_1b

from jaxcoder.config import MeshConfig
from jaxcoder.errors import ConfigError, JaxcoderError
from jaxcoder.models.flops import num_parameters, training_flops_per_token
from jaxcoder.plan.calibration import calibration, comparisons
from jaxcoder.plan.compile import Compiled
from jaxcoder.plan.hlo import Collective
from jaxcoder.plan.make import find_fit, make_plan, prepare
from jaxcoder.plan.published import LACKING, RUNS
from jaxcoder.plan.ranking import lines_of_ranking, spearman
from jaxcoder.plan.report import as_dict, lines_of
from jaxcoder.plan.search import accuracy, lines_of_search, search
from jaxcoder.plan.time_model import axis_bandwidths, step_time
from jaxcoder.plan.topology import parse_topology
from jaxcoder.plan.workload import DecoderShape, Layout, work_of
from jaxcoder.train.xla_options import accepted, bundles_for, options_for

POWERS = st.sampled_from([1, 2, 4, 8])
DECODERS = st.builds(
    DecoderShape,
    num_layers=st.integers(1, 80), embed_dim=st.integers(1, 80).map(lambda n: 128 * n), num_heads=POWERS,
    num_kv_heads=st.just(8), head_dim=st.just(128), mlp_dim=st.integers(1, 80).map(lambda n: 512 * n),
    vocab_size=st.just(32000), seq_len=st.sampled_from([1024, 8192]), mlp_matrices=st.sampled_from([2, 3]),
    tied=st.booleans(),
)  # fmt: skip
LAYOUTS = st.builds(
    Layout,
    mesh=st.builds(MeshConfig, data=POWERS, fsdp=POWERS, tensor=POWERS),
    batch=st.sampled_from([512, 1024]),
    microbatches=POWERS,
    recomputed=st.sets(st.sampled_from(["qkv", "attention", "out", "mlp_in"])).map(frozenset),
)


def test_flops_are_those_of_the_model():
    model = starcoderbase().model
    decoder = DecoderShape.of(model)
    assert decoder.model_flops() == training_flops_per_token(model, 8192)
    assert decoder.weights == pytest.approx(num_parameters(model), rel=0.005)  # biases, norms and positions apart


@given(DECODERS, LAYOUTS)
def test_work_is_divided_and_not_lost(decoder, layout):
    """On any mesh all devices together do the work of one."""
    one = dataclasses.replace(layout, mesh=MeshConfig(data=1, fsdp=1, tensor=1))
    mesh = layout.mesh
    devices = mesh.data * mesh.fsdp * mesh.tensor
    alone, spread = work_of(decoder, one), work_of(decoder, layout)
    assert spread.matmul_flops * devices == pytest.approx(alone.matmul_flops)
    assert [devices * flops for flops in spread.attention_flops] == pytest.approx(alone.attention_flops)
    assert alone.transfers == {}
    assert spread.transfers.keys() == {axis for axis in ("data", "fsdp", "tensor") if getattr(mesh, axis) > 1}
    more = dataclasses.replace(layout, recomputed=layout.recomputed | {"mlp_in", "attention"})
    assert work_of(decoder, more).matmul_flops >= spread.matmul_flops


@given(DECODERS, LAYOUTS, st.sampled_from(["v5p:8x8x8", "v5e:16x16", "tpu7x:4x4x4", "h100:64x8", "a100:1x8"]))
@settings(max_examples=200)
def test_the_expected_time_lies_between_its_bounds(decoder, layout, name):
    time = step_time(work_of(decoder, layout), parse_topology(name), layout.mesh, "flash_tpu")
    assert 0 < time.overlapped <= time.expected * (1 + 1e-9)
    assert time.expected <= time.sequential * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "slices", "mesh", "expected"),
    [
        ("v5p:4x4x4", 1, (1, 64, 1), {"fsdp": 600}),  # three closed sides, both ways
        ("v5p:4x4x4", 1, (1, 16, 4), {"tensor": 200, "fsdp": 400}),
        ("v5e:16x16", 1, (1, 256, 1), {"fsdp": 200}),
        ("v5e:2x4", 1, (1, 8, 1), {"fsdp": 100}),  # open sides: one way each
        ("v5e:16x16", 1, (1, 64, 4), {"tensor": 50, "fsdp": 150}),
        ("v5e:16x16", 8, (8, 256, 1), {"fsdp": 200, "data": 3.125}),
        ("h100:1x8", 1, (1, 8, 1), {"fsdp": 450}),
        ("h100:4x8", 1, (1, 32, 1), {"fsdp": 400}),  # eight cards of 50
        ("h100:4x8", 1, (4, 1, 8), {"tensor": 450, "data": 50}),
        ("h100:2x8", 1, (1, 1, 16), {"tensor": 400}),
    ],
)
def test_links(name, slices, mesh, expected):
    """GB/s of the data sheets, before what is lost of them."""
    topology = parse_topology(name, slices)
    found = axis_bandwidths(topology, MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]))
    lost = 0.9 if topology.platform == "tpu" else 0.8
    assert found == pytest.approx({axis: gb * 1e9 * lost for axis, gb in expected.items()})


def test_an_axis_over_a_closed_3d_torus_sends_twice_the_bytes():
    topology, work = parse_topology("v5p:4x4x4"), work_of(DecoderShape.of(starcoderbase().model), _layout(1, 64, 1))
    ring = step_time(work, topology, MeshConfig(data=1, fsdp=64, tensor=1), "flash_tpu")
    sent = work.transfers["fsdp"] / axis_bandwidths(topology, MeshConfig(data=1, fsdp=64, tensor=1))["fsdp"]
    assert ring.interconnect["fsdp"] == pytest.approx(2 * sent)
    assert ring.expected == pytest.approx(ring.compute + 2 * sent)


def _layout(data: int, fsdp: int, tensor: int) -> Layout:
    return Layout(mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor), batch=512)


# --- published runs --------------------------------------------------------------------------------------------------


def test_published_runs_have_the_parameters_of_their_names():
    """Their parameters are what their names say, and every one has a source."""
    billions = {"GPT 16B": 15.8, "GPT 32B": 31.7, "GPT 64B": 62.8, "Llama 3.1 8B": 8.0, "Llama 3.1 70B": 70.6,
                "Llama 2 70B": 69.0, "Llama 2 7B": 6.7, "Mistral 7B": 7.2}  # fmt: skip
    for run in RUNS:
        name = next(name for name in billions if run.name.startswith(name))
        assert run.decoder.weights == pytest.approx(billions[name] * 1e9, rel=0.01)
        mesh, topology = run.layout.mesh, parse_topology(run.topology, run.num_slices)
        assert mesh.data * mesh.fsdp * mesh.tensor == topology.devices
        assert run.source and (run.seconds is None) != (run.tflops is None)
    assert all(missing for _, _, missing in LACKING)


def test_predictions_are_near_published_runs():
    found = comparisons()
    kinds = {comparison.topology.kind for comparison in found}
    assert len(found) >= 4 and len({kind for kind in kinds if kind.startswith("TPU")}) >= 2
    assert any(kind.startswith("NVIDIA") for kind in kinds)
    for comparison in found:
        assert 0.6 < comparison.ratio < 1.15, comparison.run.name
        assert 0.3 < comparison.published_mfu < 0.75, comparison.run.name
    tpu, cuda = calibration("tpu"), calibration("cuda")
    assert tpu.range.fastest < 1 < tpu.range.slowest and str(tpu).endswith("models")
    assert cuda.range is None and str(cuda) == "not calibrated: 2 published runs of 1 model"


def test_gpu_plans_have_no_range_and_show_the_original():
    config = dataclasses.replace(starcoderbase(), mesh=MeshConfig(fsdp=16, tensor=4))
    topology = parse_topology("h100:8x8")
    plan = make_plan(prepare(config, topology), topology, None)
    text = " ".join("\n".join(lines_of(plan)).split())
    assert "not calibrated: 2 published runs of 1 model" in text and plan.seconds.keys() == {"expected"}
    assert "original 909 tokens/s a GPU on a100:64x8 (published)" in text
    assert as_dict(plan)["seconds"]["slow"] is None


def test_a_published_log_with_both_units_agrees():
    """MaxText's log of Llama 3.1 8B: 4.546 s and 7,207.336 tokens a second and chip."""
    run = next(run for run in RUNS if run.name.startswith("Llama 3.1 8B"))
    assert run.layout.batch * run.decoder.seq_len / run.seconds / 256 == pytest.approx(7207.336, rel=1e-3)


# --- search and ways to fit ------------------------------------------------------------------------------------------


def compiler(gib: float = 10.0, fits=lambda config: True):
    """A fake compiler with the same figures for every layout, and the runs it compiled."""
    asked = []

    def compile_one(config, topology) -> Compiled:
        asked.append(config)
        common = dict(lower_seconds=1.0, compile_seconds=60.0, state_bytes=2**30, batch_bytes=0)
        if not fits(config):
            return Compiled(fits=False, needed_bytes=200 * 2**30, limit_bytes=95 * 2**30, **common)
        sent = Collective(kind="all-gather", axes=("fsdp",), asynchronous=True, count=1, bytes=1e9)
        return Compiled(
            fits=True, temporary_bytes=int((gib - 1) * 2**30), output_bytes=0, code_bytes=0, matmul_flops=1e15,
            collectives=(sent,), kernels={"flash_forward": 1}, **common,
        )  # fmt: skip

    return compile_one, asked


@pytest.fixture
def base():
    topology = parse_topology("v5p:2x2x2")
    return prepare(starcoderbase_1b(), topology), topology


def test_search_compiles_the_first_that_fit(base):
    compile_one, asked = compiler(fits=lambda config: config.compute.remat != "none")
    found = search(*base, compile_one, minutes=1)
    assert len(asked) >= 3 and sum(plan.fits for plan in found.compiled) == 3
    assert asked == [plan.config for plan in found.ranked[: len(asked)]]
    times = [plan.time.expected for plan in found.ranked]
    assert times == sorted(times) and found.best in found.compiled
    text = "\n".join(lines_of_search(found))
    assert "of the compiler's" in accuracy(found) and "best" in text and "Compiled:" in text


def test_search_without_time(base):
    compile_one, asked = compiler()
    found = search(*base, compile_one, minutes=0)
    assert asked == [] and found.out_of_time and found.best is found.ranked[0]
    assert "--minutes allows more" in "\n".join(lines_of_search(found))


def test_search_where_the_compiler_fails(base):
    def compile_one(config, topology):
        raise JaxcoderError("it failed.")

    found = search(*base, compile_one, minutes=1)
    assert len(found.failures) == 3 and found.compiled == []


def words(lines) -> str:
    return " ".join("\n".join(lines).split())


def test_search_that_compiles_everything():
    """The compiler's order is the reverse of the model's here, and some predictions of what fits are wrong."""
    topology = parse_topology("v5e:2x2")
    run = dataclasses.replace(starcoderbase_1b(), global_batch_size=4)
    first = search(run, topology, None, minutes=1).ranked
    place = {plan.config: i for i, plan in enumerate(first)}

    def compile_one(config, topology) -> Compiled:
        answer = compiler()[0](config, topology)
        if config == first[0].config:
            return dataclasses.replace(answer, fits=False, temporary_bytes=None, needed_bytes=17 * 2**30)
        return dataclasses.replace(answer, estimated_cycles=1e9 * (len(first) + 1 - place.get(config, len(first))))

    found = search(run, topology, compile_one, minutes=1, compile_all=True)
    assert len(found.compiled) == found.candidates > len(first)
    assert found.best.config not in {plan.config for plan in first}  # the cycles are the lowest there
    text = words(lines_of_ranking([plan for plan in found.compiled if plan.config in place]))
    assert "rank correlation of modelled and compiled times -1.00" in text
    assert "do not contain the compiler's best" in text and "predicted to fit, but does not: 1" in text
    everything = words(lines_of_ranking(found.compiled))
    wrong = sum(not plan.fits for plan in search(run, topology, None, minutes=1).ranked)
    unlikely = found.candidates - len(first) + wrong
    assert f"predicted not to fit, but does: {unlikely}" in everything


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 2, 3], [10, 20, 40], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 1, 2], [1, 2, 3], 3**0.5 / 2)],
)
def test_correlation_of_ranks(first, second, expected):
    assert spearman(first, second) == pytest.approx(expected)


def test_search_replaces_an_invalid_mesh():
    """512 windows on 1,024 devices: not along `fsdp` alone, but with `tensor`."""
    wide = parse_topology("v5p:8x8x16")
    assert all(plan.config.mesh.tensor > 1 for plan in search(starcoderbase(), wide, None, minutes=1).ranked)
    with pytest.raises(ConfigError, match="global_batch_size 512 is not a multiple"):
        search(starcoderbase(), parse_topology("v5p:4x4x12"), None, minutes=1)


def test_dropout_takes_time_in_flash_tpu():
    layout, decoder, topology = _layout(8, 64, 1), DecoderShape.of(starcoderbase().model), parse_topology("v5p:8x8x8")
    without = step_time(work_of(decoder, layout), topology, layout.mesh, "flash_tpu").attention
    dropping = work_of(decoder, dataclasses.replace(layout, attention_dropout=True))
    longer = step_time(dropping, topology, layout.mesh, "flash_tpu").attention
    assert longer == pytest.approx(without * (1.45 + 2.5 * 1.07) / 3.5)
    v6e = parse_topology("v6e:16x16")
    assert (
        step_time(dropping, v6e, layout.mesh, "flash_tpu").attention
        > 1.5 * step_time(work_of(decoder, layout), v6e, layout.mesh, "flash_tpu").attention
    )
    assert step_time(dropping, topology, layout.mesh, "splash").attention > 0
    assert Layout.of(prepare(starcoderbase(), topology)).attention_dropout


@pytest.mark.parametrize(
    ("name", "mesh", "exposed"),  # relative to the seconds of the formula's bytes
    [
        ("v4:4x4x8", (8, 16, 1), 1 / 3), ("v5e:4x4", (1, 16, 1), 1 / 3), ("v6e:4x4", (1, 16, 1), 1.0),
        ("v5e:16x16", (1, 256, 1), 2 / 3), ("v6e:16x16", (1, 256, 1), 4 / 3), ("v5p:4x4x8", (8, 16, 1), 1.0),
        ("v5e:16x16", (2, 128, 1), 1 / 3),
        ("v4:2x2x2", (1, 8, 1), 2 / 3), ("v5p:4x4x4", (1, 64, 1), 2.0),
        ("h100:2x8", (1, 16, 1), 0.0),
    ],
)  # fmt: skip
def test_exposed_transfers_of_jaxcoders_step(name, mesh, exposed):
    """All-gathers overlap with matmuls on v4 and v5e; gradients of 24 rows a chip are all-reduced."""
    topology, layout = parse_topology(name), _layout(*mesh)
    work = work_of(DecoderShape.of(starcoderbase().model), layout)
    time = step_time(work, topology, layout.mesh, "flash_tpu", is_jaxcoder=True)
    sent = work.transfers["fsdp"] / axis_bandwidths(topology, layout.mesh)["fsdp"]
    overlapped = time.interconnect["fsdp"] if time.overlapped_seconds is None else time.overlapped_seconds
    assert (time.interconnect["fsdp"] - overlapped) / sent == pytest.approx(exposed)


def test_search_where_nothing_fits():
    topology = parse_topology("v5e:2x2")
    run = prepare(dataclasses.replace(starcoderbase(), global_batch_size=4), topology)
    found = search(run, topology, None, minutes=1)
    assert found.best is None and "no layout of this run fits" in " ".join("\n".join(lines_of_search(found)).split())


def test_attempts_to_make_it_fit(base):
    config, topology = base
    compile_one, asked = compiler(fits=lambda config: config.compute.remat == "block")
    plan = make_plan(config, topology, compile_one(config, topology))
    assert not plan.fits and plan.peak_bytes == 200 * 2**30
    tried, found = find_fit(plan, compile_one)
    assert found and tried[-1][1].fits and "--compute.remat block" in tried[-1][0]
    assert all(not attempt.fits for _, attempt in tried[:-1]) and len(tried) <= 4
    assert f"with {tried[-1][0]} it does, and should take" in words(lines_of(plan, tried))


def test_heads_of_64_leave_half_of_a_matrix_unit_idle():
    topology, layout, decoder = parse_topology("v4:2x2x2"), _layout(1, 8, 1), DecoderShape.of(starcoderbase_1b().model)
    wide = step_time(work_of(decoder, layout), topology, layout.mesh, "flash_tpu")
    narrow = dataclasses.replace(decoder, num_heads=32, head_dim=64)
    assert step_time(work_of(narrow, layout), topology, layout.mesh, "flash_tpu").attention == pytest.approx(
        2 * wide.attention
    )


# --- XLA options -----------------------------------------------------------------------------------------------------


def test_options_are_for_chips_and_have_sources():
    kinds = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H100 80GB HBM3")
    for kind in kinds:
        bundles = bundles_for(kind)
        assert bundles and all(bundle.why and bundle.source for bundle in bundles)
        names = [name for bundle in bundles for name in bundle.options]
        assert len(names) == len(set(names)) and set(names) == options_for(kind).keys()
    assert options_for("cpu") == {}


def test_unknown_options_are_left_out():
    def compile_with(options):
        unknown = next((name for name in options if name.startswith("old")), None)
        if unknown:
            raise ValueError(f"INVALID_ARGUMENT: No such compile option: '{unknown}'")

    assert accepted({"old_a": 1, "good": True, "old_b": 2}, compile_with) == {"good": True}

    def fails(options):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        accepted({"good": True}, fails)
