"""`jaxcoder bench attention`: the arithmetic that stands for each schedule, the counts, the fit and what is said."""

import argparse
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcoder.benchmarks import (
    attention,
    attention_compile,
    attention_cycles,
    attention_documents,
    attention_fit,
    attention_matmul,
    attention_ours,
    attention_packed,
    attention_picture,
    attention_slots,
    attention_splash,
    attention_tokamax,
    attention_tune,
)
from jaxcoder.benchmarks.attention_cycles import Case, Estimate, Memory, estimate
from jaxcoder.cli.main import main


def ours(**changes) -> Case:
    return Case(**(dict(device="v5p", contestant="ours", kernel="forward", length=1024, heads=16) | changes))


def block_of_heads(length: int) -> Case:
    """What the tables count for a model of 48 heads on a v5p."""
    args = argparse.Namespace(device="v5p", num_heads=48, length=length, head_dim=128, set=[])
    return attention.our_case(args, "forward")


def peer(name: str, **settings) -> Case:
    one = Case(device="v5p", contestant=name, kernel="forward", length=2048, heads=1, segments=True)
    return replace(one, settings=tuple(sorted(settings.items())))


def seen_by_mask(ids: np.ndarray) -> np.ndarray:
    """bool (S, S) of one sequence: causal, within documents."""
    return np.tril(ids[:, None] == ids[None])


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", attention_ours.KERNELS)
@pytest.mark.parametrize("device", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("document", [None, 256, 1024])
def test_the_arithmetic_is_our_schedule(device, kernel, document):
    """What the estimator is given by shifts must be what the kernel is given as a table."""
    case = ours(device=device, kernel=kernel, length=4096, document=document)
    blocks, todo = attention_ours.blocks_of(case), attention_ours.visits_of(case)
    assert todo.fulls.shape[1] == 1, "the lengths that are walked have one span"
    blocks_of_queries = jnp.arange(case.length // blocks.block_q, dtype=jnp.int32)
    found = jax.vmap(lambda i: attention_ours.arithmetic_visits(blocks, document, 1, "table", "grid", 0, 0, i))(
        blocks_of_queries
    )
    assert_same_steps(found, type(todo)(*(x[0, 0] for x in todo)))


@pytest.mark.parametrize("span", [1024, 2048])
def test_the_arithmetic_is_our_schedule_span_by_span(span):
    case = ours(length=4096, settings=(("span_kv", span),))
    blocks, todo = attention_ours.blocks_of(case), attention_ours.visits_of(case)
    assert blocks.span_kv == span and todo.fulls.shape[1] == 4096 // span
    blocks_of_queries = jnp.arange(case.length // blocks.block_q, dtype=jnp.int32)
    for p in range(4096 // span):
        found = jax.vmap(lambda i: attention_ours.arithmetic_visits(blocks, None, 4096 // span, "grid", p, i))(
            blocks_of_queries
        )
        assert_same_steps(found, type(todo)(*(x[0, p] for x in todo)))


def assert_same_steps(found, todo):
    """Where there are no steps of a kind, where they would begin does not matter."""
    for name in ("edges", "fulls", "span"):
        np.testing.assert_array_equal(getattr(found, name), getattr(todo, name), err_msg=name)
    has_edges, has_fulls = np.asarray(found.edges) > 0, np.asarray(found.fulls) > 0
    np.testing.assert_array_equal(found.edge[has_edges], todo.edge[has_edges])
    np.testing.assert_array_equal(found.edges_before[has_edges], todo.edges_before[has_edges])
    np.testing.assert_array_equal(found.full[has_fulls], todo.full[has_fulls])


@pytest.mark.parametrize("block_q, block_kv", [(512, 512), (512, 1024), (1024, 512)])
def test_the_arithmetic_is_splash_s_tables(block_q, block_kv):
    splash = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel")
    masks = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask")
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv, block_q_dq=block_q,
        block_kv_dq=block_kv, block_kv_dkv_compute=block_kv,
    )  # fmt: skip
    kernel = splash.make_splash_mqa_single_device(
        mask=masks.MultiHeadMask([masks.CausalMask((4096, 4096))]), block_sizes=sizes
    )
    ours_of = attention_splash._arithmetic(block_q, block_kv)
    for info, next_i in ((kernel.fwd_mask_info, False), (kernel.dq_mask_info, False), (kernel.dkv_mask_info, True)):
        is_visited, fetched = np.asarray(info.block_mask)[0] > 0, np.asarray(info.data_next)[0]
        for i, j in np.ndindex(is_visited.shape):
            to_fetch, _, visits, _ = ours_of(0, jnp.int32(i), jnp.int32(j), None, None, None, next_i)
            assert bool(visits) == is_visited[i, j]
            assert not visits or int(to_fetch) == fetched[i, j]
    assert (
        attention_splash.steps(peer("splash", block_q=block_q, block_kv=block_kv))[0]
        == (np.asarray(kernel.fwd_mask_info.block_mask)[0, : 2048 // block_q, : 2048 // block_kv] > 0).sum()
    )


@pytest.mark.parametrize("block_q, block_kv", [(512, 512), (512, 1024), (1024, 512)])
def test_tiles_of_tokamax(block_q, block_kv):
    """Every tile with a visible entry is visited; without documents, exactly those; a batch shares its tiles."""
    ids = attention_documents.packed("log-normal, median 500, sigma 1.3", 3, 2048)
    case = peer("tokamax", block_q=block_q, block_kv=block_kv)

    def needed(mask):
        return mask.reshape(2048 // block_q, block_q, 2048 // block_kv, block_kv).any((1, 3))

    np.testing.assert_array_equal(attention_tokamax.visited(case), needed(np.tril(np.ones((2048, 2048), bool))))
    alone = [attention_tokamax.visited(case, one[None]) for one in ids]
    for tiles, one in zip(alone, ids, strict=True):
        assert not (needed(seen_by_mask(one)) & ~tiles).any()
    np.testing.assert_array_equal(attention_tokamax.visited(case, ids), np.any(alone, axis=0))
    assert attention_tokamax.steps(case, ids)[0] == 3 * np.any(alone, axis=0).sum()


def test_the_rule_is_tokamax_s_own():
    package = "tokamax._src.ops.experimental.tpu.splash_attention"
    splash = pytest.importorskip(f"{package}.splash_attention_kernel", reason="needs the extra `bench-tpu`")
    base, masks = pytest.importorskip(f"{package}.base"), pytest.importorskip(f"{package}.splash_attention_mask")
    config = splash.SplashConfig(block_q=512, block_kv=1024, block_kv_compute=512)
    kernel = splash.make_splash_mqa_single_device(mask=masks.CausalMask((2048, 2048)), config=config)
    ids = attention_documents.packed("log-normal, median 500, sigma 1.3", 4, 2048)

    def active(one):
        segments = base.SegmentIds(one, one)
        info, _, _ = splash._refine_mask_info_with_segments(
            kernel.fwd_mask_info, segments, q_blocks=4, kv_blocks=2, bq=512, bkv=1024, is_dkv=False
        )
        return (info.block_mask > 0).sum()

    case = peer("tokamax", block_q=512, block_kv=1024)
    for one in ids:
        assert attention_tokamax.visited(case, one[None]).sum() == int(active(jnp.asarray(one)))
    assert attention_tokamax.visited(case, ids).sum() == int(jax.vmap(active)(jnp.asarray(ids))[0])


# --- documents -------------------------------------------------------------------------------------------------------


def test_documents_are_laid_end_to_end():
    ids = attention_documents.segment_ids(np.array([3, 1, 5, 4]), 3, 4, offset=1)
    assert ids.tolist() == [[1, 1, 2, 3], [1, 1, 1, 1], [1, 1, 1, 1]]
    with pytest.raises(ValueError, match="do not fill"):
        attention_documents.segment_ids(np.array([3]), 1, 4)


def test_needed_is_what_the_mask_shows():
    ids = attention_documents.packed("log-normal, median 500, sigma 1.3", 2, 512, seed=1)
    shown = sum(seen_by_mask(one).sum() for one in ids)
    assert attention_packed.needed(ids) == pytest.approx(shown / (2 * 512 * 513 / 2))


def test_packed_cycles_are_the_fitted_costs_times_the_counts(monkeypatch, tmp_path):
    """Of the costs that `made_up` has; a batch has one schedule for tokamax, one a sequence for ours."""

    def kept(case, memory, **_):
        memory.put(case, made_up(case))
        return memory.get(case)

    kind = "log-normal, median 500, sigma 1.3"
    monkeypatch.setattr(attention_documents, "KINDS", (kind,))
    monkeypatch.setattr(attention_packed, "WINDOWS", 16)
    for module in (attention_fit, attention_packed):
        monkeypatch.setattr(module, "estimate", kept)
    output, cache = tmp_path / "figures.json", str(tmp_path / "cache.json")
    command = ["bench", "attention", "--packed", "--kernel", "forward", "--against", "tokamax"]
    assert main([*command, "--cache", cache, "--output", str(output)]) == 0
    rows = {row["batch"]: row for row in json.loads(output.read_text())[0]["rows"]}
    ids = attention_documents.packed(kind, 16, 8192)
    case = block_of_heads(8192)
    cycles = np.dot(attention_ours.steps(replace(case, batch=16), ids), [9000, 5000, 400, 4000])
    assert rows[16]["ours"] == pytest.approx(cycles / case.heads / 16, rel=1e-4)
    assert rows[1]["ours"] == pytest.approx((cycles + 15 * 4000) / case.heads / 16, rel=1e-4)
    assert rows[1]["tokamax"] < rows[16]["tokamax"]
    large = replace(peer("tokamax", block_q=1024, block_kv=1024), length=8192)
    tiles, blocks = attention_tokamax.steps(large, ids)
    assert rows[16]["tokamax"] == pytest.approx((9000 * tiles + 50 * blocks) / 16, rel=1e-4)


def test_picture_shows_every_step(tmp_path, capsys):
    """The steps that are drawn cover the mask, and their number is the schedule's."""
    ids = attention_documents.packed("log-normal, median 500, sigma 1.3", 2, 2048)
    case = replace(block_of_heads(2048), batch=2)
    drawn = [attention_picture.steps(case, ids, row) for row in range(2)]
    for one, rectangles in zip(ids, drawn, strict=True):
        covered = np.zeros((2048, 2048), bool)
        for kind, top, bottom, left, right in rectangles:
            assert not covered[top:bottom, left:right].any()
            covered[top:bottom, left:right] = True
            assert kind == "edge" or seen_by_mask(one)[top:bottom, left:right].all()
        assert not (seen_by_mask(one) & ~covered).any()
    fulls, edges, *_ = attention_ours.steps(case, ids)
    kinds = [kind for rectangles in drawn for kind, *_ in rectangles]
    assert (kinds.count("whole"), kinds.count("edge")) == (fulls, edges)
    file = tmp_path / "schedule.svg"
    assert main(["bench", "attention", "--picture", str(file)]) == 0
    assert ET.parse(file).getroot().tag.endswith("svg") and "causal triangle" in capsys.readouterr().out


# --- the fit and what is kept ----------------------------------------------------------------------------------------


def test_least_squares_finds_the_costs_and_says_how_far_off_it_is():
    counts = np.array([[1.0, 3.0, 8.0], [6.0, 7.0, 16.0], [28.0, 12.0, 32.0], [2.0, 16.0, 16.0]])
    costs, residual = attention_fit.least_squares(counts, counts @ [8000.0, 5000.0, 300.0])
    np.testing.assert_allclose(costs, [8000, 5000, 300], rtol=1e-9)
    assert residual < 1e-9
    _, residual = attention_fit.least_squares(counts[:, :2], counts @ [8000.0, 5000.0, 300.0])
    assert residual > 0.01


def made_up(case, **_) -> Estimate:
    if case.contestant == "ours":
        counts = attention_ours.steps(case)
        return Estimate(cycles=round(float(np.dot(counts, [9000, 5000, 400, 4000]))), vmem=1 << 20, seconds=0.0)
    count = attention_tokamax.full_steps if case.contestant == "tokamax" else attention_splash.steps
    tiles, rows = count(case)
    return Estimate(
        cycles=round(9000 * tiles * (2 if case.kernel != "forward" else 1) + 50 * rows), vmem=1, seconds=0.0
    )


def test_the_table_of_ratios_follows_from_the_estimates(tmp_path, capsys, monkeypatch):
    """With estimates that are exactly linear, the table must give back their costs, and the ratio of the sums."""
    monkeypatch.setattr(attention_fit, "estimate", made_up)
    monkeypatch.setattr(
        "jaxcoder.benchmarks.attention.estimate", lambda case, **_: Estimate(cycles=1, vmem=1, seconds=0)
    )
    output = tmp_path / "figures.json"
    assert main(["bench", "attention", "--device", "tpu:v5p", "--output", str(output)]) == 0
    said = capsys.readouterr()
    checks, forward, backward = json.loads(output.read_text())
    assert all(row["peak"] != "artefact" for row in checks["rows"])
    first = forward["rows"][0]
    assert "whole blocks 9,000" in first["costs"] and first["residual"] == "0.0 %" and first["documents"] == "0.0 %"
    case = block_of_heads(8192)
    per_head = np.dot(attention_ours.steps(case), [9000, 5000, 400, 4000]) / case.heads
    assert first["cycles"] == pytest.approx(per_head, rel=1e-4)
    splash = next(row for row in forward["rows"] if row["who"] == "splash forward")
    assert splash["ratio"] == pytest.approx((9000 * 36 + 50 * 8) / per_head, rel=1e-3)
    assert "useful" in splash and "forward" in said.err
    both = [row for row in backward["rows"] if row["who"].startswith("splash")]
    assert [row["who"] for row in both] == ["splash dkv", "splash dq"]
    assert both[1]["total"] == pytest.approx(both[0]["cycles"] + both[1]["cycles"])


def test_a_rate_above_the_peak_is_called_an_artefact(monkeypatch, tmp_path):
    monkeypatch.setattr(
        attention_fit, "estimate", lambda case, **_: replace(made_up(case), cycles=made_up(case).cycles // 9)
    )
    monkeypatch.setattr(
        "jaxcoder.benchmarks.attention.estimate", lambda case, **_: Estimate(cycles=1, vmem=1, seconds=0)
    )
    output = tmp_path / "figures.json"
    command = ["bench", "attention", "--kernel", "forward", "--against", "none", "--output", str(output)]
    assert main(command) == 0
    _, forward = json.loads(output.read_text())
    assert forward["rows"][0]["useful"] == "artefact" and not any(forward["targets"].values())


def test_what_the_estimator_could_not_do_is_said(monkeypatch, tmp_path, capsys):
    failed = Estimate(cycles=None, vmem=1, seconds=0, error="Unsupported DMA direction")
    monkeypatch.setattr(
        attention_fit, "estimate", lambda case, **_: failed if case.contestant == "splash" else made_up(case)
    )
    monkeypatch.setattr("jaxcoder.benchmarks.attention.estimate", lambda case, **_: failed)
    assert main(["bench", "attention", "--kernel", "forward", "--against", "splash"]) == 0
    said = capsys.readouterr()
    assert "no cycles: 2048: Unsupported DMA direction" in said.out
    assert "compiles, not estimated: Unsupported DMA direction" in said.err


def test_estimates_are_kept_and_outdated_ones_are_not_used(tmp_path, monkeypatch):
    memory, case = Memory(tmp_path / "kept.json"), ours()
    found = Estimate(cycles=5, vmem=7, seconds=1.0)
    memory.put(case, found)
    assert Memory(tmp_path / "kept.json").get(case) == found
    assert memory.get(replace(case, length=2048)) is None
    memory.put(replace(case, length=4096), Estimate(cycles=None, vmem=None, seconds=9, error="not in 9 s"))
    assert Memory(tmp_path / "kept.json").get(replace(case, length=4096)) is None
    monkeypatch.setattr(attention_cycles, "_version", lambda package: "another")
    assert memory.get(case) is None


def test_the_search_goes_downhill(monkeypatch, tmp_path, capsys):
    """A valley in two settings is followed to its floor, and what does not compile is passed by."""

    def valley(case, memory=None, **_):
        values = dict(case.settings)
        bad = values["block_q"] == 512
        cycles = 1000 + abs(values["block_kv"] - 2048) + abs(values["block_kv_compute"] - 256)
        found = Estimate(cycles=None if bad else cycles, vmem=1, seconds=0, error="out of memory" if bad else "")
        memory.put(case, found)
        return found

    monkeypatch.setattr(attention_tune, "estimate", valley)
    output, cache = tmp_path / "figures.json", str(tmp_path / "cache.json")
    command = ["bench", "attention", "--tune", "--kernel", "forward", "--against", "splash", "--cache", cache]
    assert main([*command, "--output", str(output)]) == 0
    (report,) = json.loads(output.read_text())
    rows = [row for row in report["rows"] if row["walked"] == 1000]
    assert rows and "kv 2048 kv_compute 256" in rows[0]["settings"]
    assert any(row["why"] == "out of memory" and row["cycles"] is None for row in report["rows"])


def test_the_search_for_ours_tries_heads_that_the_model_has(monkeypatch, tmp_path, capsys):
    tried = []

    def tall(case, memory=None, **_):
        tried.append(case)
        values = dict(case.settings)
        assert values["heads"] == case.heads
        found = Estimate(cycles=case.heads * (1000 + 5 * values["block_q"] - case.heads), vmem=1, seconds=0)
        memory.put(case, found)
        return found

    monkeypatch.setattr(attention_tune, "estimate", tall)
    monkeypatch.setattr(attention_tune, "extended", lambda case, length, memory: memory.get(case).cycles / case.heads)
    output, cache = tmp_path / "figures.json", str(tmp_path / "cache.json")
    command = ["bench", "attention", "--tune", "--kernel", "backward", "--against", "none", "--num-heads", "32"]
    assert main([*command, "--device", "v6e", "--cache", cache, "--output", str(output)]) == 0
    (report,) = json.loads(output.read_text())
    assert "q 128" in report["rows"][0]["settings"] and "heads 16" in report["rows"][0]["settings"]
    assert {case.heads for case in tried} == {8, 16}


def test_reasons_are_taken_from_what_the_compiler_says():
    def reason(text, code=-6):
        return attention_cycles._reason(type("Done", (), {"stderr": text, "returncode": code})())

    aborted = (
        "F1121 llo_dumper.cc:1778] Static LLO profiling of copy.6 failed: INVALID_ARGUMENT: Unsupported DMA: 10\n=== x"
    )
    assert reason(aborted) == "Unsupported DMA: 10"
    assert "out of memory?" in reason("nothing", -9)
    vmem = "x\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 2M\n"
    assert "vmem" in reason(vmem, 1)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--device", "v9"], "--device takes cpu, gpu or one of v4"),
        (["--against", "xla"], "--against takes splash and tokamax"),
        (["--set", "block_x=3"], "--set takes NAME=N"),
        (["--device", "cpu", "--against", "cudnn"], "--against takes cudnn with --device gpu"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence, capsys, monkeypatch):
    monkeypatch.setattr(
        "jaxcoder.benchmarks.attention.estimate", lambda case, **_: Estimate(cycles=1, vmem=1, seconds=0)
    )
    assert main(["bench", "attention", *options]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(any(device.platform == "gpu" for device in jax.devices()), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["bench", "attention", "--device", "gpu"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_on_cpus_backends_take_turns(capsys, tmp_path):
    output = tmp_path / "figures.json"
    command = ["bench", "attention", "--device", "cpu", "--length", "64", "--kernel", "forward", "--num-heads", "2"]
    assert main([*command, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert {row["who"] for row in rows} == {"blockwise", "reference"} and all(row["ms"] > 0 for row in rows)


def test_every_configured_shape_is_compiled_on_every_chip(monkeypatch, tmp_path):
    """StarCoder's shape and the multi-head partner are rows; what does not compile says why in its cell."""

    def compiles_but_on_v4(case, **_):
        assert not case.is_walked
        error = "no room" if case.device == "v4" else ""
        return Estimate(cycles=None, vmem=None if error else 3 << 20, seconds=0, error=error)

    monkeypatch.setattr(attention_compile, "estimate", compiles_but_on_v4)
    output = tmp_path / "figures.json"
    assert main(["bench", "attention", "--compile-all", "--output", str(output)]) == 0
    rows = {row["shape"]: row for row in json.loads(output.read_text())["rows"]}
    assert "starcoderbase" in rows["48 : 1 x 128"]["runs"] and rows["48 : 1 x 128"]["length"] == 8192
    assert "16 : 16 x 128" in rows and "12 : 1 x 64" in rows
    assert all(row["v6e"] == "3.0" and row["v4"] == "no: no room" for row in rows.values())


def test_streaming_costs_what_a_longer_sequence_has_more(monkeypatch):
    """Of estimates in which a whole block costs 9000 held and 9500 streamed, and each further span of queries 70."""

    def streams(case, **_):
        spans = case.length // attention_ours.blocks_of(case).span_kv
        if spans == 1:
            return made_up(case)
        wholes, edges, blocks, calls = attention_ours.steps(case)
        further = blocks * (spans - 1) if case.kernel == "forward" else blocks
        cycles = 9500 * wholes + 5000 * edges + 400 * blocks + 4000 * calls + 70 * further
        return Estimate(cycles=round(cycles), vmem=1, seconds=0)

    for module in (attention_fit, attention_compile):
        monkeypatch.setattr(module, "estimate", streams)
    args = argparse.Namespace(device="v5p", num_heads=48, length=8192, head_dim=128, set=[])
    for kernel in attention_ours.KERNELS:
        found = attention_compile.streamed_costs(args, kernel, memory=None)
        np.testing.assert_allclose([found["whole"], found["streamed"], found["step"]], [9000, 9500, 70], rtol=1e-3)


def test_the_inner_loop_is_the_densest_stretch():
    """A table of bundles as the compiler writes it: 100 idle ones, then 1500 that fill one of two slots."""
    table = [
        "== CAPACITY:",
        "MATMUL, VALU",
        "  2  4",
        "== UTILIZATION:",
        *["0 0"] * 100,
        *["1 3"] * 1500,
        *["0 4"] * 50,
    ]
    found = attention_slots.densest("\n".join(table))
    assert found["MATMUL"] == pytest.approx(0.5) and found["VALU"] == pytest.approx(0.75)


# --- the estimator itself --------------------------------------------------------------------------------------------


def test_the_estimator_sees_bad_blocks_as_bad():
    """Two processes of libtpu: a matmul with blocks of 128 and one with large blocks."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: `pip install 'jaxcoder[bench-tpu]'`")
    good, bad = (attention_matmul.Check(1024, blocks, None) for blocks in ((512, 1024, 1024), (128, 128, 128)))
    good, bad = (estimate(attention_matmul.case("v5e", check)) for check in (good, bad))
    assert good.cycles and bad.cycles, (good.error, bad.error)
    assert bad.cycles > 1.8 * good.cycles
    assert (
        0.3
        < attention_cycles.of_peak(attention_matmul.case("v5e", attention_matmul.CHECKS[2]), 2 * 1024**3, good.cycles)
        < 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("kernel", attention_ours.KERNELS)
def test_our_kernels_are_estimated_and_compile(kernel):
    pytest.importorskip("libtpu", reason="libtpu is not installed: `pip install 'jaxcoder[bench-tpu]'`")
    one, two = (estimate(ours(kernel=kernel, length=length)) for length in (1024, 2048))
    assert one.cycles and two.cycles, (one.error, two.error)
    assert 2 < two.cycles / one.cycles < 4 and one.vmem > 0
    real = estimate(ours(kernel=kernel, is_walked=False))
    assert real.compiles and real.cycles is None
