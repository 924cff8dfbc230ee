"""Generation from token ids: one prefill of the prompts, then decode steps against the key/value cache.

Shapes: B rows, S prompt length, T cache slots, V vocabulary.
Programs are compiled for padded shapes: B, S and T are powers of two (or the model's limit), so that few are needed.
Rows are padded on the right; slots after a row's end are overwritten before they are read. The cache doubles when the
longest row reaches its end, because the cost of a step grows with T. One call runs several steps and ends early when
all rows are finished.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcoder.errors import CheckpointError, ConfigError
from jaxcoder.inference.sampling import GREEDY, RowSampling, Sampling, choose, stack
from jaxcoder.models.gpt_bigcode import KVCache
from jaxcoder.models.protocol import Decoder
from jaxcoder.sharding.ops import reshard

STEPS_PER_CALL = 16
"""Maximum number of decode steps of one call: amortizes the host's work; tokens after a stop string are discarded."""
MIN_PROMPT_SLOTS = 16
MIN_CACHE_SLOTS = 128
INITIAL_NEW_TOKENS = 256
"""Slots for new tokens in the initial cache, which doubles when they are used up."""
MAX_BATCH_SIZE = 32
MAX_PREFILL_TOKENS = 65536
"""Tokens of one prefill, padding included: bounds the memory of its activations."""

FinishReason = Literal["stop", "length"]


class Vocabulary(NamedTuple):
    """valid: bool (V,), tokens that may be sampled; ends: bool (V,), tokens that finish a row."""

    valid: np.ndarray
    ends: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """cache: keys and values of the tokens read so far. tokens: int32 (B,), sampled but not yet read. left: int32 (B,),
    number of tokens still to be sampled."""

    cache: KVCache
    tokens: jax.Array
    left: jax.Array


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """The continuation of one prompt: token ids, including the end token, and their log-probabilities at temperature 1.
    finish_reason "length": max_new_tokens or the context length was reached."""

    tokens: list[int]
    log_probs: list[float]
    finish_reason: FinishReason


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    end_ids: Collection[int] = (),
    valid_ids: np.ndarray | None = None,
    on_tokens: Callable[[int, list[int]], int | None] | None = None,
    max_batch_size: int = MAX_BATCH_SIZE,
    steps_per_call: int = STEPS_PER_CALL,
) -> list[NewTokens]:
    """Continues each prompt by at most max_new_tokens tokens, fewer if the context length is reached.

    Args:
        prompts: any number of prompts, each of 1 to max_seq_len - 1 token ids.
        sampling: one for all, or one per prompt.
        end_ids: tokens that finish a row; they are included in its result.
        valid_ids: bool (V,), the ids that may be sampled; None: all.
        on_tokens: called with a prompt's index and its newest tokens. Returns None to continue; n finishes the row and
            discards its newest tokens after the first n.
        max_batch_size: maximum number of prompts of one batch; it changes results by rounding only.
        steps_per_call: maximum number of tokens between two calls of `on_tokens`.
    Raises:
        ConfigError for an empty prompt, one of max_seq_len tokens or more, and a max_new_tokens below 1.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    check_prompts(model, prompts, max_new_tokens)
    if len(samplings) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts have {len(samplings)} samplings: give one for all, or one for each.")
    results: dict[int, NewTokens] = {}
    for rows in make_batches([len(prompt) for prompt in prompts], max_batch_size, model.config.max_seq_len):
        decoding = Decoding(
            model,
            [prompts[row] for row in rows],
            max_new_tokens=max_new_tokens,
            sampling=[samplings[row] for row in rows],
            end_ids=end_ids,
            valid_ids=valid_ids,
        )
        newest = decoding.newest
        while True:
            for index, row in enumerate(rows):
                retained = on_tokens(row, newest[index]) if on_tokens is not None and newest[index] else None
                if retained is not None:
                    decoding.stop(index, unwanted=len(newest[index]) - retained)
            if decoding.finished:
                break
            newest = decoding.advance(steps_per_call)
        for index, row in enumerate(rows):
            results[row] = decoding.result(index)
    return [results[row] for row in range(len(prompts))]


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises ConfigError for prompts that cannot be continued."""
    limit = model.config.max_seq_len
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: give at least 1.")
    for prompt in prompts:
        if not len(prompt):
            raise ConfigError("A prompt has no tokens: give at least the end-of-text token, which starts a document.")
        if len(prompt) >= limit:
            raise ConfigError(
                f"The prompt has {len(prompt)} tokens, but the model's context is {limit} tokens, of which at least "
                "one is needed for the answer: shorten the prompt, or truncate it (--truncate; in Python, "
                "truncate=True)."
            )


