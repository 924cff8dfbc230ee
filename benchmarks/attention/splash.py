"""JAX's own splash attention as cases of the estimator: causal, one key/value head.

Its tables of blocks lie in scalar cache, which the estimator reads as 0, so they are replaced by arithmetic on the
grid's indices: the same blocks are visited, and the same ones are fetched ahead. Its
backward is two kernels, dkv and dq.
"""

from benchmarks.attention.cycles import Case

KERNELS = ("forward", "inference", "dkv", "dq")
"""`inference` is the forward kernel without the log-sum-exp, which jaxcoder always writes, and without segment ids."""
FLOP = {"forward": 4, "inference": 4, "dkv": 8, "dq": 6}
"""Of the matmuls that the kernel runs, two, four or three; see flash_tpu.FLOP."""
COUNTED = ("tiles", "blocks of queries")

SETTINGS: dict[str, dict[str, dict[str, int]]] = {
    "v6e": {
        "forward": {"block_q": 2048, "block_kv": 2048, "block_kv_compute": 512, "k_layout": 2},
        "inference": {"block_q": 2048, "block_kv": 2048, "block_kv_compute": 512, "k_layout": 2},
        "dkv": {"block_q": 2048, "block_kv": 2048, "block_kv_compute": 2048, "k_layout": 1},
        "dq": {"block_q": 2048, "block_kv": 2048},
    },
    "v5p": {
        "forward": {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 256, "k_layout": 2},
        "inference": {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 256, "k_layout": 2},
        "dkv": {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 1024, "k_layout": 1},
        "dq": {"block_q": 1024, "block_kv": 1024},
    },
}
"""Device -> kernel -> the best settings that tune.py found."""


def choices(kernel: str) -> dict[str, tuple[int, ...]]:
    """Values that tune.py tries. k_layout: 1 head_dim in lanes, 2 positions in lanes."""
    blocks = {"block_q": (512, 1024, 2048), "block_kv": (512, 1024, 2048)}
    if kernel == "dq":  # it has no steps within a block
        return blocks
    return blocks | {"block_kv_compute": (256, 512, 1024, 2048), "k_layout": (1, 2)}


def allows(kernel: str, settings: dict[str, int]) -> bool:
    return settings.get("block_kv_compute", 0) <= settings["block_kv"]


def trace(case: Case):
    """See `cycles.implementation`."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    settings = dict(case.settings)
    block_q, block_kv = settings["block_q"], settings["block_kv"]
    compute, k_layout = settings.get("block_kv_compute", block_kv), splash.QKVLayout(settings.get("k_layout", 1))
    if case.is_estimated:
        splash._next_nonzero = _arithmetic(block_q, block_kv)
    kernel = splash.make_splash_mqa_single_device(
        mask=masks.MultiHeadMask([masks.CausalMask((case.length, case.length))] * case.heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_kv_compute=compute,
            block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=compute,
            block_q_dq=block_q, block_kv_dq=block_kv, k_layout=k_layout,
        ),
    )  # fmt: skip

    def forward(q, k, v, ids):
        return kernel(q, k, v, splash.SegmentIds(ids, ids) if case.segments else None)

    def both(q, k, v, ids):
        return jax.vjp(lambda *x: forward(*x, ids), q, k, v)[1](q)

    q = jax.ShapeDtypeStruct((case.heads, case.length, case.head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((case.length, case.head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((case.length,), jnp.int32)
    function = forward if case.kernel == "inference" else both
    return function, (q, kv, kv, ids), {"dkv": "_dkv", "dq": "_dq"}.get(case.kernel, "_fwd")


def _arithmetic(block_q: int, block_kv: int):
    """For splash's `_next_nonzero`: (block to fetch, block of the mask, visit?, skip the mask?), causal."""
    import jax
    import jax.numpy as jnp

    def next_nonzero(head, i, j, data_next, block_mask, mask_next, next_i=False):
        if next_i:  # the grid walks over queries: what is skipped comes first, and the first visit is fetched ahead
            is_visited = (i + 1) * block_q > j * block_kv
            first = jax.lax.shift_right_logical(j * block_kv, jnp.int32(block_q.bit_length() - 1))
            return jnp.where(is_visited, i, first), None, is_visited, False
        is_visited = j * block_kv < (i + 1) * block_q
        return jnp.where(is_visited, j, 0), None, is_visited, False

    return next_nonzero


def steps(case: Case, segment_ids=None) -> tuple[float, ...]:
    """Counts of COUNTED: documents change nothing, every tile with a causal entry is visited."""
    block_q, block_kv = case.option("block_q"), case.option("block_kv")
    rows = case.length // block_q
    tiles = sum(min(-(-(i + 1) * block_q // block_kv), case.length // block_kv) for i in range(rows))
    return float(case.batch * case.heads * tiles), float(case.batch * case.heads * rows)
