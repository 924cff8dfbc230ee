"""Published training runs with known speed, mesh, batch and recomputation, for comparison with the time model.

Sources: MaxText is github.com/AI-Hypercomputer/maxtext at e591f30, tpu-recipes is
github.com/AI-Hypercomputer/tpu-recipes at c8cfe2f. MaxText's `global_parameter_scale` and remat policies are defined in
its src/maxtext/configs/{base.yml,types.py}. `LACKING` lists runs that were left out, and why.
"""

from dataclasses import dataclass

from jaxcoder.config import MeshConfig
from jaxcoder.plan.workload import FP32, DecoderShape, Layout

# What MaxText's remat policies recompute.
FULL = frozenset({"qkv", "attention", "out", "mlp_in"})  # `full`: only a block's input is saved
CONTEXT = frozenset({"attention"})  # `minimal`: matmul outputs are saved
NOTHING = frozenset[str]()  # `minimal_with_context`
QKV_SAVED = frozenset({"attention", "out", "mlp_in"})  # `qkv_proj_offloaded`, custom: a block's input, q, k, v
QKV_OUT_SAVED = frozenset({"attention", "mlp_in"})  # custom: the output projection too


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One run. Its speed is given by `seconds` per step or by `tflops` per chip."""

    name: str
    topology: str
    num_slices: int = 1
    decoder: DecoderShape
    layout: Layout
    attention: str
    """The kernel, as in time_model.ATTENTION."""
    seconds: float | None = None
    tflops: float | None = None
    """Per chip. MaxText counted attention without the causal half until July 2025 (its PR 1988)."""
    network_bandwidth: float | None = None
    """Topology.network_bandwidth, where the cluster's differs from the chip's default."""
    source: str

    def step_seconds(self, chips: int) -> float:
        if self.seconds is not None:
            return self.seconds
        if self.tflops is None:
            raise ValueError(f"{self.name} has neither seconds nor tflops")
        tokens = self.layout.batch * self.decoder.seq_len
        return tokens * self.decoder.model_flops(causal=False) / chips / (self.tflops * 1e12)


def _llama(layers: int, embed: int, heads: int, kv: int, mlp: int, vocab: int, seq_len: int) -> DecoderShape:
    return DecoderShape(
        num_layers=layers, embed_dim=embed, num_heads=heads, num_kv_heads=kv, head_dim=128, mlp_dim=mlp,
        vocab_size=vocab, seq_len=seq_len, mlp_matrices=3, tied=False,
    )  # fmt: skip


def _layout(batch: int, recomputed: frozenset[str], mesh: MeshConfig) -> Layout:
    return Layout(mesh=mesh, batch=batch, recomputed=recomputed, gradient_bytes=FP32)


# MaxText's GPT of `global_parameter_scale` billion parameters is a Llama without grouped queries.
GPT_16B = _llama(32, 4096, 64, 64, 28672, 32000, 2048)
GPT_32B = _llama(32, 8192, 64, 64, 28672, 32000, 2048)
GPT_64B = _llama(64, 8192, 64, 64, 28672, 32000, 2048)
LLAMA2_7B = _llama(32, 4096, 32, 32, 11008, 32000, 4096)
LLAMA2_70B = _llama(80, 8192, 64, 8, 28672, 32000, 4096)
LLAMA31_8B = _llama(32, 4096, 32, 8, 14336, 128256, 8192)
LLAMA31_70B = _llama(80, 8192, 64, 8, 28672, 128256, 8192)
MISTRAL_7B = _llama(32, 4096, 32, 8, 14336, 32000, 8192)

_V5E = "MaxText, src/maxtext/configs/tpu/v5e/README.md and {}b.sh"
_V5P = "MaxText, src/maxtext/configs/tpu/v5p/README.md and {}b.sh"
_TRILLIUM = "tpu-recipes, training/trillium/{}/README.md"
_A3 = "MaxText, src/maxtext/configs/gpu/a3/llama_2_7b/README.md and {}.sh, configs/gpu/models/llama2_7b.yml"

RUNS = (
    PublishedRun(
        name="GPT 16B, v5e-256", topology="v5e:16x16", decoder=GPT_16B, attention="splash", tflops=120,
        layout=_layout(256 * 6, FULL, MeshConfig(fsdp=256)), source=_V5E.format(16),
    ),
    PublishedRun(
        name="GPT 16B, 8 x v5e-256", topology="v5e:16x16", num_slices=8, decoder=GPT_16B, attention="splash",
        tflops=115, layout=_layout(8 * 256 * 6, FULL, MeshConfig(data=8, fsdp=256)), source=_V5E.format(16),
    ),
    PublishedRun(
        name="GPT 32B, v5e-256", topology="v5e:16x16", decoder=GPT_32B, attention="splash", tflops=132,
        layout=_layout(256 * 4, FULL, MeshConfig(fsdp=256)), source=_V5E.format(32),
    ),
    PublishedRun(
        name="GPT 64B, v5e-256", topology="v5e:16x16", decoder=GPT_64B, attention="splash", tflops=118,
        layout=_layout(256 * 2, FULL, MeshConfig(fsdp=256)), source=_V5E.format(64),
    ),
    PublishedRun(
        name="GPT 32B, v5p-128 (64 chips)", topology="v5p:4x4x4", decoder=GPT_32B, attention="splash", tflops=328,
        layout=_layout(64 * 6, CONTEXT, MeshConfig(fsdp=16, tensor=4)), source=_V5P.format(32),
    ),
    PublishedRun(
        name="GPT 64B, v5p-128 (64 chips)", topology="v5p:4x4x4", decoder=GPT_64B, attention="splash", tflops=323,
        layout=_layout(64 * 3, CONTEXT, MeshConfig(fsdp=16, tensor=4)), source=_V5P.format(64),
    ),
    PublishedRun(
        name="Llama 3.1 8B, v6e-256", topology="v6e:16x16", decoder=LLAMA31_8B, attention="splash", seconds=4.546,
        layout=_layout(256 * 4, QKV_OUT_SAVED, MeshConfig(fsdp=256)),
        source=_TRILLIUM.format("Llama3.1-8B-MaxText/v6e-256"),
    ),
    PublishedRun(
        name="Llama 3.1 70B, v6e-256", topology="v6e:16x16", decoder=LLAMA31_70B, attention="splash", seconds=42.656,
        layout=_layout(256 * 5, QKV_SAVED, MeshConfig(fsdp=256)),
        source=_TRILLIUM.format("Llama3.1-70B-MaxText/v6e-256"),
    ),
    PublishedRun(
        name="Mistral 7B, v6e-8", topology="v6e:2x4", decoder=MISTRAL_7B, attention="splash", seconds=6.320,
        layout=_layout(8 * 6, QKV_OUT_SAVED, MeshConfig(fsdp=8)), source=_TRILLIUM.format("Mistral-7B-MaxText"),
    ),
    PublishedRun(
        name="Llama 2 70B, v6e-256", topology="v6e:16x16", decoder=LLAMA2_70B, attention="splash", seconds=9.052,
        layout=_layout(256 * 2, QKV_SAVED, MeshConfig(fsdp=256)),
        source=_TRILLIUM.format("Llama2-70B-MaxText") + " (2 sequences a chip, by the tokens per second of its log)",
    ),
    PublishedRun(
        name="Llama 3.1 70B, 64 TPU7x", topology="tpu7x:4x4x4", decoder=LLAMA31_70B, attention="splash", seconds=12.20,
        layout=_layout(256, QKV_SAVED, MeshConfig(fsdp=128)),
        source="tpu-recipes, training/ironwood/README.md and llama3.1-70b/8k-bf16-tpu7x-4x4x4",
    ),
    PublishedRun(
        name="Llama 2 7B, 8 x H100", topology="h100:1x8", decoder=LLAMA2_7B, attention="flash", tflops=492,
        layout=_layout(8 * 4, NOTHING, MeshConfig(fsdp=8)), source=_A3.format("1vm"),
    ),
    PublishedRun(
        name="Llama 2 7B, 128 x H100 (A3)", topology="h100:16x8", decoder=LLAMA2_7B, attention="flash", tflops=375,
        layout=_layout(128 * 4, NOTHING, MeshConfig(data=16, fsdp=8)),
        network_bandwidth=12.5e9,  # A3 High: 4 x 200 Gbit/s a node
        source=_A3.format("16vm"),
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OriginalRun:
    """StarCoderBase as BigCode trained it."""

    topology: str = "a100:64x8"
    parameters: int = 15_517_456_384
    gpu_hours: int = 320_256
    steps: int = 250_000
    tokens_per_step: int = 512 * 8192
    source: str = "Li et al. 2023, arXiv 2305.06161: GPU hours, restarts included; BigCode's pretraining script"

    @property
    def tokens_per_second(self) -> float:
        """Per GPU, from steps, batch and GPU hours."""
        return self.steps * self.tokens_per_step / (self.gpu_hours * 3600)


STARCODER = OriginalRun()


# Runs that were left out: (name, published figure, what is missing).
LACKING = (
    ("MaxText 22B and 52B, v4", "156 and 154 TFLOP/s", "head size and MLP of the measured version: its current script "
     "does not give 22e9 parameters"),
    ("MaxText Llama 2 70B, 512 v5p", "65.4 %", "batch: 2 in its table of models, 4 in its script"),
    ("MaxText Gemma 3 12B, v6e-256", "349 TFLOP/s", "alternating local attention, which is not modelled"),
    ("AXLearn Llama 2 7B, 256 H100 and v5p-512", "1.4 and 2.5 s", "batch and recomputation"),
    ("JAX-Toolbox Llama 2 7B, 8 H100", "0.721 s", "recomputation and mesh"),
    ("Levanter 1.4B to 20B, v3-256", "41.7 to 54.4 %", "microbatches, and the v3's links"),
    ("torchtitan Llama 3.1 8B, 8 H100", "5,762 tokens/s", "recomputation of its operator-level checkpointing"),
    ("Megatron-LM 22B and 175B, A100", "41.5 and 51.4 %", "attention was no flash kernel; pipeline stages"),
    ("nanotron 1B, 8 H100", "33,000 tokens/s", "sequence length and recomputation"),
    ("StarCoderBase 15.5B, 512 A100", f"{STARCODER.tokens_per_second:,.0f} tokens/s",
     "pipeline stages are not modelled; its GPU hours include restarts"),
)  # fmt: skip