class Decoding:
    """The generation of one batch of prompts. The constructor runs the prefill; `newest` holds the first tokens."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sequence[Sampling],
        end_ids: Collection[int] = (),
        valid_ids: np.ndarray | None = None,
    ):
        config = model.config
        self._model, self._limit, self._mesh = model, config.max_seq_len, mesh_of(model)
        self._lengths = [len(prompt) for prompt in prompts]
        self._most = [min(max_new_tokens, config.max_seq_len - length) for length in self._lengths]
        self._min_slots = min(max(self._lengths) + min(max(self._most), INITIAL_NEW_TOKENS), config.max_seq_len)
        self._results = [NewTokens(tokens=[], log_probs=[], finish_reason="length") for _ in prompts]

        # Padding rows are never live: they have one token to read and none to sample.
        size = padded_batch(len(prompts), model, self._mesh)
        tokens = np.zeros((size, padded(max(self._lengths), MIN_PROMPT_SLOTS, config.max_seq_len)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        padding = size - len(prompts)
        self._live = np.array([True] * len(prompts) + [False] * padding)
        self._rows = stack([*sampling, *[GREEDY] * padding])
        self._vocabulary = Vocabulary(
            valid=np.ones(config.vocab_size, bool) if valid_ids is None else np.asarray(valid_ids, bool),
            ends=np.isin(np.arange(config.vocab_size), list(end_ids)),
        )
        lengths = np.array([*self._lengths, *[1] * padding], np.int32)
        left = np.array([*self._most, *[0] * padding], np.int32)
        with self._in_mesh():
            self._state, chosen = prefill(model, tokens, lengths, left, self._rows, self._vocabulary)
        self.newest = self._collect(chosen)

    @property
    def finished(self) -> bool:
        """Whether all rows are finished."""
        return not self._live.any()

    def advance(self, num_steps: int = STEPS_PER_CALL) -> list[list[int]]:
        """Samples up to num_steps (at most STEPS_PER_CALL) tokens for each row and returns the new ones of each."""
        num_steps = min(num_steps, STEPS_PER_CALL)
        # Slots in use at the end of this call. The last sampled token is not read yet, so it needs no slot.
        ends = (
            length + len(new.tokens) + min(num_steps, most - len(new.tokens)) - 1
            for length, most, new in zip(self._lengths, self._most, self._results, strict=False)
        )
        slots = padded(max(self._min_slots, *ends), MIN_CACHE_SLOTS, self._limit)
        with self._in_mesh():
            if slots > self._state.cache.k.shape[2]:
                self._state = replace(self._state, cache=_grow(self._state.cache, slots))
            self._state, chosen = decode_steps(
                self._model, self._state, self._live, np.int32(num_steps), self._rows, self._vocabulary
            )
        return self._collect(chosen)

    def stop(self, row: int, unwanted: int = 0) -> None:
        """Finishes a row, for example at a stop string, and discards its last `unwanted` tokens."""
        self._live[row] = False
        result = self._results[row]
        end = len(result.tokens) - unwanted
        self._results[row] = NewTokens(
            tokens=result.tokens[:end], log_probs=result.log_probs[:end], finish_reason="stop"
        )

    def result(self, row: int) -> NewTokens:
        """The tokens of a row so far."""
        return self._results[row]

    def _collect(self, chosen: tuple[jax.Array, jax.Array]) -> list[list[int]]:
        tokens, log_probs = map(np.asarray, chosen)
        left = np.asarray(self._state.left)
        newest = []
        for row, result in enumerate(self._results):
            new = [token for token in tokens[row].tolist() if token >= 0]  # -1: no token
            if not np.isfinite(log_probs[row, : len(new)]).all():
                raise CheckpointError(
                    "The model's scores are NaN or infinite: its weights are damaged, or too large for "
                    f"{self._model.compute.dtype}; try --dtype float32, or another checkpoint."
                )
            result.tokens.extend(new)
            result.log_probs.extend(log_probs[row, : len(new)].tolist())
            if new and self._vocabulary.ends[new[-1]]:
                self.stop(row)
            elif left[row] == 0:
                self._live[row] = False
            newest.append(new)
        return newest

    def _in_mesh(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def in_compute_dtype(model: Decoder) -> Decoder:
    """The model with all weights but the norms stored in its compute dtype.

    Results do not change, because the model casts them to that dtype anyway. In bfloat16 a decode step, which is bound
    by the bandwidth of the weights, reads half the bytes.
    """
    dtype = jnp.dtype(model.compute.dtype)

    def cast(path, weight):
        of_norm = any("ln_" in str(key) for key in path)
        return weight if of_norm or weight.dtype == dtype else weight.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, model)


def mesh_of(model: Decoder) -> jax.sharding.Mesh | None:
    """The mesh of the weights; None if they are not sharded."""
    mesh = getattr(jax.tree.leaves(model)[0].sharding, "mesh", None)
    return mesh if isinstance(mesh, jax.sharding.Mesh) else None


def padded(size: int, smallest: int, largest: int) -> int:
    """`size` rounded up to a power of two, clipped to [smallest, largest]."""
    return min(max(smallest, 1 << (size - 1).bit_length()), largest)


def padded_batch(rows: int, model: Decoder, mesh: jax.sharding.Mesh | None) -> int:
    """`rows` rounded up to a power of two for each shard of the batch."""
    shards = 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in model.rules.of("batch"))
    return shards * (1 << (-(-rows // shards) - 1).bit_length())


def make_batches(lengths: Sequence[int], max_batch_size: int, limit: int) -> list[list[int]]:
    """Indices of the prompts of each batch: sorted by length to reduce padding, bounded by MAX_PREFILL_TOKENS."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        most = min(max_batch_size, max(1, MAX_PREFILL_TOKENS // padded(lengths[row], MIN_PROMPT_SLOTS, limit)))
        if not batches or len(batches[-1]) >= most:
            batches.append([])
        batches[-1].append(row)
    return batches


