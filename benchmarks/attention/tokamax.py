"""tokamax's splash attention (extra `bench-tpu`) as cases of the estimator: forward, and the fused backward kernel.

Its tables of blocks lie in scalar cache, which the estimator reads as 0, but with a full mask it has none: every tile
is visited without a mask. That cost of a tile times the tiles that its own rule visits under a causal mask and
documents is a bound from below of what it takes: masks, the sorting of its tables and the sums outside come on top.
"""

from benchmarks.attention.cycles import Case

KERNELS = ("forward", "dkv")
FLOP = {"forward": 4, "dkv": 10}
"""See flash_tpu.FLOP; its dkv kernel makes dQ too."""
COUNTED = ("tiles", "blocks of queries")

SETTINGS: dict[str, dict[str, dict[str, int]]] = {
    "v6e": {
        "forward": {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 512, "k_layout": 2, "scheduler": 1},
        "dkv": {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 512, "k_layout": 1, "scheduler": 1},
    },
    "v5p": {
        "forward": {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 256, "k_layout": 2, "scheduler": 1},
        "dkv": {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 512, "k_layout": 1, "scheduler": 1},
    },
}
"""Device -> kernel -> the best settings that tune.py found."""


def choices(kernel: str) -> dict[str, tuple[int, ...]]:
    """Values that tune.py tries. k_layout: 1 head_dim, 2 positions in lanes; scheduler: 1 the experimental one."""
    return {
        "block_q": (512, 1024, 2048),
        "block_kv": (512, 1024, 2048),
        "block_kv_compute": (256, 512, 1024, 2048),
        "k_layout": (1, 2),
        "scheduler": (0, 1),
    }


def allows(kernel: str, settings: dict[str, int]) -> bool:
    return settings["block_kv_compute"] <= settings["block_kv"]


def trace(case: Case):
    """See `cycles.implementation`. A full mask; with `segments`, ids are compared in every tile."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.experimental.tpu.splash_attention import base
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    if case.segments and case.is_estimated:
        # Its schedule of documents is data, so every tile is visited, and the ids are compared in every tile.
        splash._refine_mask_info_with_segments = lambda info, *_, **__: (info, None, None)
    names = ("block_q", "block_kv", "block_kv_compute")
    block_q, block_kv, compute = (case.option(name) for name in names)
    kernel = splash.make_splash_mqa_single_device(
        mask=masks.FullMask((case.length, case.length)),
        config=splash.SplashConfig(
            block_q=block_q, block_kv=block_kv, block_kv_compute=compute,
            block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=compute,
            k_layout=splash.QKVLayout(case.option("k_layout")),
            use_experimental_scheduler=bool(case.option("scheduler")),
        ),
    )  # fmt: skip

    def both(q, k, v, ids):
        segments = base.SegmentIds(ids, ids) if case.segments else None
        return jax.vjp(lambda *x: kernel(*x, segment_ids=segments), q, k, v)[1](q)

    q = jax.ShapeDtypeStruct((case.heads, case.length, case.head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((case.length, case.head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((case.length,), jnp.int32)
    return both, (q, kv, kv, ids), {"forward": "_fwd", "dkv": "_dkv"}[case.kernel]


def full_steps(case: Case) -> tuple[float, ...]:
    """Counts of COUNTED in the estimated program, whose mask is full."""
    rows, columns = case.length // case.option("block_q"), case.length // case.option("block_kv")
    return float(case.heads * rows * columns), float(case.heads * rows)


def visited(case: Case, segment_ids=None):
    """bool (rows, columns): the tiles visited under a causal mask and, where they are given, documents, ids (B, S).

    The rule is tokamax's `_refine_mask_info_with_segments`: a tile is visited if the intervals from the least to the
    greatest id of its queries and of its keys meet, in any row of the batch, for the batch has one schedule.
    """
    import numpy as np

    block_q, block_kv = case.option("block_q"), case.option("block_kv")
    rows, columns = np.arange(case.length // block_q), np.arange(case.length // block_kv)
    tiles = (rows[:, None] + 1) * block_q > columns * block_kv
    if segment_ids is None:
        return tiles
    of_q, of_kv = (np.asarray(segment_ids).reshape(len(segment_ids), -1, size) for size in (block_q, block_kv))
    least_q, most_q, least_kv, most_kv = of_q.min(-1), of_q.max(-1), of_kv.min(-1), of_kv.max(-1)
    meets = (most_q[:, :, None] >= least_kv[:, None]) & (most_kv[:, None] >= least_q[:, :, None])
    return tiles & meets.any(0)


def steps(case: Case, segment_ids=None) -> tuple[float, ...]:
    """Counts of COUNTED over the visited tiles; every sequence of the batch visits the same ones."""
    batch = case.batch if segment_ids is None else len(segment_ids)
    tiles = visited(case, segment_ids)
    return float(batch * case.heads * tiles.sum()), float(batch * case.heads * len(tiles))
