"""benchmarks/attention: the schedule arithmetic, the step counts, the fit, and the tables with made-up estimates."""

import argparse
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import command
from benchmarks.attention import (
    compile_all,
    cycles,
    documents,
    fit,
    flash_tpu,
    long,
    matmul,
    packed,
    picture,
    ratios,
    slots,
    tokamax,
    tune,
)
from benchmarks.attention import (
    splash as splash_cases,
)
from benchmarks.attention.cases import jaxcoder_case
from benchmarks.attention.cycles import Case, Estimate, EstimateCache, estimate


def jaxcoder(**changes) -> Case:
    return Case(**(dict(device="v5p", implementation="jaxcoder", kernel="forward", length=1024, heads=16) | changes))


ARGUMENTS = argparse.Namespace(device="v5p", num_heads=48, length=8192, head_dim=128, set=[])


def baseline(name: str, **settings) -> Case:
    one = Case(device="v5p", implementation=name, kernel="forward", length=2048, heads=1, segments=True)
    return replace(one, settings=tuple(sorted(settings.items())))


def seen_by_mask(ids: np.ndarray) -> np.ndarray:
    """bool (S, S) of one sequence: causal, within documents."""
    return np.tril(ids[:, None] == ids[None])


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", flash_tpu.KERNELS)
@pytest.mark.parametrize("device", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("document", [None, 256, 1024])
def test_the_arithmetic_equals_the_schedule(device, kernel, document):
    """What the estimator is given by shifts must be what the kernel is given as a table."""
    case = jaxcoder(device=device, kernel=kernel, length=4096, document=document)
    blocks, todo = flash_tpu.blocks_of(case), flash_tpu.visits_of(case)
    assert todo.fulls.shape[1] == 1, "the lengths that are walked have one span"
    blocks_of_queries = jnp.arange(case.length // blocks.block_q, dtype=jnp.int32)
    found = jax.vmap(lambda i: flash_tpu.arithmetic_visits(blocks, document, 1, "table", "grid", 0, 0, i))(
        blocks_of_queries
    )
    assert_same_steps(found, type(todo)(*(x[0, 0] for x in todo)))


@pytest.mark.parametrize("span", [1024, 2048])
def test_the_arithmetic_equals_the_schedule_span_by_span(span):
    case = jaxcoder(length=4096, settings=(("span_kv", span),))
    blocks, todo = flash_tpu.blocks_of(case), flash_tpu.visits_of(case)
    assert blocks.span_kv == span and todo.fulls.shape[1] == 4096 // span
    blocks_of_queries = jnp.arange(case.length // blocks.block_q, dtype=jnp.int32)
    for p in range(4096 // span):
        found = jax.vmap(lambda i: flash_tpu.arithmetic_visits(blocks, None, 4096 // span, "grid", p, i))(
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
def test_the_arithmetic_equals_the_tables_of_splash(block_q, block_kv):
    splash = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel")
    masks = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask")
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv, block_q_dq=block_q,
        block_kv_dq=block_kv, block_kv_dkv_compute=block_kv,
    )  # fmt: skip
    kernel = splash.make_splash_mqa_single_device(
        mask=masks.MultiHeadMask([masks.CausalMask((4096, 4096))]), block_sizes=sizes
    )
    arithmetic = splash_cases._arithmetic(block_q, block_kv)
    for info, next_i in ((kernel.fwd_mask_info, False), (kernel.dq_mask_info, False), (kernel.dkv_mask_info, True)):
        is_visited, fetched = np.asarray(info.block_mask)[0] > 0, np.asarray(info.data_next)[0]
        for i, j in np.ndindex(is_visited.shape):
            to_fetch, _, visits, _ = arithmetic(0, jnp.int32(i), jnp.int32(j), None, None, None, next_i)
            assert bool(visits) == is_visited[i, j]
            assert not visits or int(to_fetch) == fetched[i, j]
    assert (
        splash_cases.steps(baseline("splash", block_q=block_q, block_kv=block_kv))[0]
        == (np.asarray(kernel.fwd_mask_info.block_mask)[0, : 2048 // block_q, : 2048 // block_kv] > 0).sum()
    )


@pytest.mark.parametrize("block_q, block_kv", [(512, 512), (512, 1024), (1024, 512)])
def test_tiles_of_tokamax(block_q, block_kv):
    """Every tile with a visible entry is visited; without documents, exactly those; a batch shares its tiles."""
    ids = documents.packed("log-normal, median 500, sigma 1.3", 3, 2048)
    case = baseline("tokamax", block_q=block_q, block_kv=block_kv)

    def needed(mask):
        return mask.reshape(2048 // block_q, block_q, 2048 // block_kv, block_kv).any((1, 3))

    np.testing.assert_array_equal(tokamax.visited(case), needed(np.tril(np.ones((2048, 2048), bool))))
    alone = [tokamax.visited(case, one[None]) for one in ids]
    for tiles, one in zip(alone, ids, strict=True):
        assert not (needed(seen_by_mask(one)) & ~tiles).any()
    np.testing.assert_array_equal(tokamax.visited(case, ids), np.any(alone, axis=0))
    assert tokamax.steps(case, ids)[0] == 3 * np.any(alone, axis=0).sum()


# --- documents -------------------------------------------------------------------------------------------------------


def test_documents_are_laid_end_to_end():
    ids = documents.segment_ids(np.array([3, 1, 5, 4]), 3, 4, offset=1)
    assert ids.tolist() == [[1, 1, 2, 3], [1, 1, 1, 1], [1, 1, 1, 1]]
    with pytest.raises(ValueError, match="do not fill"):
        documents.segment_ids(np.array([3]), 1, 4)


def test_needed_is_what_the_mask_shows():
    ids = documents.packed("log-normal, median 500, sigma 1.3", 2, 512, seed=1)
    shown = sum(seen_by_mask(one).sum() for one in ids)
    assert packed.needed(ids) == pytest.approx(shown / (2 * 512 * 513 / 2))


def test_picture_shows_every_step(tmp_path, capsys):
    """The steps that are drawn cover the mask, and their number is the schedule's."""
    ids = documents.packed("log-normal, median 500, sigma 1.3", 2, 2048)
    case = replace(jaxcoder_case(argparse.Namespace(**vars(ARGUMENTS) | {"length": 2048}), "forward"), batch=2)
    drawn = [picture.steps(case, ids, row) for row in range(2)]
    for one, rectangles in zip(ids, drawn, strict=True):
        covered = np.zeros((2048, 2048), bool)
        for kind, top, bottom, left, right in rectangles:
            assert not covered[top:bottom, left:right].any()
            covered[top:bottom, left:right] = True
            assert kind == "edge" or seen_by_mask(one)[top:bottom, left:right].all()
        assert not (seen_by_mask(one) & ~covered).any()
    fulls, edges, *_ = flash_tpu.steps(case, ids)
    kinds = [kind for rectangles in drawn for kind, *_ in rectangles]
    assert (kinds.count("full"), kinds.count("edge")) == (fulls, edges)
    file = tmp_path / "schedule.svg"
    assert command.main(picture, [str(file)]) == 0
    assert "<svg" in file.read_text() and "causal triangle" in capsys.readouterr().out


# --- the fit and what is kept ----------------------------------------------------------------------------------------


def test_least_squares_finds_the_costs_and_says_how_far_off_it_is():
    counts = np.array([[1.0, 3.0, 8.0], [6.0, 7.0, 16.0], [28.0, 12.0, 32.0], [2.0, 16.0, 16.0]])
    costs, residual = fit.least_squares(counts, counts @ [8000.0, 5000.0, 300.0])
    np.testing.assert_allclose(costs, [8000, 5000, 300], rtol=1e-9)
    assert residual < 1e-9
    _, residual = fit.least_squares(counts[:, :2], counts @ [8000.0, 5000.0, 300.0])
    assert residual > 0.01


def made_up(case, **_) -> Estimate:
    if case.implementation == "jaxcoder":
        counts = flash_tpu.steps(case)
        return Estimate(cycles=round(float(np.dot(counts, [9000, 5000, 400, 4000]))), vmem=1 << 20, seconds=0.0)
    count = tokamax.full_steps if case.implementation == "tokamax" else splash_cases.steps
    tiles, rows = count(case)
    return Estimate(
        cycles=round(9000 * tiles * (2 if case.kernel != "forward" else 1) + 50 * rows), vmem=1, seconds=0.0
    )


def test_the_table_of_ratios_follows_from_the_estimates(tmp_path, capsys, monkeypatch):
    """With estimates that are exactly linear, the table must give back their costs, and the ratio of the sums."""
    monkeypatch.setattr(fit, "estimate", made_up)
    monkeypatch.setattr(ratios, "estimate", lambda case, **_: Estimate(cycles=1, vmem=1, seconds=0))
    output = tmp_path / "figures.json"
    assert command.main(ratios, ["--device", "v5p", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    checks, forward, backward = json.loads(output.read_text())
    assert all(row["peak"] != "artefact" for row in checks["rows"])
    first = forward["rows"][0]
    assert "whole blocks 9,000" in first["costs"] and first["residual"] == "0.0 %" and first["documents"] == "0.0 %"
    case = jaxcoder_case(ARGUMENTS, "forward")
    per_head = np.dot(flash_tpu.steps(case), [9000, 5000, 400, 4000]) / case.heads
    assert first["cycles"] == pytest.approx(per_head, rel=1e-4)
    splash = next(row for row in forward["rows"] if row["name"] == "splash forward")
    assert splash["ratio"] == pytest.approx((9000 * 36 + 50 * 8) / per_head, rel=1e-3)
    assert "useful" in splash and "forward" in printed.err
    both = [row for row in backward["rows"] if row["name"].startswith("splash")]
    assert [row["name"] for row in both] == ["splash dkv", "splash dq"]
    assert both[1]["total"] == pytest.approx(both[0]["cycles"] + both[1]["cycles"])


def test_estimates_are_kept_and_outdated_ones_are_not_used(tmp_path, monkeypatch):
    cache, case = EstimateCache(tmp_path / "kept.json"), jaxcoder()
    found = Estimate(cycles=5, vmem=7, seconds=1.0)
    cache.put(case, found)
    assert EstimateCache(tmp_path / "kept.json").get(case) == found
    assert cache.get(replace(case, length=2048)) is None
    cache.put(replace(case, length=4096), Estimate(cycles=None, vmem=None, seconds=9, error="timeout after 9 s"))
    assert EstimateCache(tmp_path / "kept.json").get(replace(case, length=4096)) is None
    monkeypatch.setattr(cycles, "_version", lambda package: "another")
    assert cache.get(case) is None


def test_the_search_goes_downhill(monkeypatch, tmp_path, capsys):
    """A valley in two settings is followed to its floor, and what does not compile is passed by."""

    def valley(case, cache=None, **_):
        values = dict(case.settings)
        bad = values["block_q"] == 512
        cycles = 1000 + abs(values["block_kv"] - 2048) + abs(values["block_kv_compute"] - 256)
        found = Estimate(cycles=None if bad else cycles, vmem=1, seconds=0, error="out of memory" if bad else "")
        cache.put(case, found)
        return found

    monkeypatch.setattr(tune, "estimate", valley)
    output, cache = tmp_path / "figures.json", str(tmp_path / "cache.json")
    arguments = ["--kernel", "forward", "--against", "splash", "--cache", cache]
    assert command.main(tune, [*arguments, "--output", str(output)]) == 0
    (report,) = json.loads(output.read_text())
    rows = [row for row in report["rows"] if row["estimated"] == 1000]
    assert rows and "kv 2048 kv_compute 256" in rows[0]["settings"]
    assert any(row["why"] == "out of memory" and row["cycles"] is None for row in report["rows"])


def test_reasons_are_taken_from_what_the_compiler_says():
    def reason(text, code=-6):
        return cycles._reason(type("Done", (), {"stderr": text, "returncode": code})())

    aborted = (
        "F1121 llo_dumper.cc:1778] Static LLO profiling of copy.6 failed: INVALID_ARGUMENT: Unsupported DMA: 10\n=== x"
    )
    assert reason(aborted) == "Unsupported DMA: 10"
    assert "out of memory?" in reason("nothing", -9)
    vmem = "x\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 2M\n"
    assert "vmem" in reason(vmem, 1)


@pytest.mark.parametrize(
    "options, message",
    [(["--device", "v9"], "v9"), (["--against", "xla"], "xla"), (["--set", "block_x=3"], "--set takes NAME=N")],
)
def test_bad_input_is_refused(options, message, capsys, monkeypatch):
    monkeypatch.setattr(ratios, "estimate", lambda case, **_: Estimate(cycles=1, vmem=1, seconds=0))
    try:
        assert command.main(ratios, options) == 2
    except SystemExit as exit:  # argparse
        assert exit.code == 2
    assert message in capsys.readouterr().err


def test_every_configured_shape_is_compiled_on_every_chip(monkeypatch, tmp_path):
    """StarCoder's shape and the multi-head partner are rows; what does not compile says why in its cell."""

    def compiles_but_on_v4(case, **_):
        assert not case.is_estimated
        error = "no room" if case.device == "v4" else ""
        return Estimate(cycles=None, vmem=None if error else 3 << 20, seconds=0, error=error)

    monkeypatch.setattr(compile_all, "estimate", compiles_but_on_v4)
    output = tmp_path / "figures.json"
    assert command.main(compile_all, ["--output", str(output)]) == 0
    rows = {row["shape"]: row for row in json.loads(output.read_text())["rows"]}
    assert "starcoderbase" in rows["48 : 1 x 128"]["runs"] and rows["48 : 1 x 128"]["length"] == 8192
    assert "16 : 16 x 128" in rows and "12 : 1 x 64" in rows
    assert all(row["v6e"] == "3.0" and row["v4"] == "no: no room" for row in rows.values())


def test_streaming_costs_what_a_longer_sequence_has_more(monkeypatch):
    """Of estimates in which a whole block costs 9000 held and 9500 streamed, and each further span of queries 70."""

    def streams(case, **_):
        spans = case.length // flash_tpu.blocks_of(case).span_kv
        if spans == 1:
            return made_up(case)
        wholes, edges, blocks, calls = flash_tpu.steps(case)
        further = blocks * (spans - 1) if case.kernel == "forward" else blocks
        cycles = 9500 * wholes + 5000 * edges + 400 * blocks + 4000 * calls + 70 * further
        return Estimate(cycles=round(cycles), vmem=1, seconds=0)

    for module in (fit, long):
        monkeypatch.setattr(module, "estimate", streams)
    for kernel in flash_tpu.KERNELS:
        found = long.streamed_costs(ARGUMENTS, kernel, cache=None)
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
    found = slots.densest("\n".join(table))
    assert found["MATMUL"] == pytest.approx(0.5) and found["VALU"] == pytest.approx(0.75)


# --- the estimator itself --------------------------------------------------------------------------------------------


def test_the_estimator_sees_bad_blocks_as_bad():
    """Two processes of libtpu: a matmul with blocks of 128 and one with large blocks."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: `pip install '.[bench-tpu]'`")
    good, bad = (matmul.Check(1024, blocks, None) for blocks in ((512, 1024, 1024), (128, 128, 128)))
    good, bad = (estimate(matmul.case("v5e", check)) for check in (good, bad))
    assert good.cycles and bad.cycles, (good.error, bad.error)
    assert bad.cycles > 1.8 * good.cycles
    assert 0.3 < cycles.of_peak(matmul.case("v5e", matmul.CHECKS[2]), 2 * 1024**3, good.cycles) < 1
