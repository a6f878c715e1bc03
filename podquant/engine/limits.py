"""What an engine takes: how long a request may be, what it may ask for, and how many may be open at once.

Arithmetic on constants, so whoever passes requests on to an engine elsewhere can check them too. Knows nothing of
threads, pages or devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from podquant.engine.request import Request, SamplingParams
from podquant.errors import QueueFullError, RequestError, RequestTooLongError


@dataclass(frozen=True)
class Limits:
    """The limits of one engine.

    Attributes:
        vocab_size: token ids are below it.
        context_length: tokens of a prompt and its output together at the most.
        cache_tokens: tokens whose keys and values the whole KV cache holds.
        max_running: requests that are computed at a time.
        max_waiting: requests that may wait beside those.
        max_logprobs: log-probabilities of top tokens at a position.
        has_tokenizer: whether text can be found in the output.
    """

    vocab_size: int = 0
    context_length: int = 0
    cache_tokens: int = 0
    max_running: int = 0
    max_waiting: int = 0
    max_logprobs: int = 0
    has_tokenizer: bool = False

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its output that can be computed: the smaller of context and cache."""
        return min(self.context_length, self.cache_tokens + 1)  # the last token never gets a cache entry

    def room(self, num_prompt: int) -> int:
        """Tokens that may follow a prompt of so many; not above 0 if the prompt is too long already."""
        return self.longest - num_prompt

    def check(self, request: Request) -> None:
        """Refuse a request that can never run; takes no longer than reading its prompt.

        Raises:
            RequestError: the prompt is empty, or holds ids or asks for something that the model does not have.
            RequestTooLongError: prompt and output exceed the context or the KV cache.
        """
        if not request.prompt_ids:
            raise RequestError("The prompt is empty: expected at least one token.", "prompt")
        self.check_length(len(request.prompt_ids), request.params.max_tokens, "prompt")
        for token in (min(request.prompt_ids), max(request.prompt_ids)):
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"The prompt holds token id {token}; this model's ids are 0 to {self.vocab_size - 1}.", "prompt"
                )
        self._check_params(request.params)

    def check_length(self, num_prompt: int, max_tokens: int, param: str, *, is_exact: bool = True) -> None:
        """Raises RequestTooLongError, which blames `param` if the prompt alone is too long, else `max_tokens`.

        `is_exact`: whether the prompt has so many tokens, or at least so many.
        """
        total = num_prompt + max_tokens
        if total > self.context_length:
            limit = f"This model's maximum context length is {self.context_length} tokens."
        elif num_prompt + max(max_tokens, 1) > self.cache_tokens + 1:
            limit = (
                f"This model's maximum context length is {self.longest} tokens on this server, whose KV cache holds no "
                "more (--max-total-tokens and --mem-fraction-static set its size)."
            )
        else:
            return
        place = "messages" if param == "messages" else "prompt"
        least = "" if is_exact else "at least "
        raise RequestTooLongError(
            f"{limit} However, you requested {least}{total} tokens ({least}{num_prompt} in the {place}, {max_tokens} "
            f"in the completion). Please reduce the length of the {place} or completion.",
            param if num_prompt >= self.longest else "max_tokens",
        )

    def check_load(self, num_open: int) -> None:
        """Raises QueueFullError if no request can be added to so many that run or wait."""
        if num_open >= self.max_running + self.max_waiting:
            raise QueueFullError(
                f"{num_open} requests are running or waiting, the most this server allows. Try again later."
            )

    def _check_params(self, params: SamplingParams) -> None:
        for asked in (params.logprobs, params.prompt_logprobs):
            if asked is not None and not 0 <= asked <= self.max_logprobs:
                raise RequestError(
                    f"{asked} log-probabilities a position were asked for; this server gives up to {self.max_logprobs} "
                    "(--max-logprobs).",
                    "logprobs",
                )
        if params.stop and not self.has_tokenizer:
            raise RequestError(
                "This server has no tokenizer, so `stop` strings cannot be found. Use `stop_token_ids`.", "stop"
            )
        if "" in params.stop:
            raise RequestError("A `stop` string is empty: expected at least one character. Leave it out.", "stop")
