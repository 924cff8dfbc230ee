"""What one training step of a dense decoder does on one device, by formula: FLOPs, memory traffic, transfers.

For jaxcoder's models and those of published runs (`published.py`): a decoder is described by its matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from jaxcoder.config import MeshConfig, ModelConfig, RunConfig
from jaxcoder.config.mesh import DimRules
from jaxcoder.train.memory_estimate import offloaded_per_token, saved_per_token

RULES = DimRules()
BF16, FP32 = 2, 4  # bytes

# FLOPs of the backward attention kernel relative to the forward: five matmuls to two (Dao 2023).
BACKWARD_ATTENTION = 2.5

# Remat policy -> operations of a block that the backward pass recomputes: q, k, v projections, attention kernel, output
# projection, all MLP matrices but the last. Checked against the FLOPs of compiled programs (tests/plan).
RECOMPUTED = {
    "none": frozenset[str](),
    "minimal": frozenset[str](),
    "offload": frozenset[str](),
    "block": frozenset({"qkv", "attention", "out", "mlp_in"}),
}

# Remat policy -> all-reduces over `tensor` in a layer (each a reduce-scatter and an all-gather). Four is Megatron's
# number; the inputs of attention and MLP, sharded along the sequence, are all-gathered again for weight gradients.
TENSOR_ALL_REDUCES = {"none": 4, "minimal": 5, "offload": 5, "block": 6}

# The five constants of memory traffic below were fitted to the TPU compiler's own cycles of a dozen programs: the 15.5B
# model on v4, v5e, v5p (twice) and v6e, a thin one on v5e with three policies, two meshes and two microbatches
# (docs/performance.md).

# bf16 values per token and layer, in units of (embed_dim, mlp_dim), read and written by norms, residuals, activations
# and casts in a step, recomputation included; operands and results of matmuls are not counted.
ELEMENTWISE = (58, 17.5)
# The same per saved activation, which the compiler writes and reads as fp32.
SAVED_TRAFFIC = 3.5
# Bytes per weight and step: gradient, weight and moments read, weight and moments written, the gradient divided and its
# norm taken: 40 bytes at 0.8 of the bandwidth.
OPTIMIZER_BYTES = 50
# Bytes per weight and microbatch: cast to bf16 in both passes, gradient written.
MICROBATCH_BYTES = 24
# Bytes per weight and microbatch if there are several: gradients cleared, read and added to the sum.
ACCUMULATION_BYTES = 53

# Rows of a bf16 tile on a TPU. libtpu 0.0.52 all-reduces gradients whose shards over `fsdp` are not a multiple of it
# (24 and 44 rows of published models, 72 of a tiny one); shards of 64, 96, 128 and 256 rows are reduce-scattered.
SCATTER_TILE = 16


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
        """Of the query projection, and of the output projection."""
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
        """Forward FLOPs per token and layer, mean over the sequence."""
        return 4.0 * self.seq_len * self.num_heads * self.head_dim * (0.5 if causal else 1.0)

    def model_flops(self, *, causal: bool = True) -> float:
        """FLOPs per token without recomputation: 6 per weight of a matrix, three times the forward attention."""
        matrices = self.num_layers * self.block_weights + self.head_weights
        return 6.0 * matrices + 3.0 * self.num_layers * self.attention_flops(causal=causal)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a step of a decoder is sharded, and what it saves for the backward pass."""

    mesh: MeshConfig
    """With all sizes known."""
    batch: int
    """Sequences per step."""
    microbatches: int = 1
    recomputed: frozenset[str] = frozenset()
    """Operations of a block that the backward pass recomputes, as in RECOMPUTED."""
    tensor_all_reduces: int = 4
    """Per layer, as in TENSOR_ALL_REDUCES."""
    gradient_bytes: int = BF16
    """Per gradient when it is reduce-scattered over `fsdp`; jaxcoder's are in the compute dtype."""
    saved_values: float | None = None
    """Activations per token, layer and device that the backward pass reads; None: what `recomputed` leaves."""
    gradient_all_reduces: int | None = None
    """All-reduces of fp32 gradients over `data` per step; None: one per microbatch, of gradient_bytes."""
    offloaded_bytes: float = 0.0
    """Activations per token, layer and device that are in host memory until the backward pass."""
    attention_dropout: bool = False
    """Whether the attention kernel computes a hash for every probability."""

    @classmethod
    def of(cls, config: RunConfig) -> "Layout":
        value_bytes = BF16 if config.compute.dtype == "bfloat16" else FP32
        offloaded = offloaded_per_token(config)
        return cls(
            mesh=config.mesh, batch=config.global_batch_size,
            microbatches=config.global_batch_size // (config.microbatch_size or config.global_batch_size),
            recomputed=RECOMPUTED[config.compute.remat], tensor_all_reduces=TENSOR_ALL_REDUCES[config.compute.remat],
            gradient_bytes=value_bytes, offloaded_bytes=offloaded * value_bytes,
            saved_values=saved_per_token(config) + offloaded, gradient_all_reduces=1,
            attention_dropout=config.model.attention_dropout > 0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one step on one device. transfers: mesh axis -> bytes sent by ring algorithms."""

    matmul_flops: float
    """Recomputation included."""
    attention_flops: tuple[float, float]
    """(forward with recomputation, backward)."""
    memory_bytes: float
    """Traffic outside matmuls and attention."""
    host_bytes: float = 0.0
    """To host memory and back."""
    transfers: dict[str, float] = field(default_factory=dict)
    scattered: float = 0.0
    """Gradients, of the bytes sent over `fsdp`."""
    scatters_evenly: bool = True
    """Whether shards of the gradients fill tiles of memory (SCATTER_TILE)."""
    head_dim: int = 128
    attention_dropout: bool = False


def work_of(decoder: DecoderShape, layout: Layout) -> Work:
    """The work by formula. Sizes need not be divisible by their shards."""
    shards = decoder.shards_on(layout.mesh)
    tokens = layout.batch * decoder.seq_len / shards("batch")
    layer_tokens = tokens * decoder.num_layers

    # Weights of a block on one device. KV heads may be replicated, so they have a number of shards of their own.
    queries = decoder.query_weights / shards("heads")
    keys_values = decoder.kv_weights / shards("kv_heads")
    mlp = decoder.mlp_weights / shards("mlp")
    mlp_in = (decoder.mlp_matrices - 1) * decoder.embed_dim * decoder.mlp_dim / shards("mlp")

    # Matmuls: 2 FLOPs per token and weight forward, 4 backward, 2 more for each matrix that is recomputed.
    matrices = {"qkv": queries + keys_values, "out": queries, "mlp_in": mlp_in}
    again = sum(weights for name, weights in matrices.items() if name in layout.recomputed)
    head = decoder.head_weights / shards("vocab")
    matmul = layer_tokens * (6 * (2 * queries + keys_values + mlp) + 2 * again) + tokens * 6 * head

    attention = layer_tokens * decoder.attention_flops() / shards("heads")
    forwards = 1 + ("attention" in layout.recomputed)

    # Elementwise traffic per token and layer. Half of the values of embed_dim are sharded along the sequence.
    per_embed, per_mlp = ELEMENTWISE
    values = per_embed * decoder.embed_dim * (1 + 1 / shards("seq")) / 2
    values += per_mlp * (decoder.mlp_matrices - 1) * decoder.mlp_dim / shards("mlp")
    saved = _saved_values(decoder, layout) if layout.saved_values is None else layout.saved_values
    values += SAVED_TRAFFIC * saved
    # Traffic per weight of this device's shard: optimizer, casts, accumulation.
    weight_bytes = OPTIMIZER_BYTES + MICROBATCH_BYTES * layout.microbatches
    weight_bytes += ACCUMULATION_BYTES * layout.microbatches if layout.microbatches > 1 else 0
    weights = decoder.weights / (shards("embed") * shards("mlp"))

    transfers = _transfers(decoder, layout, tokens)
    # Over `fsdp` two all-gathers of bf16 weights and one reduce-scatter of gradients are sent.
    gradients = layout.gradient_bytes / (2 * BF16 + layout.gradient_bytes)
    return Work(
        matmul_flops=matmul,
        attention_flops=(forwards * attention, BACKWARD_ATTENTION * attention),
        memory_bytes=layer_tokens * BF16 * values + weights * weight_bytes,
        host_bytes=2 * layer_tokens * layout.offloaded_bytes,
        transfers=transfers,
        scattered=gradients * sum(transfers.get(axis, 0.0) for axis in RULES.of("embed")),
        scatters_evenly=decoder.embed_dim % (SCATTER_TILE * shards("embed")) == 0,
        head_dim=decoder.head_dim,
        attention_dropout=layout.attention_dropout,
    )


def _saved_values(decoder: DecoderShape, layout: Layout) -> float:
    """Values per token, layer and device: a block's input and the outputs of what is not recomputed."""
    shards = decoder.shards_on(layout.mesh)
    queries = decoder.num_heads * decoder.head_dim / shards("heads")
    keys = decoder.num_kv_heads * decoder.head_dim / shards("kv_heads")
    outputs = {
        "qkv": queries + 2 * keys, "attention": queries, "out": decoder.embed_dim,
        "mlp_in": (decoder.mlp_matrices - 1) * decoder.mlp_dim / shards("mlp"),
    }  # fmt: skip
    return decoder.embed_dim + sum(values for name, values in outputs.items() if name not in layout.recomputed)


def _transfers(decoder: DecoderShape, layout: Layout, tokens: float) -> dict[str, float]:
    """Axis -> bytes that a device sends along it in a step, for the axes of more than one device."""
    shards = decoder.shards_on(layout.mesh)
    weights = decoder.weights / shards("mlp")
    found = {}
    for axis, size in layout.mesh.sizes.items():
        if size == 1:
            continue
        # A ring of n devices sends (n - 1) / n of the bytes in an all-gather or reduce-scatter, twice that in an
        # all-reduce.
        ring = (size - 1) / size
        if axis in RULES.of("embed"):
            # Weights are all-gathered in both passes and gradients reduce-scattered, in every microbatch.
            found[axis] = layout.microbatches * ring * weights * (2 * BF16 + layout.gradient_bytes)
        elif axis in RULES.of("batch"):
            # Gradients, already sharded over the other axes, are all-reduced.
            if layout.gradient_all_reduces is None:
                gradient_bytes = layout.microbatches * layout.gradient_bytes
            else:
                gradient_bytes = layout.gradient_all_reduces * FP32
            found[axis] = 2 * ring * weights / shards("embed") * gradient_bytes
        else:
            # Activations around attention and MLP of each layer, and of the embedding and the head.
            all_reduces = decoder.num_layers * layout.tensor_all_reduces + 2
            found[axis] = 2 * ring * tokens * decoder.embed_dim * BF16 * all_reduces
    return found
