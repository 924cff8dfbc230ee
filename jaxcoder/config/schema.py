"""The configuration of a run: frozen, keyword-only dataclasses.

A run is a Python function in `configs/` that returns a `RunConfig`; the command line overrides single fields
(`--optimizer.peak-learning-rate 3e-4`). The string under a field is its documentation, also in `--help`. Constraints on
one field are given with it (`positive`, `between`, ...); constraints between fields are in validate.py.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxcoder.config.fields import below_one, between, non_empty, non_negative, positive
from jaxcoder.config.mesh import MeshConfig

Activation = Literal["gelu_tanh", "gelu"]
AttentionBackend = Literal["reference", "blockwise", "flash_tpu", "cudnn"]
RematPolicy = Literal["none", "minimal", "offload", "block"]
Dtype = Literal["bfloat16", "float32"]
OptimizerName = Literal["adamw", "muon"]
XlaOptions = Literal["chip", "none"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, GPTBigCode: pre-norm decoder, learned absolute positions, tied embeddings, biases."""

    num_layers: int = positive()
    embed_dim: int = positive(dim="embed")
    num_heads: int = positive(dim="heads")
    head_dim: int = positive()
    """Size of one head; num_heads * head_dim equals embed_dim in every published model of the family."""
    mlp_dim: int = positive(dim="mlp")
    num_kv_heads: int = positive(1, dim="kv_heads")
    """1 is multi-query attention; num_heads is multi-head."""
    vocab_size: int = positive(49152, dim="vocab")
    max_seq_len: int = positive(8192, dim="seq")
    """Rows of the position table, and the length of a training window."""
    activation: Activation = "gelu_tanh"
    """StarCoder was trained with the tanh approximation; some published configs name the exact form ("gelu")."""
    layer_norm_epsilon: float = positive(1e-5)
    embed_dropout: float = below_one(0.1)
    residual_dropout: float = below_one(0.1)
    attention_dropout: float = below_one(0.1)
    init_std: float = positive(0.02)
    """Standard deviation of the initial weights; residual outputs get init_std / sqrt(2 * num_layers)."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed. No field changes the result beyond rounding."""

    dtype: Dtype = "bfloat16"
    """Type of matmul inputs and activations. Weights, softmax, norms and loss are always fp32."""
    remat: RematPolicy = "minimal"
    """What the backward pass recomputes: "none" saves all activations, "minimal" saves the matmul outputs (q, kv,
    attention output, MLP up), "offload" saves the same in the host's memory, "block" saves only the input of each
    block."""
    attention: AttentionBackend | None = None
    """The attention backend; None selects the best one for the device and shape."""
    loss_chunk_tokens: int = positive(1024)
    """Tokens per device in one chunk of the cross-entropy: the logits of one chunk exist at a time."""
    xla_options: XlaOptions = "chip"
    """"chip" compiles the training step with the options chosen for the device (train/xla_options.py), "none" with
    XLA's defaults."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One corpus of a mixture."""

    store: str = non_empty()
    """Directory of its token store."""
    weight: float | None = non_negative(None)
    """Share of the samples, relative to the weights of the other corpora. None for all means by number of tokens."""
    max_epochs: float | None = positive(None)
    """Read at most this many times (0.25 is a quarter of it); the other corpora then take its share."""
    name: str = ""
    """Name in the held-out metrics; "" means the last component of `store`."""
    eval_store: str | None = None
    """Token store of its held-out documents, evaluated in addition to data.eval_store."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings that apply from a sample until the next stage begins."""

    from_sample: int
    """Samples consumed before the stage; the first stage starts at 0. A stage takes effect at the next step."""
    weights: tuple[float, ...] = non_negative(())
    """A weight for each of data.corpora; () means the weights given there."""
    global_batch_size: int | None = positive(None, dim="batch")
    """Windows per optimizer step; None means the run's."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and held-out data."""

    store: str = ""
    """Directory of the token store made by `jaxcoder data build` (local, gs:// or s3://), or "synthetic"."""
    corpora: tuple[Corpus, ...] = ()
    """Several stores instead of one, with weights and caps. Their order affects the samples: append new ones."""
    stages: tuple[Stage, ...] = ()
    """Weights and batch sizes that change during the run, by samples consumed; () is a single stage."""
    eval_store: str | None = None
    """Token store of held-out documents; None turns held-out evaluation off."""
    fim_rate: float = between(0, 1, 0.5)
    """Share of the pieces of a window that are transformed to fill-in-the-middle."""
    fim_spm_rate: float = between(0, 1, 0.5)
    """Share of the transformed pieces in SPM order (suffix first); the others are in PSM order."""
    fim_clean_up: bool = False
    """As trained: spaces in " .", " n't" and the like are removed before the cut (a decoder's clean-up of spaces)."""
    fim_sentinels_as_text: bool = False
    """As trained: special tokens are cut as text, and text that spells a special token becomes one."""
    fim_replace_incomplete: bool = False
    """As trained: an incomplete character at the edge of a window becomes U+FFFD. False keeps its tokens."""
    fim_drop_empty_pieces: bool = False
    """As trained: an empty piece is dropped together with its end token."""
    fim_transform_empty_tail: bool = False
    """As trained: an empty piece after the last end token may become three FIM tokens with nothing between them."""
    pad_in_loss: bool = False
    """As trained: the padding at the right end of a window counts in the loss."""
    document_mask: bool = False
    """Restrict attention and positions to one document. False, as StarCoder was trained: they span the window."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up and cosine decay; weight decay on matrices only (not on biases and norms)."""

    name: OptimizerName = "adamw"
    """"muon" orthogonalizes the updates of the layers' matrices (momentum 0.95, scaled to the size of AdamW's updates,
    so that the same learning rate and decay fit); embeddings, biases and norms use Adam."""
    peak_learning_rate: float = non_negative(3e-4)
    final_learning_rate: float = non_negative(3e-5)
    warmup_steps: int = non_negative(2000)
    decay_steps: int | None = positive(None)
    """Step at which the cosine reaches the final learning rate; None means the last step."""
    beta1: float = below_one(0.9)
    beta2: float = below_one(0.95)
    epsilon: float = positive(1e-8)
    weight_decay: float = non_negative(0.1)
    max_grad_norm: float = positive(1.0)
    """Gradients are clipped to this global norm."""
    max_skipped_steps: int = positive(10)
    """Steps with a non-finite loss or gradient are skipped; this many in a row end the run with an error."""
    skip_grad_norm_above: float | None = positive(None)
    """Also skip steps whose gradient norm before clipping is above this, to avoid loss spikes. None: no limit."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    save_every_steps: int = positive(1000)
    save_every_seconds: float | None = positive(None)
    """Also save this many seconds after the last save."""
    keep_last: int = positive(2)
    """Number of newest checkpoints to keep; the last one of the run is always kept."""
    keep_every_steps: int | None = positive(None)
    """Checkpoints at multiples of this are never deleted."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """How long a process may make no progress. It then writes its stack traces, names the process that does not
    respond, and exits with code 75, so that a scheduler restarts the run."""

    step_seconds: float | None = positive(600.0)
    """Limit for one step, including its data, after the first; None: no limit."""
    start_seconds: float | None = positive(3600.0)
    """Limit for everything else: restoring, the first step of a batch size (compilation), a save, an evaluation."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation during training."""

    every_steps: int = positive(1000)
    num_windows: int = positive(64)
    """Windows of max_seq_len tokens read from each held-out store, the same ones every time."""
    infill_gaps: int = non_negative(0)
    """Held-out lines for the model to infill, the same ones every time; 0 turns this off."""
    stop_on_error: bool = False
    """An evaluation that fails ends the run, after saving. False logs the error, and the run continues."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a training run depends on."""

    name: str = non_empty()
    model: ModelConfig
    num_steps: int = between(1, 2**31 - 1)
    global_batch_size: int = positive(dim="batch")
    """Windows per optimizer step, over all devices."""
    microbatch_size: int | None = positive(None, dim="batch")
    """Windows per forward and backward pass, over all devices; None means the global batch size."""
    seed: int = between(0, 2**63 - 1, 1234)
    output_dir: str = ""
    """Directory for checkpoints, metrics and the resolved config; "" means runs/<name>."""
    init_from: str = ""
    """Initial weights: a run, a checkpoint, or a directory in Hugging Face format; the optimizer state is new. "" means
    random weights. Read only if the run has no checkpoint yet."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    log_every_steps: int = positive(1)
    """Metrics are written to metrics.jsonl at multiples of this."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
