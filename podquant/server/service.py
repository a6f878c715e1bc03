"""What every route works with: the engine once there is one, what it is called, and the way its outputs come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from fastapi import Request as HttpRequest

from podquant.engine.backend import Backend, EngineStats
from podquant.engine.limits import Limits
from podquant.engine.request import Request
from podquant.errors import EngineStoppedError, RequestError
from podquant.foreign import shown
from podquant.server.errors import ApiError
from podquant.server.generation import Generation, Mailbox
from podquant.server.metrics import Metrics
from podquant.server.off_loop import off_loop
from podquant.server.token_text import TokenText
from podquant.tokenizer.length import TooManyTokensError
from podquant.tokenizer.tokenizer import Tokenizer

_MOST_PROMPT_TOKENS = 1 << 20
"""Of all choices of one HTTP request, unless a single prompt may be longer."""


class Service:
    """The state behind one app.

    Args:
        engine: None while the model loads; `attach` brings it later.
        served_model_name: what callers call the model; None for the engine's own name.

    Attributes:
        tokens: single tokens as text; meaningless without an engine.
        phase: what a server without an engine is doing to get one, for people.
    """

    def __init__(self, engine: Backend | None, served_model_name: str | None) -> None:
        self.engine: Backend | None = None
        self.tokens = TokenText(None)
        self.phase = "opening the model"
        if engine is not None:
            self.attach(engine)
        self.metrics = Metrics(self._stats)
        self._served_model_name = served_model_name
        self._mailbox: Mailbox | None = None

    def attach(self, engine: Backend) -> None:
        """Serve with this engine from now on; may be called from any thread."""
        if engine.tokenizer is not None:
            engine.tokenizer.isolate_template()
        self.tokens = TokenText(engine.tokenizer)
        self.engine = engine

    def open(self) -> None:
        """Called on the event loop before the first request."""
        self._mailbox = Mailbox(asyncio.get_running_loop())

    def close(self) -> None:
        """Called after the last request."""
        if self.engine is not None and self.engine.tokenizer is not None:
            self.engine.tokenizer.close()

    @property
    def model_name(self) -> str | None:
        """What callers call the model; None if only the engine knows and is not there yet."""
        return self._served_model_name or (self.engine.model_name if self.engine else None)

    def require(self, model: str | None = None) -> Backend:
        """The engine, for a request that names `model`.

        Raises:
            EngineStoppedError: it is still loading.
            ApiError: the request names another model (404).
        """
        if self.engine is None:
            raise EngineStoppedError(f"The model is still loading ({self.phase}); GET /ready says when it serves.")
        if model is not None and model != self.model_name:
            raise ApiError(
                404,
                f"There is no model {shown(model)} here; this server has {self.model_name!r}.",
                code="model_not_found",
                param="model",
            )
        return self.engine

    def generation(self, engine: Backend, requests: Sequence[Request]) -> Generation:
        """The sequences of one HTTP request, still to be entered."""
        assert self._mailbox is not None
        return Generation(engine, self._mailbox, self.metrics, requests)

    def _stats(self) -> EngineStats | None:
        return self.engine.stats() if self.engine else None


def service_of(http: HttpRequest) -> Service:
    """The service behind the app a request came to."""
    service: Service = http.app.state.service
    return service


def require_tokenizer(engine: Backend, param: str) -> Tokenizer:
    """The tokenizer. Raises RequestError, which blames `param`, if the server has none."""
    if engine.tokenizer is None:
        raise RequestError(
            "This server has no tokenizer (--skip-tokenizer-init): it takes and gives token ids. "
            "Send token ids as the prompt of /v1/completions.",
            param,
        )
    return engine.tokenizer


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, limits: Limits) -> list[int]:
    """Token ids of a text, without holding up the event loop if it is long.

    Raises:
        RequestError: the text is not Unicode.
        RequestTooLongError: it surely exceeds the limits; most often told before it is tokenized.
    """
    require_unicode(text, "prompt")

    def work(most: int) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens, most=most)

    return await off_loop(len(text), lambda: within(limits, "prompt", work))


def within(limits: Limits, param: str, work: Callable[[int], list[int]]) -> list[int]:
    """What `work` gives when told the most tokens. RequestTooLongError, which blames `param`, if there are more."""
    try:
        return work(limits.longest)
    except TooManyTokensError as error:
        limits.check_length(error.at_least, 1, param, is_exact=False)
        raise


def require_unicode(text: str, param: str) -> None:
    """Raises RequestError, which blames `param`, for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text is not valid Unicode: {error.object[error.start]!r} at {error.start} is half a surrogate pair. "
            "Send whole characters.",
            param,
        ) from None


def require_prompts_fit(num_tokens: int, limits: Limits) -> None:
    """Raises RequestError for more tokens in the prompts of all choices than one HTTP request may bring."""
    most = max(_MOST_PROMPT_TOKENS, limits.longest)
    if num_tokens > most:
        raise RequestError(
            f"The prompts of all choices have {num_tokens} tokens together (a prompt counts n times); one request may "
            f"bring {most}. Send several requests.",
            "n",
        )
