"""A check of the estimator: a plain Pallas matmul with good and bad blocks, compared with times measured on a v5e.

The measured times are those of JAX's own guide to matrix multiplication in Pallas (docs/pallas/tpu/matmul). They hold
about 0.1 ms of dispatch, so only the large shapes can agree.
"""

from dataclasses import dataclass

from benchmarks.attention.cycles import Case


@dataclass(frozen=True)
class Check:
    size: int
    blocks: tuple[int, int, int]
    """Rows, contraction, columns."""
    measured: float | None
    """Seconds on a v5e."""


CHECKS = (
    Check(4096, (512, 1024, 1024), 8.8909e-4),
    Check(4096, (256, 256, 256), None),
    Check(1024, (512, 1024, 1024), 1.2709e-4),
    Check(1024, (128, 128, 128), 2.9766e-4),
)
V5E_HERTZ = 1.5e9


def case(device: str, check: Check) -> Case:
    settings = tuple(zip(("rows", "contraction", "columns"), check.blocks, strict=True))
    return Case(device=device, implementation="matmul", kernel="matmul", length=check.size, heads=1, settings=settings)


def trace(case: Case):
    """See `cycles.implementation`: (N, N) times (N, N) in bf16, accumulated in fp32."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    size = case.length
    rows, contraction, columns = (case.option(name) for name in ("rows", "contraction", "columns"))
    steps = size // contraction

    def kernel(x_ref, y_ref, out_ref, sum_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            sum_ref[...] = jnp.zeros(sum_ref.shape, sum_ref.dtype)

        sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == steps - 1)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    def multiply(x, y):
        return pl.pallas_call(
            kernel,
            name="matmul",
            grid=(size // rows, size // columns, steps),
            in_specs=[
                pl.BlockSpec((rows, contraction), lambda i, j, k: (i, k)),
                pl.BlockSpec((contraction, columns), lambda i, j, k: (k, j)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda i, j, k: (i, j)),
            out_shape=jax.ShapeDtypeStruct((size, size), jnp.bfloat16),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        )(x, y)

    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return multiply, (x, x), "^matmul"
