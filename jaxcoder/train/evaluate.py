"""Held-out loss and bits per byte, over the same windows every time."""

import math

import jax
from jax.sharding import Mesh

from jaxcoder.config import RunConfig
from jaxcoder.data.stream import SampleStream
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.train.inputs import held_out_batches, place, text_bytes
from jaxcoder.train.step import make_eval_step


class HeldOut:
    """Evaluates weights on the held-out stream of a run; compiles once."""

    def __init__(self, config: RunConfig, stream: SampleStream, mesh: Mesh):
        self._config, self._stream, self._mesh = config, stream, mesh
        self._step = make_eval_step()

    def __call__(self, model: GPTBigCode) -> dict[str, float]:
        """eval_loss in nats per token, eval_bits_per_byte, eval_tokens; call with the mesh in scope."""
        batch_size = self._config.microbatch_size or self._config.global_batch_size
        sums, text = [], 0
        batches = held_out_batches(
            self._stream, num_windows=self._config.eval.num_windows, batch_size=batch_size
        )
        for batch in batches:
            sums.append(self._step(model, place(batch, self._mesh)))
            text += text_bytes(batch, self._stream.token_bytes)
        nats, tokens = (sum(float(x) for x in column) for column in zip(*jax.device_get(sums)))
        return {
            "eval_loss": nats / tokens,
            "eval_bits_per_byte": nats / math.log(2) / max(text, 1),
            "eval_tokens": tokens,
        }
