"""The PyTorch reference: GPTBigCode of `transformers` with torch's AdamW, doing jaxcoder's training step.

torch is imported on demand: the package does not depend on it. The schedule and the decay groups are written from their
definition (the original's training settings) and share no code with `jaxcoder/train`.

Shapes: B batch, S sequence.
"""

import importlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from jaxcoder.config import OptimizerConfig
from jaxcoder.errors import MissingExtraError


class StepResult(NamedTuple):
    """loss: nats per token that counts; grad_norm: global, before clipping."""

    loss: float
    grad_norm: float


def import_torch(purpose: str) -> tuple[ModuleType, ModuleType]:
    """(torch, transformers); MissingExtraError where one of them is not installed."""
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(purpose, "bench") from error


def device(jax_platform: str) -> str | None:
    """The torch device that matches JAX's platform; None without torch or without such a device."""
    try:
        torch, _ = import_torch("")
    except MissingExtraError:
        return None
    if jax_platform == "cpu":
        return "cpu"
    return "cuda" if jax_platform == "gpu" and torch.cuda.is_available() else None


def wait(device: str) -> None:
    """Waits until all work of the device is finished."""
    if device == "cuda":
        import_torch("")[0].cuda.synchronize()


def open_model(directory: str | Path, *, attention: str = "eager"):
    """The fp32 model that a directory in Hugging Face's format holds, with every dropout off."""
    _, transformers = import_torch("the PyTorch reference")
    transformers.utils.logging.disable_progress_bar()
    off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return transformers.GPTBigCodeForCausalLM.from_pretrained(
        str(directory), attn_implementation=attention, local_files_only=True, **off
    ).float()


def make_model(keys: Mapping[str, Any], tensors: Mapping[str, Any], *, attention: str, device: str = "cpu"):
    """A model out of the keys of config.json and numpy arrays under Hugging Face's names, on `device`."""
    torch, transformers = import_torch("the PyTorch reference")
    known = {key: value for key, value in keys.items() if key not in ("architectures", "model_type", "torch_dtype")}
    config = transformers.GPTBigCodeConfig(**known, attn_implementation=attention)
    with torch.device(device):
        model = transformers.GPTBigCodeForCausalLM(config)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, array in tensors.items():
            parameters.pop(name).copy_(torch.from_numpy(array.copy()))
    if parameters:
        raise AssertionError(f"PyTorch's model has parameters that jaxcoder's lacks: {', '.join(parameters)}")
    return model


def hf_tensors(model) -> dict[str, Any]:
    """The weights of a jaxcoder model as numpy arrays under Hugging Face's names."""
    import numpy as np

    from jaxcoder.checkpoint.names import flatten_tree
    from jaxcoder.convert.hf_names import entries, to_hf_tensor

    flat = {name: np.asarray(array) for name, array in flatten_tree(model, "params/").items()}
    config = model.config
    return {e.hf_name: to_hf_tensor(e, [flat[name] for name in e.jax_dims], config) for e in entries(config)}


def learning_rates(config: OptimizerConfig, num_steps: int) -> Iterator[float]:
    """The rate of each update: linear from 0 to the peak, then a cosine to the floor, then the floor."""
    end = num_steps if config.decay_steps is None else config.decay_steps
    for step in range(1, num_steps + 1):
        if step < config.warmup_steps:
            yield config.peak_learning_rate * step / config.warmup_steps
            continue
        progress = min((step - config.warmup_steps) / max(end - config.warmup_steps, 1), 1.0)
        share = 0.5 * (1 + math.cos(math.pi * progress))
        yield config.final_learning_rate + share * (config.peak_learning_rate - config.final_learning_rate)


class TorchTrainer:
    """One model and its AdamW; a call does one step. Matrices and embeddings decay, biases and norms do not."""

    def __init__(self, model, config: OptimizerConfig, *, dtype: str = "float32", compiled: bool = False):
        """dtype "bfloat16" is autocast: fp32 weights and moments, bf16 matmuls, as in jaxcoder."""
        self._torch, _ = import_torch("the PyTorch reference")
        self.model = model.train()
        self._config, self._dtype = config, getattr(self._torch, dtype)
        self._parameters = dict(model.named_parameters())  # the tied embedding counts once
        plain = {name for name in self._parameters if ".ln_" in name or name.endswith("bias")}
        decaying, others = (
            [p for name, p in self._parameters.items() if (name in plain) == is_plain] for is_plain in (False, True)
        )
        groups = [
            {"params": decaying, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = self._torch.optim.AdamW(
            groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
        )
        self._loss = self._torch.compile(self._summed_loss) if compiled else self._summed_loss

    def __call__(self, inputs, targets, loss_mask, rate: float):
        """inputs, targets (B, S) int64; loss_mask (B, S) fp32. Returns loss and norm as tensors, unsynchronized."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(inputs, targets, loss_mask) / loss_mask.sum()
        loss.backward()
        norm = self._torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return loss.detach(), norm

    def _summed_loss(self, inputs, targets, loss_mask):
        functional = self._torch.nn.functional
        low = self._dtype != self._torch.float32
        with self._torch.autocast(inputs.device.type, self._dtype, enabled=low):
            logits = self.model(input_ids=inputs, use_cache=False).logits
        losses = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * loss_mask.flatten()).sum()

    def weights(self) -> dict[str, Any]:
        """Name -> numpy array."""
        return {name: p.detach().float().cpu().numpy() for name, p in self._parameters.items()}


def train(model, batches, config: OptimizerConfig) -> tuple[list[StepResult], dict[str, Any]]:
    """One step on each batch (anything with inputs, targets and loss_mask, numpy): the curve, the weights after it."""
    torch, _ = import_torch("the PyTorch reference")
    step, results = TorchTrainer(model, config), []
    for batch, rate in zip(batches, learning_rates(config, len(batches)), strict=True):
        inputs, targets = (torch.from_numpy(ids.astype("int64")) for ids in (batch.inputs, batch.targets))
        loss, norm = step(inputs, targets, torch.from_numpy(batch.loss_mask), rate)
        results.append(StepResult(float(loss), float(norm)))
    return results, step.weights()
