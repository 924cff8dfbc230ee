"""Completion and infilling of text with a model and its tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxcoder.errors import DataError
from jaxcoder.inference.decode import (
    MAX_BATCH_SIZE,
    Decoding,
    FinishReason,
    NewTokens,
    check_prompts,
    generate_tokens,
    in_compute_dtype,
)
from jaxcoder.inference.prompts import Prompt, encode_prompt
from jaxcoder.inference.sampling import GREEDY, Sampling
from jaxcoder.inference.text import TextAssembler
from jaxcoder.models.protocol import Decoder
from jaxcoder.tokenizer.tokenizer import Tokenizer

MAX_NEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A generated text, up to the stop string or special token that ended it. tokens, log_probs: all generated tokens,
    the end token included. finish_reason: "stop", or "length" if it was truncated."""

    text: str
    tokens: list[int]
    log_probs: list[float]
    finish_reason: FinishReason
    num_prompt_tokens: int


class TextDelta(NamedTuple):
    """New text of a stream; the last one, whose text may be empty, has the completion."""

    text: str
    completion: Completion | None = None


class TextGenerator:
    """Completes and infills; a `jaxcoder.protocols.Generator`.

    Generation ends at a stop string, at any special token (end-of-text, or a sentinel of training documents), after
    max_new_tokens, or at the context length.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        *,
        spm: bool = False,
        truncate: bool = False,
        max_batch_size: int = MAX_BATCH_SIZE,
    ):
        """spm: infill in SPM order instead of PSM. truncate: truncate long prompts at line starts instead of raising
        ConfigError. max_batch_size: maximum number of prompts of a batch.

        Raises DataError without a tokenizer, or if its ids exceed the model's vocabulary.
        """
        if tokenizer is None:
            raise DataError(
                "The model has no tokenizer, which text completion needs: put its tokenizer.json into the model's "
                "directory, or give --tokenizer PATH."
            )
        self._valid_ids = tokenizer.valid_ids(model.config.vocab_size)
        self._model, self._tokenizer = in_compute_dtype(model), tokenizer
        self._spm, self._truncate, self._max_batch_size = spm, truncate, max_batch_size

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        sampling: Sampling | Sequence[Sampling] = GREEDY,
    ) -> list[str]:
        """The continuation of each prompt. `sampling`: one for all, or one per prompt."""
        return self._texts([Prompt(prompt) for prompt in prompts], max_new_tokens, stop, sampling)

    def infill(
        self,
        gaps: Sequence[tuple[str, str]],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        sampling: Sampling | Sequence[Sampling] = GREEDY,
    ) -> list[str]:
        """The text between each (prefix, suffix). Raises DataError if the tokenizer has no FIM tokens."""
        return self._texts([Prompt(*gap) for gap in gaps], max_new_tokens, stop, sampling)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        sampling: Sampling | Sequence[Sampling] = GREEDY,
    ) -> list[Completion]:
        """Completions and infills with their tokens, log-probabilities and finish reasons.

        Raises ConfigError for a prompt that is too long (without `truncate`) and for invalid settings.
        """
        encoded = [self._encode(prompt, max_new_tokens) for prompt in prompts]
        texts = [TextAssembler(self._tokenizer, stop) for _ in prompts]

        generated = generate_tokens(
            self._model,
            encoded,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            end_ids=self._tokenizer.special_ids,
            valid_ids=self._valid_ids,
            on_tokens=lambda row, tokens: self._read(texts[row], tokens),
            max_batch_size=self._max_batch_size,
        )
        return [self._completion(*parts) for parts in zip(encoded, texts, generated, strict=False)]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
        sampling: Sampling = GREEDY,
    ) -> Iterator[TextDelta]:
        """Like `generate` for one prompt, yielding text as it is generated.

        Errors about the prompt are raised by this call, not by the first iteration.
        """
        encoded = self._encode(prompt, max_new_tokens)
        check_prompts(self._model, [encoded], max_new_tokens)
        return self._stream(encoded, TextAssembler(self._tokenizer, stop), max_new_tokens, sampling)

    def _stream(
        self, prompt: list[int], text: TextAssembler, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[TextDelta]:
        decoding = Decoding(
            self._model,
            [prompt],
            max_new_tokens=max_new_tokens,
            sampling=[sampling],
            end_ids=self._tokenizer.special_ids,
            valid_ids=self._valid_ids,
        )
        newest = decoding.newest[0]
        while True:
            if self._read(text, newest) is not None:
                decoding.stop(0)
            if decoding.finished:
                break
            if new := text.take():
                yield TextDelta(new)
            newest = decoding.advance(1)[0]
        completion = self._completion(prompt, text, decoding.result(0))
        yield TextDelta(text.take(final=True), completion)

    def _texts(self, prompts, max_new_tokens, stop, sampling) -> list[str]:
        completions = self.generate(prompts, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling)
        return [completion.text for completion in completions]

    def _encode(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        limit = self._model.config.max_seq_len
        # Truncation reserves max_new_tokens for the answer, but at most half of the context.
        most = limit - min(max_new_tokens, limit // 2) if self._truncate else None
        return encode_prompt(self._tokenizer, prompt, spm=self._spm, most=most)

    def _read(self, text: TextAssembler, tokens: list[int]) -> int | None:
        """Adds tokens to a text; returns the number of tokens up to the first stop string, or None."""
        for count, token in enumerate(tokens, 1):
            # A special token ends the generation and is not part of the text.
            if not self._tokenizer.is_special(token) and text.push(token):
                return count
        return None

    def _completion(self, prompt: list[int], text: TextAssembler, new: NewTokens) -> Completion:
        text.finish(complete=new.finish_reason == "stop")
        return Completion(
            text=text.text,
            tokens=new.tokens,
            log_probs=new.log_probs,
            finish_reason=new.finish_reason,
            num_prompt_tokens=len(prompt),
        )
