"""What one training step of a dense decoder does on one device, by formula: FLOPs, memory traffic, transfers.

For jaxcoder's models and those of published runs (`published.py`): a decoder is described by its matrices.
Shapes: n tokens of a step on one device, D embed, F mlp, Q query heads x head_dim, U key/value heads x head_dim,
S sequence, L layers, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from jaxcoder.config import MeshConfig, ModelConfig, RunConfig
from jaxcoder.config.mesh import DimRules
from jaxcoder.train.memory_estimate import offloaded_per_token, saved_per_token

RULES = DimRules()
BF16, FP32 = 2, 4
BACKWARD_ATTENTION = 2.5
"""Five matmuls in the backward kernel to two in the forward one (Dao 2023)."""
RECOMPUTED = {
    "none": frozenset[str](),
    "minimal": frozenset[str](),
    "offload": frozenset[str](),
    "block": frozenset({"qkv", "attention", "out", "mlp_in"}),
}
"""Our remat policies -> what the backward pass computes again: projections, the attention kernel, the output
projection, the MLP's matrices but the last. Checked against the FLOPs of compiled programs (tests/plan)."""
TENSOR_SUMS = {"none": 4, "minimal": 5, "offload": 5, "block": 6}
"""Of jaxcoder's step: the inputs of attention and MLP, sharded along the sequence, are all-gathered again for the
gradients of their weights."""
ELEMENTWISE = (58, 17.5)
"""bf16 values per token and layer, in units of (D, F), that norms, residuals, activations and casts move to and from
memory in a step, recomputation included; operands and results of matmuls are not counted. With `tensor` half of the
values of D are sharded along the sequence."""
KEPT_TRAFFIC = 3.5
"""The same for each saved activation: the compiler writes and reads it as fp32."""
OPTIMIZER_BYTES = 50
"""A weight and step: gradient, weight and moments read, weight and moments written, the gradient divided and its norm
taken, 40 bytes at 0.8 of the bandwidth."""
MICROBATCH_BYTES = 24
"""A weight and microbatch: cast to bf16 in both passes, its gradient written."""
SCATTER_TILE = 16
"""Rows of a bf16 tile on a TPU. libtpu 0.0.52 all-reduces gradients whose shards over `fsdp` are not a multiple of it
(24 and 44 rows of published models, 72 of a tiny one); with 64, 96, 128 and 256 rows it reduce-scatters."""
ACCUMULATION_BYTES = 53
"""A weight and microbatch where there are several: gradients cleared, read and added to the sum. All five are what
the TPU compiler's own cycles come to for a dozen programs: the 15.5B model on v4, v5e, v5p (twice) and v6e, and a thin
one on v5e with three policies, two meshes and two microbatches (docs/performance.md)."""


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A dense decoder. mlp_matrices: 2 (GPT) or 3 (gated). tied: the head is the embedding."""

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    seq_len: int
    mlp_matrices: int = 2
    tied: bool = True

    @classmethod
    def of(cls, model: ModelConfig) -> "DecoderShape":
        names = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size")
        return cls(**{name: getattr(model, name) for name in names}, seq_len=model.max_seq_len)

    def shards_on(self, mesh: MeshConfig) -> Callable[[str], int]:
        """Dim -> its number of shards."""
        return partial(DimRules.for_heads(self.num_kv_heads).shards, mesh=mesh)

    @property
    def query_weights(self) -> int:
        return self.embed_dim * self.num_heads * self.head_dim

    @property
    def kv_weights(self) -> int:
        return 2 * self.embed_dim * self.num_kv_heads * self.head_dim

    @property
    def mlp_weights(self) -> int:
        return self.mlp_matrices * self.embed_dim * self.mlp_dim

    @property
    def head_weights(self) -> int:
        return self.vocab_size * self.embed_dim

    @property
    def block_weights(self) -> int:
        return 2 * self.query_weights + self.kv_weights + self.mlp_weights

    @property
    def weights(self) -> int:
        """Of matrices; norms, biases and positions are left out."""
        return self.num_layers * self.block_weights + self.head_weights * (1 if self.tied else 2)

    def attention_flops(self, *, causal: bool = True) -> float:
        """Forward, a token and layer, mean over the sequence."""
        return 4.0 * self.seq_len * self.num_heads * self.head_dim * (0.5 if causal else 1.0)

    def model_flops(self, *, causal: bool = True) -> float:
        """A token: 6 a weight of a matrix, three times the forward attention; nothing recomputed."""
        matrices = self.num_layers * self.block_weights + self.head_weights
        return 6.0 * matrices + 3.0 * self.num_layers * self.attention_flops(causal=causal)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a decoder is spread and what it keeps."""

    mesh: MeshConfig
    """Filled in."""
    batch: int
    """Sequences of a step."""
    microbatches: int = 1
    recomputed: frozenset[str] = frozenset()
    """Parts of a block that the backward pass computes again."""
    tensor_sums: int = 4
    """Sums over `tensor` of a layer: two of a block's outputs forward, two of its inputs backward, and what is gathered
    or summed again."""
    gradient_bytes: int = BF16
    """Of a gradient when it is reduce-scattered over `fsdp`: jaxcoder's are in the compute dtype."""
    kept: float | None = None
    """Values a token, layer and device that the backward pass finds kept; None: what `recomputed` leaves."""
    data_sums: int | None = None
    """How often a step sums gradients over `data`; None: in every microbatch. Ours: once, in fp32."""
    offloaded_bytes: float = 0.0
    """A token and layer, of one device: activations that the host's memory holds until the backward pass."""
    attention_dropout: bool = False
    """Whether the attention kernel draws a hash for every probability."""

    @classmethod
    def of(cls, config: RunConfig) -> "Layout":
        pieces = config.global_batch_size // (config.microbatch_size or config.global_batch_size)
        return cls(
            mesh=config.mesh, batch=config.global_batch_size, microbatches=pieces,
            recomputed=RECOMPUTED[config.compute.remat], tensor_sums=TENSOR_SUMS[config.compute.remat],
            gradient_bytes=BF16 if config.compute.dtype == "bfloat16" else FP32,
            offloaded_bytes=offloaded_per_token(config) * (BF16 if config.compute.dtype == "bfloat16" else FP32),
            kept=saved_per_token(config) + offloaded_per_token(config), data_sums=1,
            attention_dropout=config.model.attention_dropout > 0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """Of one step on one device. transfers: mesh axis -> bytes sent, as rings send them."""

    matmul_flops: float
    """Computed again included."""
    attention_flops: tuple[float, float]
    """(forward, again included; backward)."""
    memory_bytes: float
    """Traffic of what is no matmul."""
    host_bytes: float = 0.0
    """To the host's memory and back."""
    transfers: dict[str, float] = field(default_factory=dict)
    scattered: float = 0.0
    """Of what is sent over `fsdp`: gradients."""
    scatters_evenly: bool = True
    """Whether parts of the gradients fill tiles of memory (SCATTER_TILE)."""
    head_dim: int = 128
    attention_dropout: bool = False


def work_of(decoder: DecoderShape, layout: Layout) -> Work:
    """The formula. Sizes need not divide: a mesh that cannot be built still has its figures."""
    shards = decoder.shards_on(layout.mesh)
    tokens = layout.batch * decoder.seq_len / shards("batch")
    layers = decoder.num_layers
    block = 2 * decoder.query_weights / shards("heads") + decoder.mlp_weights / shards("mlp")
    block += decoder.kv_weights / shards("kv_heads")
    parts = {
        "qkv": decoder.query_weights / shards("heads") + decoder.kv_weights / shards("kv_heads"),
        "out": decoder.query_weights / shards("heads"),
        "mlp_in": (decoder.mlp_matrices - 1) * decoder.embed_dim * decoder.mlp_dim / shards("mlp"),
    }
    again = sum(weights for part, weights in parts.items() if part in layout.recomputed)
    head = decoder.head_weights / shards("vocab")
    matmul = tokens * (layers * (6 * block + 2 * again) + 6 * head)
    attention = tokens * layers * decoder.attention_flops() / shards("heads")
    forwards = 1 + ("attention" in layout.recomputed)

    of_d, of_f = ELEMENTWISE
    values = of_d * decoder.embed_dim * (1 + 1 / shards("seq")) / 2
    values += of_f * (decoder.mlp_matrices - 1) * decoder.mlp_dim / shards("mlp")
    values += KEPT_TRAFFIC * (_kept(decoder, layout) if layout.kept is None else layout.kept)
    of_weight = OPTIMIZER_BYTES + MICROBATCH_BYTES * layout.microbatches
    of_weight += ACCUMULATION_BYTES * layout.microbatches if layout.microbatches > 1 else 0
    shard = decoder.weights / (shards("embed") * shards("mlp"))
    memory = tokens * layers * BF16 * values + shard * of_weight
    transfers = _transfers(decoder, layout, tokens)
    gradients = layout.gradient_bytes / (2 * BF16 + layout.gradient_bytes)
    return Work(
        matmul_flops=matmul,
        attention_flops=(forwards * attention, BACKWARD_ATTENTION * attention),
        memory_bytes=memory,
        host_bytes=2 * tokens * layers * layout.offloaded_bytes,
        transfers=transfers,
        scattered=gradients * sum(transfers.get(axis, 0.0) for axis in RULES.of("embed")),
        scatters_evenly=decoder.embed_dim % (SCATTER_TILE * shards("embed")) == 0,
        head_dim=decoder.head_dim,
        attention_dropout=layout.attention_dropout,
    )


def _kept(decoder: DecoderShape, layout: Layout) -> float:
    """Values a token, layer and device: a block's input and the outputs of what is not computed again."""
    shards = decoder.shards_on(layout.mesh)
    of_queries = decoder.num_heads * decoder.head_dim / shards("heads")
    of_keys = decoder.num_kv_heads * decoder.head_dim / shards("kv_heads")
    parts = {
        "qkv": of_queries + 2 * of_keys, "attention": of_queries, "out": decoder.embed_dim,
        "mlp_in": (decoder.mlp_matrices - 1) * decoder.mlp_dim / shards("mlp"),
    }  # fmt: skip
    return decoder.embed_dim + sum(values for part, values in parts.items() if part not in layout.recomputed)


def _transfers(decoder: DecoderShape, layout: Layout, tokens: float) -> dict[str, float]:
    """Axis -> bytes that a device sends along it in a step, for the axes of more than one device."""
    shards = decoder.shards_on(layout.mesh)
    weights = decoder.weights / shards("mlp")
    found = {}
    for axis, size in layout.mesh.sizes.items():
        ring = (size - 1) / size
        if axis in RULES.of("embed"):
            # Weights are all-gathered in both passes and gradients reduce-scattered, in every microbatch.
            found[axis] = layout.microbatches * ring * weights * (2 * BF16 + layout.gradient_bytes)
        elif axis in RULES.of("batch"):
            # Gradients are all-reduced, already sharded over the other axes.
            summed = (
                layout.microbatches * layout.gradient_bytes if layout.data_sums is None else layout.data_sums * FP32
            )
            found[axis] = 2 * ring * weights / shards("embed") * summed
        else:
            # Activations are all-gathered and reduce-scattered around attention and MLP.
            sums = decoder.num_layers * layout.tensor_sums + 2
            found[axis] = 2 * ring * tokens * decoder.embed_dim * BF16 * sums
    return {axis: sent for axis, sent in found.items() if layout.mesh.sizes[axis] > 1}
