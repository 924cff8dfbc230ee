"""Makes tests/golden/checkpoint: what format 1 of checkpoints is, written by the code at commit 15514c2.

Run by hand in a checkout of that commit (later code has other names for what is imported here):

    PYTHONPATH=. JAX_PLATFORMS=cpu python make_checkpoint_golden.py tests/golden/checkpoint

Three steps of Adam of a tiny model, with warm-up, clipping and decay. `crc32.json` has the CRC-32 of the bytes of every
array in memory, by its name on disk.
"""

import json
import sys
import zlib
from pathlib import Path

import jax
import numpy as np

from jaxcoder.checkpoint.checkpointer import Checkpointer
from jaxcoder.config import CheckpointConfig, ComputeConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxcoder.data.loader import make_batch
from jaxcoder.sharding.mesh import make_mesh
from jaxcoder.train.inputs import shard_batch
from jaxcoder.train.state import flatten_state, initial_state
from jaxcoder.train.step import make_train_step

RUN = RunConfig(
    name="golden",
    model=ModelConfig(num_layers=2, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=16, vocab_size=24, max_seq_len=8),
    num_steps=10,
    global_batch_size=4,
    compute=ComputeConfig(dtype="float32"),
    mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    optimizer=OptimizerConfig(peak_learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2, max_grad_norm=0.5),
)

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    mesh = make_mesh(RUN.mesh)
    windows = np.random.default_rng(0).integers(2, 24, (3, 4, 9), dtype=np.int32)
    with jax.set_mesh(mesh):
        state, step = jax.jit(lambda: initial_state(RUN))(), make_train_step(RUN)
        for window in windows:
            state, _ = step(state, shard_batch(make_batch(window, end_id=0, pad_id=1, document_mask=False), mesh))
        arrays = flatten_state(state)
        with Checkpointer(directory, CheckpointConfig(), run=RUN) as checkpointer:
            checkpointer.save(3, arrays, {"samples": 12}, force=True)
        sums = {name: zlib.crc32(np.asarray(array).tobytes()) for name, array in arrays.items()}
    (directory / "crc32.json").write_text(json.dumps(sums, indent=1) + "\n")
