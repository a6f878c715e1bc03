"""What a server needs of whatever runs its requests: an engine in this process, or groups of processes elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from podquant.engine.defaults import SamplingDefaults
from podquant.engine.limits import Limits
from podquant.engine.request import Output, Request
from podquant.tokenizer.tokenizer import Tokenizer

OnOutput = Callable[[Output], None]


@dataclass(frozen=True)
class EngineStats:
    """Load and totals at one moment."""

    num_running: int
    num_waiting: int
    num_pages_used: int
    num_pages_total: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    num_cached_tokens: int
    num_compiled: int
    num_draft_tokens: int
    num_accepted_tokens: int


class Backend(Protocol):
    """Runs requests for one model. Every method may be called from any thread; only `stop` waits for anything."""

    @property
    def model_name(self) -> str:
        """What callers call the model."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None to serve token ids only."""

    @property
    def limits(self) -> Limits:
        """What requests it takes."""

    @property
    def defaults(self) -> SamplingDefaults:
        """How tokens are chosen where a request does not say."""

    @property
    def failure(self) -> str | None:
        """Why it does not serve although it should: what is lost, and since when; None while all is well."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Run a request; returns at once. News of it comes to `on_output`, from a thread of the backend's.

        Whatever happens to the backend, the last news has a finish reason.

        Raises:
            RequestError: a token id or a parameter the model does not have.
            RequestTooLongError, QueueFullError: it can never, or not now, be taken.
            EngineStoppedError: nothing is served now.
        """

    def abort(self, request_id: str) -> None:
        """End a request; nothing more is heard of it. Unknown ids are ignored."""

    def stats(self) -> EngineStats:
        """Load and totals."""

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those in flight end for `drain_seconds`, abort the rest, and end."""
