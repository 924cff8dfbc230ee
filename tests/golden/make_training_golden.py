"""Makes the goldens of tests/parity/test_training_parity.py: ten steps of transformers' GPTBigCode with torch's AdamW.

Run by hand in an environment with torch 2.13 and transformers 5 (nothing in the tests needs them):

    PYTHONPATH=. python tests/golden/make_training_golden.py

Starts from the weights of tests/golden/hf/{mqa,mha} (make_hf_golden.py) with eager attention in fp32, and writes
tests/golden/training/{mqa,mha}.npz: the windows and loss masks of every step, the losses, the norms of the gradients
before clipping, and for every tensor the L2 norm of how far it moved. The test repeats OPTIMIZER: clipping is at work
in the first steps only, some tokens do not count, the cosine ends a step early.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxcoder.benchmarks.torch_reference import open_model, train
from jaxcoder.config import OptimizerConfig

STEPS, BATCH, LENGTH = 10, 4, 48
OPTIMIZER = OptimizerConfig(peak_learning_rate=0.01, final_learning_rate=0.001, warmup_steps=3, decay_steps=9)


class Batch(NamedTuple):
    inputs: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray


def make(source: Path, path: Path, *, seed: int) -> None:
    random = np.random.default_rng(seed)
    windows = random.integers(0, 97, (STEPS, BATCH, LENGTH + 1), dtype=np.int32)
    masks = (random.random((STEPS, BATCH, LENGTH)) < 0.9).astype(np.float32)
    model = open_model(source, attention="eager")
    before = {name: tensor.detach().numpy().copy() for name, tensor in model.named_parameters()}
    batches = [Batch(window[:, :-1], window[:, 1:], mask) for window, mask in zip(windows, masks, strict=True)]
    results, after = train(model, batches, OPTIMIZER)
    names = sorted(before)
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        path,
        windows=windows.astype(np.uint8),
        loss_masks=masks.astype(bool),
        losses=np.array([result.loss for result in results]),
        grad_norms=np.array([result.grad_norm for result in results]),
        names=np.array(names),
        moved=np.array([np.linalg.norm(after[name] - before[name]) for name in names]),
    )
    print(path, [f"{result.loss:.4f} ({result.grad_norm:.2f})" for result in results])


if __name__ == "__main__":
    here = Path(__file__).parent
    make(here / "hf" / "mqa", here / "training" / "mqa.npz", seed=1)
    make(here / "hf" / "mha", here / "training" / "mha.npz", seed=2)
