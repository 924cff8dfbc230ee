"""FLOPs and transfers of programs with known answers, in all of XLA's notations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcoder.plan.hlo import Collective, Program

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

LOOP = """HloModule m

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0:T(256)} get-tuple-element(%p), index=1
  COLLECTIVE
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]) parameter(0)
  ROOT %w = (s32[], f32[8]) while(%a), condition=%cond, body=%body
}
"""


@pytest.mark.parametrize(
    ("line", "kind", "axes", "sent"),
    [
        ("%g = f32[16]{0} all-gather(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}", "all-gather", "data", 32),
        ("%g = f32[16]{0} all-gather(%x), replica_groups=[4,2]<=[8]", "all-gather", "tensor", 32),
        ("%g = f32[16]{0} all-gather(%x), replica_groups=[4,2]<=[2,2,2]T(0,2,1)", "all-gather", "fsdp", 32),
        ("%g = bf16[8,2]{1,0} all-gather(%x), replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp','tensor'}",
         "all-gather", "fsdp tensor", 24),
        ("%g = (f32[8], f32[16]) all-gather-start(%x), replica_groups=[4,2]<=[8]", "all-gather", "tensor", 32),
        ("%r = (f32[8], bf16[8]) all-reduce(%x, %x), replica_groups=[2,4]<=[8], to_apply=%add", "all-reduce",
         "fsdp tensor", 72),
        ("%s = f32[4]{0} reduce-scatter(%x), replica_groups=[4,2]<=[8]", "reduce-scatter", "tensor", 16),
        ("%p2 = (f32[8]{0:S(1)}, f32[8]{0}, u32[]{:S(2)}, u32[]) collective-permute-start(%x), channel_id=3, "
         "source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", "collective-permute", "fsdp", 32),
        ("%z = f32[8] all-to-all(%x), replica_groups={}", "all-to-all", "data fsdp tensor", 28),
    ],
)  # fmt: skip
def test_collectives_in_loops(line, kind, axes, sent):
    found = Program(LOOP.replace("COLLECTIVE", line)).collectives(MESH)
    is_async = "-start" in line
    expected = Collective(kind=kind, axes=tuple(axes.split()), asynchronous=is_async, count=7, bytes=7.0 * sent)
    assert found == [expected]


def test_groups_of_one_send_nothing():
    line = "%g = f32[8]{0} all-reduce(%x), replica_groups=[8,1]<=[8]"
    assert Program(LOOP.replace("COLLECTIVE", line)).collectives(MESH) == []


def test_an_async_transfer_counts_once():
    gather = "%g.{} = f32[16] all-gather(%q), channel_id=3, replica_groups=[4,2]<=[8]"
    parts = "".join(
        f"%{name} (q: f32[8]) -> f32[16] {{\n  %q = f32[8] parameter(0)\n  {gather.format(i)}\n}}\n\n"
        for i, name in enumerate(("begin", "async_collective_fusion.1", "end"))
    )
    calls = "\n  ".join(
        f"%{name} = f32[16] fusion(%x), kind=kCustom, calls=%{called}"
        for name, called in (
            ("async-collective-start.1", "begin"), ("fusion.2", "async_collective_fusion.1"),
            ("async-collective-done.1", "end"),
        )
    )  # fmt: skip
    text = LOOP.replace("COLLECTIVE", calls).replace("%cond (p", parts + "%cond (p")
    found = Program(text).collectives(MESH)
    assert [(c.count, c.asynchronous, c.bytes) for c in found] == [(7, True, 7 * 32.0)]


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter():
    fused = (
        "%all-reduce-scatter.3 (q: f32[8]) -> f32[4] {\n  %q = f32[8] parameter(0)\n"
        "  %r = f32[8] all-reduce(%q), replica_groups=[4,2]<=[8]\n}\n\n"
    )
    call = "%f = f32[4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3"
    found = Program(LOOP.replace("COLLECTIVE", call).replace("%cond (p", fused + "%cond (p")).collectives(MESH)
    assert [(c.kind, c.count, c.bytes) for c in found] == [("reduce-scatter", 7, 7 * 16.0)]


def compiled(function, *shapes) -> Program:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function).lower(*arrays).compile().as_text())


def test_flops_of_dots_in_loops():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert compiled(layers, (32, 64), (5, 64, 64)).matmul_flops() == 5 * 2 * 32 * 64 * 64


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, "VALID", 1), (2, "SAME", 1), (1, ((3, 3),), 2)])
def test_flops_of_convolutions_leave_out_padding(stride, padding, dilation):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,), padding, rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    ones = convolve(jnp.ones((2, 9, 3)), jnp.ones((3, 3, 4)))  # each output is the number of its multiplications
    program = compiled(convolve, (2, 9, 3), (3, 3, 4))
    if not any(i.op == "convolution" for i, _, _ in program.instructions()):
        pytest.skip("this XLA made the convolution a call of a library")
    assert program.matmul_flops() == 2 * float(ones.sum())


def test_a_step_over_a_mesh():
    """Weights sharded over fsdp, rows over data and fsdp: the gradient's bytes follow from the shapes."""
    mesh = jax.make_mesh((2, 2, 2), tuple(MESH), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:8])

    def loss(w, x):
        return jnp.square(x @ w).sum()

    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P()))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    program = Program(jax.jit(jax.grad(loss)).lower(w, x).compile().as_text())
    [found] = program.collectives(MESH)
    assert (found.kind, found.axes, found.count) == ("all-reduce", ("data", "fsdp"), 1)
    assert found.bytes == 2 * 64 * 32 * 4 * 3 / 4
    assert program.matmul_flops() == 2 * 2 * 4 * 64 * 32


def test_loops_of_unknown_length_count_once():
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100.0, lambda x: x @ x, x)

    assert compiled(until, (16, 16)).matmul_flops() == 2 * 16**3


def test_the_empty_program():
    assert compiled(lambda x: x, (2,)).collectives({"data": 1}) == []
    assert np.isclose(compiled(lambda x: x, (2,)).matmul_flops(), 0.0)
