"""What a caller asks of the engine and what it hears back: plain values, no arrays, no HTTP, no JAX."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from podquant.errors import RequestError


class FinishReason(enum.StrEnum):
    """Why a request ended; the values are OpenAI's where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises RequestError, which names the field, for what cannot be.

    Attributes:
        max_tokens: tokens to generate at the most; 0 asks only for the log-probabilities of the prompt.
        min_tokens: so many tokens at the least: none of them is one that would end the output, nor does a stop string.
        temperature: below 1e-5 greedy.
        top_p, top_k, min_p: 1.0, 0 (or -1) and 0.0 leave the distribution whole; applied in the order k, p, min_p; a
            `top_p` up to 1e-6 is greedy.
        repetition_penalty: of the tokens in prompt and output, divides logits above 0 and multiplies others.
        presence_penalty, frequency_penalty: taken from the logits of generated tokens, once, and for each time.
        seed: 0 to 2**31 - 1; None draws one; the same seed repeats the output.
        stop: strings that end the output, themselves left out.
        stop_token_ids: tokens that end the output, beside the model's own end tokens.
        ignore_eos: the model's end tokens do not end the output.
        logprobs: number of most likely tokens to report at each generated position, 0 for only the chosen; None for
            nothing.
        prompt_logprobs: the same for each prompt position but the first.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._require(self.max_tokens >= 0, "max_tokens", "0 or more")
        self._require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"0 to max_tokens ({self.max_tokens})")
        self._require(0 <= self.temperature <= 100, "temperature", "0 to 100")
        self._require(0 < self.top_p <= 1, "top_p", "above 0 and up to 1")
        self._require(-1 <= self.top_k < 1 << 31, "top_k", "-1 to 2**31 - 1")
        self._require(0 <= self.min_p <= 1, "min_p", "0 to 1")
        self._require(0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "0.01 to 100")
        self._require(-2 <= self.presence_penalty <= 2, "presence_penalty", "-2 to 2")
        self._require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "-2 to 2")
        self._require(self.seed is None or 0 <= self.seed < 1 << 31, "seed", "0 to 2**31 - 1, or None")
        self._require(isinstance(self.stop, tuple), "stop", "a tuple of strings")
        self._require(isinstance(self.stop_token_ids, tuple), "stop_token_ids", "a tuple of token ids")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise RequestError(f"{name}: expected {expected}, got {getattr(self, name)!r}.", name)

    @property
    def is_penalized(self) -> bool:
        """Whether what was said already makes a token less likely, or likelier."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        id: unique among the requests in flight.
        prompt_ids: token ids, at least one.
        params: how to continue.
        cache_salt: what is kept of a prompt is used for requests with the same one alone.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    cache_salt: str = ""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (natural logarithm, before penalties, temperature and filters) at one position.

    Attributes:
        token_id: the token that stands there.
        logprob: its log-probability.
        top: the most likely tokens and their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """News of one request: what came since the last news.

    Attributes:
        request_id: whose news.
        token_ids: new tokens, an ending stop token included.
        text: new text, safe to show (whole characters; nothing that may begin a stop string); "" without a tokenizer.
        logprobs: one entry for each new token if asked for, else empty.
        prompt_logprobs: once, with the first news, if asked for: one entry for each prompt token, None for the first.
        finish_reason: None while the request runs.
        stop_reason: the stop string or stop token id that ended it, if one did.
        error: what went wrong if finish_reason is ERROR.
        num_cached: with the first news, tokens of the prompt that were in the KV cache already.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = field(default=())
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    num_cached: int = 0

    @classmethod
    def join(cls, outputs: Sequence[Self]) -> Self:
        """All news of a request, of which there is at least one, as if it had come at once."""
        last = outputs[-1]
        return cls(
            last.request_id,
            token_ids=tuple(token for output in outputs for token in output.token_ids),
            text="".join(output.text for output in outputs),
            logprobs=tuple(entry for output in outputs for entry in output.logprobs),
            prompt_logprobs=tuple(entry for output in outputs for entry in output.prompt_logprobs),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            error=last.error,
            num_cached=sum(output.num_cached for output in outputs),
        )
