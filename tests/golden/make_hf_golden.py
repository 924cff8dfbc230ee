"""Makes the goldens of tests/parity: tiny GPTBigCode models of transformers, their logits and greedy tokens.

Run by hand in an environment with torch 2.13 and transformers 5 (nothing in the tests needs them):

    python tests/golden/make_hf_golden.py

Writes tests/golden/hf/{mqa,mha}/: config.json and model.safetensors as `save_pretrained` wrote them, and outputs.npz
(ids, logits; prompt and the 24 tokens greedily after it). Every tensor is random, biases and norms too: a swapped bias
or a wrong q, k, v order cannot hide.
Also tests/golden/torch_tensors.bin, the ways in which `torch.save` stores tensors, with their values in an .npz.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

NEW_TOKENS = 24


def make(directory: Path, *, multi_query: bool, activation: str, seed: int) -> None:
    config = GPTBigCodeConfig(
        vocab_size=97,
        n_positions=64,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=56,
        multi_query=multi_query,
        activation_function=activation,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = GPTBigCodeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = ".ln_" in name and name.endswith("weight")
            parameter.normal_(1.0 if is_scale else 0.0, 0.2 if parameter.ndim == 1 else 0.3)
        ids = torch.randint(1, 97, (2, 40))
        logits = model(ids).logits
        tokens, margin = greedy(model, ids[:2, :9])
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    (directory / "model.safetensors").chmod(0o644)
    np.savez_compressed(
        directory / "outputs.npz",
        ids=ids.numpy().astype(np.int32),
        logits=logits.numpy(),
        prompt=ids[:2, :9].numpy().astype(np.int32),
        tokens=tokens.numpy().astype(np.int32),
    )
    print(directory, f"least margin {margin:.4f}")


def greedy(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    start, margin = ids.shape[1], float("inf")
    for _ in range(NEW_TOKENS):
        best = model(ids).logits[:, -1].topk(2)
        margin = min(margin, (best.values[:, 0] - best.values[:, 1]).min().item())
        ids = torch.cat([ids, best.indices[:, :1]], dim=1)
    return ids[:, start:], margin


def make_tensors(path: Path) -> None:
    torch.manual_seed(3)
    whole = torch.randn(6, 4)
    tensors = {
        "float32": whole,
        "transposed": whole.T,
        "part": whole[2:5, 1:3],
        "tied": whole,
        "float16": torch.randn(3, 5).half(),
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(7)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "bool": torch.tensor([True, False, True]),
    }
    torch.save(torch.nn.ParameterDict({"x": torch.ones(2)}).state_dict() | tensors, path)
    values = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    np.savez_compressed(path.with_suffix(".npz"), **values, x=np.ones(2, np.float32))


if __name__ == "__main__":
    here = Path(__file__).parent / "hf"
    make(here / "mqa", multi_query=True, activation="gelu_pytorch_tanh", seed=1)
    make(here / "mha", multi_query=False, activation="gelu", seed=2)
    make_tensors(here.parent / "torch_tensors.bin")