# --- compiled programs -----------------------------------------------------------------------------------------------


@jax.jit
def prefill(
    model: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    left: jax.Array,
    rows: RowSampling,
    vocabulary: Vocabulary,
) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
    """Reads tokens (B, S) into a cache of S slots and samples one token for each row with left > 0."""
    cache = model.empty_cache(*tokens.shape)
    hidden, cache = model.prefill(_by_row(model, tokens), lengths, cache)
    # Logits are needed for the last position of each row only: (B, V), never (B, S, V).
    hidden = reshard(hidden, model.rules.spec(None, None, None))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    chosen, log_probs, left = _choose(model, last, lengths, left > 0, left, rows, vocabulary)
    return DecodeState(cache=cache, tokens=chosen, left=left), (chosen[:, None], log_probs[:, None])


@partial(jax.jit, donate_argnames="state")
def decode_steps(
    model: Decoder,
    state: DecodeState,
    live: jax.Array,
    num_steps: jax.Array,
    rows: RowSampling,
    vocabulary: Vocabulary,
) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
    """num_steps decode steps of the live rows. Returns tokens and log-probabilities (B, STEPS_PER_CALL), -1: no token.

    A while loop, because it can end as soon as no row is live; its outputs have the static size STEPS_PER_CALL.
    """
    shape = (state.tokens.shape[0], STEPS_PER_CALL)

    def should_continue(carry):
        step, state, _, _ = carry
        return (step < num_steps) & jnp.any(state.left > 0)

    def decode_step(carry):
        step, state, tokens, log_probs = carry
        is_live = state.left > 0
        lengths = state.cache.lengths
        # Reads the tokens sampled last: their keys and values go to slot `lengths` of each row.
        cache = replace(state.cache, lengths=_by_row(model, lengths))
        hidden, cache = model.decode(_by_row(model, state.tokens[:, None]), cache)
        # The length of a finished row does not grow: it rewrites one slot and never passes the end of the cache.
        cache = replace(cache, lengths=lengths + is_live)
        # The noise of a sample depends on its position in the sequence, which is the new length.
        chosen, log_prob, left = _choose(model, hidden[:, 0], cache.lengths, is_live, state.left, rows, vocabulary)
        state = DecodeState(cache=cache, tokens=jnp.where(is_live, chosen, state.tokens), left=left)
        return step + 1, state, tokens.at[:, step].set(chosen), log_probs.at[:, step].set(log_prob)

    state = replace(state, left=jnp.where(live, state.left, 0))
    start = (jnp.int32(0), state, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, tokens, log_probs = jax.lax.while_loop(should_continue, decode_step, start)
    return state, (tokens, log_probs)


def _choose(model, hidden, positions, is_live, left, rows, vocabulary) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next tokens (-1 for rows that are not live), their log-probabilities, and the new `left` of each row."""
    logits = reshard(model.logits(hidden), model.rules.spec(None, None))
    logits = jnp.where(vocabulary.valid, logits, -jnp.inf)
    chosen = choose(logits, rows, positions)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=1)[:, 0]
    left = jnp.where(is_live & ~vocabulary.ends[chosen], left - 1, 0)
    return jnp.where(is_live, chosen, -1), log_probs, left


@partial(jax.jit, static_argnames="slots")
def _grow(cache: KVCache, slots: int) -> KVCache:
    """The cache with more slots."""
    more = [(0, 0), (0, 0), (0, slots - cache.k.shape[2]), (0, 0), (0, 0)]
    return replace(cache, k=jnp.pad(cache.k, more), v=jnp.pad(cache.v, more))


def _by_row(model: Decoder, x: jax.Array) -> jax.Array:
    """x (B, ...), sharded as the model's batch."""
    return reshard(x, model.rules.spec("batch", *[None] * (x.ndim - 1)))
