"""From prompts of token ids to new token ids: prefill once, then steps against the key/value cache.

Shapes: B rows, S prompt length, T cache slots, V vocabulary. All programs are compiled for padded shapes: B, S and T
are powers of two (or the model's limit), so there are few of them, and a prompt that is a token longer runs one that
exists. Rows are padded on the right; what they hold behind their end is written over before it is read. The cache
starts small and doubles when the longest row reaches its end, so that a step costs what its context costs. Several
steps run per call of a program, which ends early when all rows are done.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcoder.errors import ConfigError
from jaxcoder.inference.sampling import GREEDY, RowSampling, Sampling, choose, stack
from jaxcoder.models.gpt_bigcode import KVCache
from jaxcoder.models.protocol import Decoder
from jaxcoder.sharding.ops import reshard

STEPS_PER_CALL = 16
"""Most steps of one call: enough to hide the host's work, few enough that little is wasted behind a stop string."""
SMALLEST_PROMPT = 16
SMALLEST_CACHE = 128
ROOM = 256
"""Slots for new tokens that a cache starts with; it doubles when they are used up."""
MAX_BATCH_SIZE = 32
MAX_PREFILL_TOKENS = 65536
"""Of one prefill, padding included: bounds its activations."""

FinishReason = Literal["stop", "length"]


class Vocabulary(NamedTuple):
    """valid: bool (V,), rows that may be chosen; ends: bool (V,), tokens after which a row is finished."""

    valid: np.ndarray
    ends: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DecodeState:
    """cache: what was read; tokens int32 (B,): the last ones chosen, not read yet; left int32 (B,): how many more."""

    cache: KVCache
    tokens: jax.Array
    left: jax.Array


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """What was generated for one prompt: token ids (an ending token included), and the log-probability of each in the
    model's own distribution (at temperature 1). "length" means that the asked or possible number was reached."""

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
    watch: Callable[[int, list[int]], int | None] | None = None,
    max_batch_size: int = MAX_BATCH_SIZE,
    steps_per_call: int = STEPS_PER_CALL,
) -> list[NewTokens]:
    """Continues each prompt by at most max_new_tokens tokens, fewer where the context ends.

    Args:
        prompts: token ids, each at least one and fewer than the model's max_seq_len; any number of prompts.
        sampling: one for all, or one per prompt.
        end_ids: tokens that finish a row (they are the last of its result).
        valid_ids: bool (V,), the ids that may be chosen; None means all.
        watch: called with a prompt's index and its newest tokens; a number finishes it and keeps that many of them.
        max_batch_size: most prompts that run together; the result does not depend on it beyond rounding.
        steps_per_call: most tokens between two calls of `watch`.
    Raises:
        ConfigError for an empty prompt, one that leaves no room, and a max_new_tokens below 1.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    check_prompts(model, prompts, max_new_tokens)
    if len(samplings) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts have {len(samplings)} samplings: give one for all, or one for each.")
    results: list[NewTokens | None] = [None] * len(prompts)
    for rows in _batches([len(prompt) for prompt in prompts], max_batch_size, model.config.max_seq_len):
        decoding = Decoding(
            model,
            [prompts[row] for row in rows],
            max_new_tokens=max_new_tokens,
            sampling=[samplings[row] for row in rows],
            end_ids=end_ids,
            valid_ids=valid_ids,
        )
        news = decoding.newest
        while True:
            for place, row in enumerate(rows):
                kept = watch(row, news[place]) if watch is not None and news[place] else None
                if kept is not None:
                    decoding.stop(place, unwanted=len(news[place]) - kept)
            if decoding.finished:
                break
            news = decoding.advance(steps_per_call)
        for place, row in enumerate(rows):
            results[row] = decoding.result(place)
    return results


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """ConfigError for what cannot be generated."""
    limit = model.config.max_seq_len
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: ask for at least 1.")
    for prompt in prompts:
        if not len(prompt):
            raise ConfigError("A prompt has no tokens: begin with the end-of-text token to start a document.")
        if len(prompt) >= limit:
            raise ConfigError(
                f"The prompt has {len(prompt)} tokens and the model's context is {limit}, of which at least one must "
                "be left for the answer: shorten the prompt, or let it be cut (--truncate; in Python, truncate=True)."
            )


class Decoding:
    """One batch of prompts being continued; `newest` holds the first tokens as soon as it exists."""

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
        self._slots_asked = min(max(self._lengths) + min(max(self._most), ROOM), config.max_seq_len)
        self._results = [NewTokens(tokens=[], log_probs=[], finish_reason="length") for _ in prompts]

        size = padded_batch(len(prompts), model, self._mesh)
        tokens = np.zeros((size, padded(max(self._lengths), SMALLEST_PROMPT, config.max_seq_len)), np.int32)
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
            self._state, chosen = _prefill(model, tokens, lengths, left, self._rows, self._vocabulary)
        self.newest = self._collect(*chosen)

    @property
    def finished(self) -> bool:
        """Whether no row goes on."""
        return not self._live.any()

    def advance(self, num_steps: int = STEPS_PER_CALL) -> list[list[int]]:
        """Up to num_steps (at most STEPS_PER_CALL) more tokens for each row; the new ones of each."""
        num_steps = min(num_steps, STEPS_PER_CALL)
        # What a row has, what it may get in this call, and its newest token, which needs no slot.
        ends = (
            length + len(new.tokens) + min(num_steps, most - len(new.tokens)) - 1
            for length, most, new in zip(self._lengths, self._most, self._results, strict=False)
        )
        slots = padded(max(self._slots_asked, *ends), SMALLEST_CACHE, self._limit)
        with self._in_mesh():
            if slots > self._state.cache.k.shape[2]:
                self._state = replace(self._state, cache=_grow(self._state.cache, slots))
            self._state, chosen = _steps(
                self._model, self._state, self._live, np.int32(num_steps), self._rows, self._vocabulary
            )
        return self._collect(*chosen)

    def stop(self, row: int, unwanted: int = 0) -> None:
        """Finishes a row, whose text has reached a stop string, and takes its last `unwanted` tokens back."""
        self._live[row] = False
        result = self._results[row]
        kept = len(result.tokens) - unwanted
        self._results[row] = NewTokens(
            tokens=result.tokens[:kept], log_probs=result.log_probs[:kept], finish_reason="stop"
        )

    def result(self, row: int) -> NewTokens:
        """What a row has so far."""
        return self._results[row]

    def _collect(self, tokens: jax.Array, log_probs: jax.Array) -> list[list[int]]:
        tokens, log_probs = np.asarray(tokens), np.asarray(log_probs)
        left = np.asarray(self._state.left)
        newest = []
        for row, result in enumerate(self._results):
            new = [token for token in tokens[row].tolist() if token >= 0]
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
    """The model with matrices, embeddings and biases stored in its compute dtype, the norms as they are.

    The results do not change: every use casts to that type anyway. A step then reads half the bytes in bfloat16.
    """
    dtype = jnp.dtype(model.compute.dtype)

    def cast(path, weight):
        of_norm = any("ln_" in str(key) for key in path)
        return weight if of_norm or weight.dtype == dtype else weight.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, model)


def mesh_of(model: Decoder) -> jax.sharding.Mesh | None:
    """The mesh that the weights are laid out on, None for plain arrays."""
    sharding = model.wte[...].sharding
    return sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None


def padded(size: int, smallest: int, largest: int) -> int:
    """The next power of two from `smallest` on, or `largest` where that is passed."""
    return min(max(smallest, 1 << (size - 1).bit_length()), largest)


def padded_batch(rows: int, model: Decoder, mesh: jax.sharding.Mesh | None) -> int:
    """A power of two of rows for each of the devices that the batch is split over."""
    shards = 1
    if mesh is not None:
        with jax.set_mesh(mesh):
            axes = model.rules.spec("batch")[0]
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            shards *= mesh.shape[axis]
    return shards * (1 << (-(-rows // shards) - 1).bit_length())


def _batches(lengths: Sequence[int], max_batch_size: int, limit: int) -> list[list[int]]:
    """Indices of prompts that run together: of like length, no more than memory for the prefill allows."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        most = min(max_batch_size, max(1, MAX_PREFILL_TOKENS // padded(lengths[row], SMALLEST_PROMPT, limit)))
        if not batches or len(batches[-1]) >= most:
            batches.append([])
        batches[-1].append(row)
    return batches


