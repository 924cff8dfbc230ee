"""The configuration of a run: frozen, keyword-only dataclasses, one per room that is configured.

A run is a Python function in `configs/` that returns a full `RunConfig`; the command line may override single fields
(`--optimizer.peak-learning-rate 3e-4`). The string under a field is its documentation, on the command line too.
"""

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["gelu_tanh", "gelu"]
AttentionBackend = Literal["reference", "blockwise", "flash_tpu", "cudnn"]
RematPolicy = Literal["none", "minimal", "offload", "block"]
Dtype = Literal["bfloat16", "float32"]
XlaOptions = Literal["chip", "none"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture (GPTBigCode: pre-norm decoder, learned absolute positions, tied embeddings, biases everywhere)."""

    num_layers: int
    embed_dim: int
    num_heads: int
    head_dim: int
    """Size of one head; num_heads * head_dim equals embed_dim in every published model of the family."""
    mlp_dim: int
    num_kv_heads: int = 1
    """1 is multi-query attention; num_heads is multi-head."""
    vocab_size: int = 49152
    max_seq_len: int = 8192
    """Rows of the position table, and the length of a training window."""
    activation: Activation = "gelu_tanh"
    """StarCoder was trained with the tanh form; some published configs name the exact one ("gelu")."""
    layer_norm_epsilon: float = 1e-5
    embed_dropout: float = 0.1
    residual_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_std: float = 0.02
    """Standard deviation of the initial weights; residual outputs get init_std / sqrt(2 * num_layers)."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed; no field changes what is computed beyond rounding."""

    dtype: Dtype = "bfloat16"
    """Type of matmul inputs and activations. Weights, softmax, norms and loss are fp32 always."""
    remat: RematPolicy = "minimal"
    """What the backward pass recomputes: "none" keeps everything, "minimal" keeps the matmul outputs that are dear to
    recompute (q, kv, attention output, MLP up), "offload" keeps the same in the host's memory, "block" keeps only each
    block's input."""
    attention: AttentionBackend | None = None
    """A name forces one attention backend; None picks the best for the device and shape."""
    loss_chunk_tokens: int = 1024
    """Tokens of a device per chunk of the cross-entropy: logits never exist for more of them at once."""
    xla_options: XlaOptions = "chip"
    """"chip" compiles the training step with the options that are good for the device (train/xla_options.py), "none"
    with XLA's defaults."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """One corpus of a mixture."""

    store: str
    """Directory of its token store."""
    weight: float | None = None
    """Share of the samples, relative to the weights of the other corpora. None for all means by number of tokens."""
    max_epochs: float | None = None
    """Cap: it is read at most this often (0.25 is a quarter of it); the others then take its share."""
    name: str = ""
    """What its held-out figures are called; "" means the last part of `store`."""
    eval_store: str | None = None
    """Token store of its held-out documents, evaluated beside data.eval_store."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What holds from a sample on, until the next stage begins."""

    from_sample: int
    """Samples consumed before it; the first stage begins at 0. A step that has begun is finished as it began."""
    weights: tuple[float, ...] = ()
    """A weight for each of data.corpora; () means their own."""
    global_batch_size: int | None = None
    """Windows per optimizer step; None means the run's."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads."""

    store: str = ""
    """Directory of the token store made by `jaxcoder data build` (local, gs:// or s3://), or "synthetic"."""
    corpora: tuple[Corpus, ...] = ()
    """Several stores instead of one, with weights and caps. Their order is part of what a seed means: append."""
    stages: tuple[Stage, ...] = ()
    """Weights and batch sizes that change on the way, by samples consumed; () is one stage for the whole run."""
    eval_store: str | None = None
    """Token store of held-out documents; None turns held-out evaluation off."""
    fim_rate: float = 0.5
    """Share of the pieces of a window that are turned into fill-in-the-middle."""
    fim_spm_rate: float = 0.5
    """Share of those in SPM order (suffix first); the others are in PSM order."""
    fim_clean_up: bool = False
    """As trained: text loses blanks before it is cut, as in " ." and " n't" (a decoder's clean-up of spaces)."""
    fim_sentinels_as_text: bool = False
    """As trained: special tokens become text, so that cuts divide them, and text that spells one becomes special."""
    fim_replace_incomplete: bool = False
    """As trained: a character that the window's edge cuts in two becomes U+FFFD. Off, its tokens stay as they are."""
    fim_drop_empty_pieces: bool = False
    """As trained: an empty piece vanishes with its end token."""
    fim_transform_empty_tail: bool = False
    """As trained: an empty piece behind the last end token may become three FIM tokens with nothing between."""
    pad_in_loss: bool = False
    """As trained: the padding that FIM leaves at the right end of a window counts in the loss."""
    document_mask: bool = False
    """False as StarCoder trained: attention and positions run across the documents of a window."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes. At most one may be -1: it takes the devices that the others leave."""

    data: int = 1
    """Replicas of the weights, between which the slow network may lie: a multiple of the slices."""
    fsdp: int = -1
    """Data parallel with weights, gradients and optimizer state sharded."""
    tensor: int = 1
    """Heads, MLP and vocabulary sharded, and between them each sequence; the single key/value head is replicated."""
    num_slices: int | None = None
    """Groups of devices with a slow network between them: the axis `data` runs across them. None is what TPUs say, and
    elsewhere 1; on a GPU cluster, give the number of nodes to shard weights within a node only."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; weight decay on matrices only (not on biases and norms)."""

    peak_learning_rate: float = 3e-4
    final_learning_rate: float = 3e-5
    warmup_steps: int = 2000
    decay_steps: int | None = None
    """Step at which the cosine reaches the floor; None means the last step."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    max_skipped_steps: int = 10
    """A step whose loss or gradients are not finite is skipped; so many skipped in a row end the run with an error."""
    skip_grad_norm_above: float | None = None
    """A step whose gradient norm, before it is scaled down, is above this is skipped too: for batches that make the loss
    spike. None: none is."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep."""

    save_every_steps: int = 1000
    save_every_seconds: float | None = None
    """Also save when this long has passed since the last save."""
    keep_last: int = 2
    """Newest checkpoints kept; the last one of the run is always kept."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this are kept for good."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """How long a process may stand still. It then writes down its stacks, says which process is silent, and exits with
    code 75, so that a scheduler starts the run again."""

    step_seconds: float | None = 600.0
    """Of one step, its data included, after the first; None: for ever."""
    start_seconds: float | None = 3600.0
    """Of everything else: restoring, the first step of a batch size (which is compiled), a save, an evaluation."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation during training."""

    every_steps: int = 1000
    num_windows: int = 64
    """Windows of max_seq_len tokens of each held-out store, always the same ones."""
    infill_gaps: int = 0
    """Held-out lines that the model is asked to infill, always the same ones; 0 leaves that out."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a training run depends on."""

    name: str
    model: ModelConfig
    num_steps: int
    global_batch_size: int
    """Windows per optimizer step, over all devices."""
    microbatch_size: int | None = None
    """Windows per forward and backward pass, over all devices; None means the whole global batch at once."""
    seed: int = 1234
    output_dir: str = ""
    """Checkpoints, metrics and the resolved config go here; "" means runs/<name>."""
    init_from: str = ""
    """A run or checkpoint of ours, or a directory in PyTorch format, whose weights the run begins with, with a fresh
    optimizer; "" means random weights. Read only when the run has no checkpoint of its own."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    log_every_steps: int = 1
    """Metrics are written to metrics.jsonl at multiples of this."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
