"""From sampled tokens to what a caller hears: text deltas, and when and why the output ends. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Set

from podquant.engine.request import FinishReason, Output, Request, TokenLogprobs
from podquant.tokenizer.tokenizer import Tokenizer


class OutputProcessor:
    """Follows one request.

    Args:
        request: whose tokens these are.
        tokenizer: None gives tokens without text.
        eos_ids: the model's end tokens.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None, eos_ids: Set[int]) -> None:
        params = request.params
        self._request = request
        self._detokenizer = tokenizer.detokenizer(request.prompt_ids) if tokenizer else None
        self._end_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._num_tokens = 0
        self._held = ""  # decoded but not shown: it may begin a stop string
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self._num_cached = 0
        self._finished = False

    def note_cached(self, count: int) -> None:
        """Have the next output say that so many tokens of the prompt were in the cache."""
        self._num_cached = count

    def add_prompt_logprobs(self, logprobs: tuple[TokenLogprobs | None, ...]) -> None:
        """Have the next output carry these."""
        self._prompt_logprobs += logprobs

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> Output | None:
        """Take the next token. None if the output has ended already: the token does not count."""
        if self._finished:
            return None
        self._num_tokens += 1
        params = self._request.params
        may_stop = self._num_tokens >= params.min_tokens
        entries = () if logprobs is None else (logprobs,)
        if may_stop and (token_id in self._end_ids or token_id in params.stop_token_ids):
            stop_reason = None if token_id in self._end_ids else token_id
            return self._output((token_id,), entries, self._rest(), FinishReason.STOP, stop_reason)
        text, stop_string = self._advance(token_id, may_stop)
        if stop_string is not None:
            return self._output((token_id,), entries, text, FinishReason.STOP, stop_string)
        if self._num_tokens >= params.max_tokens:
            return self._output((token_id,), entries, text + self._rest(), FinishReason.LENGTH)
        return self._output((token_id,), entries, text)

    def finish(self, reason: FinishReason, error: str | None = None) -> Output | None:
        """End the output without a token: aborted, failed, or no token wanted. None if it has ended already."""
        return None if self._finished else self._output((), (), self._rest(), reason, error=error)

    def _advance(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop string that ends it."""
        delta = self._detokenizer.push(token_id) if self._detokenizer else ""
        num_old = len(self._held)
        text = self._held + delta
        # only strings this token completes: one completed before `min_tokens` has been let pass
        found = [
            (position, stop)
            for stop in self._request.params.stop
            if may_stop and delta and (position := text.find(stop, max(num_old - len(stop) + 1, 0))) >= 0
        ]
        if found:
            self._held = ""
            position, stop = min(found, key=lambda match: match[0])
            return text[:position], stop
        shown = len(text) - self._num_held_back(text)
        self._held = text[shown:]
        return text[:shown], None

    def _num_held_back(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        stops = self._request.params.stop
        longest = max((len(stop) - 1 for stop in stops), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(len(stop) > n and stop.startswith(text[-n:]) for stop in stops)), 0)

    def _rest(self) -> str:
        text = self._held + (self._detokenizer.flush() if self._detokenizer else "")
        self._held = ""
        return text

    def _output(
        self,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        text: str,
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> Output:
        self._finished = finish_reason is not None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        num_cached, self._num_cached = self._num_cached, 0
        return Output(
            self._request.id,
            token_ids,
            text,
            logprobs,
            prompt_logprobs,
            finish_reason,
            stop_reason,
            error,
            num_cached,
        )