# --- compiled programs -----------------------------------------------------------------------------------------------


@jax.jit
def _prefill(
    model: Decoder,
    tokens: jax.Array,
    lengths: jax.Array,
    left: jax.Array,
    rows: RowSampling,
    vocabulary: Vocabulary,
) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
    """Reads tokens (B, S) and chooses one more for each row with left > 0. The cache has S slots."""
    cache = model.empty_cache(*tokens.shape)
    hidden, cache = model.prefill(_by_row(model, tokens), lengths, cache)
    hidden = reshard(hidden, model.rules.spec(None, None, None))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    chosen, log_probs, left = _choose(model, last, lengths, left > 0, left, rows, vocabulary)
    return DecodeState(cache=cache, tokens=chosen, left=left), (chosen[:, None], log_probs[:, None])


@partial(jax.jit, donate_argnames="state")
def _steps(
    model: Decoder,
    state: DecodeState,
    live: jax.Array,
    num_steps: jax.Array,
    rows: RowSampling,
    vocabulary: Vocabulary,
) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
    """num_steps steps of the rows that are live; tokens and log-probabilities (B, STEPS_PER_CALL), -1 for none."""
    shape = (state.tokens.shape[0], STEPS_PER_CALL)

    def go_on(carry):
        step, state, _, _ = carry
        return (step < num_steps) & jnp.any(state.left > 0)

    def one(carry):
        step, state, tokens, log_probs = carry
        is_live = state.left > 0
        lengths = state.cache.lengths
        cache = replace(state.cache, lengths=_by_row(model, lengths))
        hidden, cache = model.decode(_by_row(model, state.tokens[:, None]), cache)
        # A finished row stays where it is and rewrites one slot, so that it never runs over its end.
        cache = replace(cache, lengths=lengths + is_live)
        chosen, log_prob, left = _choose(model, hidden[:, 0], cache.lengths, is_live, state.left, rows, vocabulary)
        state = DecodeState(cache=cache, tokens=jnp.where(is_live, chosen, state.tokens), left=left)
        return step + 1, state, tokens.at[:, step].set(chosen), log_probs.at[:, step].set(log_prob)

    state = replace(state, left=jnp.where(live, state.left, 0))
    start = (jnp.int32(0), state, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, tokens, log_probs = jax.lax.while_loop(go_on, one, start)
    return state, (tokens, log_probs)


def _choose(model, hidden, positions, is_live, left, rows, vocabulary) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Next tokens (-1 for rows that are not live), their log-probabilities, and how many each row has left."""
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
    """x (B, ...) laid out over the devices as the model takes its batch."""
    return reshard(x, model.rules.spec("batch", *[None] * (x.ndim - 1)))
