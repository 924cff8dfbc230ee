"""One tiny model and one tiny tokenizer for the whole room, so that few programs are compiled."""

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxcoder.config import ComputeConfig, ModelConfig
from jaxcoder.models.gpt_bigcode import GPTBigCode
from jaxcoder.tokenizer.tokenizer import Tokenizer
from jaxcoder.tokenizer.train import train_tokenizer

TEXT = """def area(radius):
    # the area of a circle
    return 3.14159 * radius ** 2

print("Größe: ∑ 漢字 😀", area(10))
"""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT] * 4, vocab_size=300)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Four rows of the vocabulary are used by no token."""
    return ModelConfig(
        num_layers=2, embed_dim=32, num_heads=2, head_dim=16, mlp_dim=64, vocab_size=304, max_seq_len=64, init_std=0.3
    )


@pytest.fixture(scope="session")
def model(config) -> GPTBigCode:
    return GPTBigCode(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))


@pytest.fixture
def always(config):
    """A function that makes a model which answers with one token whatever it reads."""

    def make(token: int) -> GPTBigCode:
        model = GPTBigCode(config, ComputeConfig(dtype="float32"), rngs=nnx.Rngs(0))
        model.ln_f.scale[...] = jnp.zeros_like(model.ln_f.scale[...])
        model.ln_f.bias[...] = 10 * model.wte[...][token]
        return model

    return make
