"""jaxcoder's TPU attention kernels as cases of the estimator, and the steps of their schedule.

The schedule is data to the kernel, and the estimator reads data as 0. So the steps of a block of queries are computed
from the grid's indices, by shifts and comparisons, for a causal sequence of one document or of documents of 2^k tokens.
A test compares this arithmetic with `schedule.visits`, which counts the steps of real documents.
"""

from dataclasses import fields, replace

from benchmarks.attention.cycles import DEVICES, Case

KERNELS = ("forward", "backward")
FLOP = {"forward": 4, "backward": 10}
"""Per query, key it sees, head and element of head_dim: two and five matmuls."""
COUNTED = ("whole blocks", "edge steps", "blocks of queries", "calls")


def blocks_of(case: Case):
    """Block shapes of a case: the table's for the device and kernel, with the case's settings instead, cut to fit."""
    from jaxcoder.kernels.attention.blocks_tpu import for_device

    table = for_device(DEVICES[case.device].kind)[case.kernel == "backward"]
    return replace(table, **dict(case.settings)).fit(case.length, case.length, case.heads // case.groups)


def setting_names() -> list[str]:
    from jaxcoder.kernels.attention.schedule import Blocks

    return [field.name for field in fields(Blocks)]


def choices(kernel: str) -> dict[str, tuple[int, ...]]:
    """Values that tune.py tries, of the fields that the block shapes have."""
    tried = {
        "sums_by_matmul": (0, 1),
        "chunk_heads": (1, 2, 4),
        "block_q": (128, 256),
        "heads": (8, 12, 16, 24),
        "block_kv": (512, 1024, 2048),
        "edge_kv": (128, 256, 512, 1024),
    }
    return {name: values for name, values in tried.items() if name in setting_names()}


def allows(kernel: str, settings: dict[str, int]) -> bool:
    return settings["block_kv"] % settings["edge_kv"] == 0


def trace(case: Case):
    """See `cycles.implementation`. Causal, with segment ids, bf16."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from jaxcoder.kernels.attention import api, flash_tpu, flash_tpu_kernels

    attend = partial(api.attention, dropout_rate=case.dropout_rate, implementation="flash_tpu")
    if case.is_estimated:
        blocks = blocks_of(case)
        num_spans = -(-case.length // blocks.span_kv)
        # Only here, in a process of its own: the kernel has no other entry for a schedule that is not a table.
        flash_tpu_kernels.read_visits = partial(arithmetic_visits, blocks, case.document, num_spans)
        api.BACKENDS["flash_tpu"] = partial(flash_tpu.attention, forward_blocks=blocks, backward_blocks=blocks)

    def forward(q, k, v, key, ids):
        return attend(q, k, v, dropout_key=key, segment_ids=ids)

    def both(q, k, v, key, ids):
        return jax.vjp(lambda *x: forward(*x, key, ids), q, k, v)[1](q)

    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype)

    q = shape(jnp.bfloat16, case.batch, case.length, case.heads, case.head_dim)
    kv = shape(jnp.bfloat16, case.batch, case.length, case.groups, case.head_dim)
    key, ids = shape(jnp.uint32, 2), shape(jnp.int32, case.batch, case.length)
    function = forward if case.kernel == "forward" else both
    return function, (q, kv, kv, key, ids), f"^flash_{case.kernel}"


def arithmetic_visits(blocks, document: int | None, num_spans: int, *place):
    """The `schedule.visits` of one block of queries in one span, the last two of `place`, by shifts alone.

    document: tokens of each document, a power of two and a multiple of block_q; None: one document of any length.
    Sizes of blocks are powers of two, and of spans where there are several; then the sequence is one document.
    """
    import jax
    import jax.numpy as jnp

    from jaxcoder.kernels.attention.schedule import Visits

    def shift(x, size: int):
        return jax.lax.shift_right_logical(x, jnp.int32(size.bit_length() - 1))

    first, zero = place[-1] * blocks.block_q, jnp.int32(0)
    start = zero if document is None else shift(first, document) * document
    ends, span = (first + 1, first + blocks.block_q), zero  # of the first and the last query of the block
    if num_spans > 1:
        span = jnp.minimum(place[-2], shift(ends[1] - 1, blocks.span_kv))
        ends = tuple(jnp.clip(end - place[-2] * blocks.span_kv, 0, blocks.span_kv) for end in ends)
    full = shift(start + blocks.block_kv - 1, blocks.block_kv)
    fulls = jnp.where(shift(ends[0], blocks.block_kv) > full, shift(ends[0], blocks.block_kv) - full, zero)
    edge, edge_end = shift(start, blocks.edge_kv), shift(ends[1] + blocks.edge_kv - 1, blocks.edge_kv)
    per_full = blocks.block_kv // blocks.edge_kv
    before = jnp.where(fulls > 0, full * per_full - edge, edge_end - edge)
    return Visits(
        edge=edge, edges_before=before, edges=edge_end - edge - fulls * per_full, full=full, fulls=fulls, span=span
    )


def visits_of(case: Case, segment_ids=None):
    """The schedule of a case, `schedule.Visits`; of real documents, ids (B, S), where they are given."""
    import jax.numpy as jnp
    import numpy as np

    from jaxcoder.kernels.attention.mask import AttentionContext, AttentionSpec
    from jaxcoder.kernels.attention.schedule import intervals, visits

    if segment_ids is None:
        documents = np.arange(case.length) // (case.document or case.length) + 1
        segment_ids = np.broadcast_to(documents, (case.batch, case.length))
    zero, ids, blocks = jnp.int32(0), jnp.asarray(segment_ids, jnp.int32), blocks_of(case)
    context = AttentionContext(
        segment_ids=ids, kv_segment_ids=ids, q_offset=zero, batch_offset=zero, head_offset=zero, dropout_key=None
    )
    seen = intervals(AttentionSpec(causal=True, scale=1.0, dropout_rate=0.0), context, *ids.shape, case.length)
    return visits(seen, blocks, -(-case.length // blocks.span_kv))


def steps(case: Case, segment_ids=None) -> tuple[float, ...]:
    """Counts of COUNTED over the whole grid of a case; of real documents, ids (B, S), where they are given.

    The backward kernel is called for one span at a time; an estimated case is the first call.
    """
    todo, blocks = visits_of(case, segment_ids), blocks_of(case)
    if case.kernel == "backward":
        todo = type(todo)(*(x[:, :1] for x in todo))
    folds = case.heads // blocks.heads
    return *(float(folds * x) for x in (todo.fulls.sum(), todo.edges.sum(), todo.fulls[:, 0].size)), 1.0
