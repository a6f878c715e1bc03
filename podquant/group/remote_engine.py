"""An engine that runs in another process, as a `Backend`: requests go there, outputs come back, and when the process is
lost every request on the way ends with an error that says so.

Knows nothing of how the process is started again; until it is, nothing is taken.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from podquant import errors
from podquant.engine.backend import EngineStats, OnOutput
from podquant.engine.request import FinishReason, Output, Request
from podquant.errors import EngineStoppedError, RequestError
from podquant.group.messages import decode_output, encode_request
from podquant.tokenizer.tokenizer import Tokenizer

Command = Callable[[Mapping[str, Any]], None]

_NO_LOAD = EngineStats(0, 0, 0, 0, 0, 0, 0)


@dataclass
class _Open:
    """A request on the way: who hears of it, and who waits for it to be taken."""

    on_output: OnOutput
    answer: queue.SimpleQueue[Exception | None]


class RemoteEngine:
    """A `Backend`, served by whichever process is attached."""

    def __init__(self, model_name: str, tokenizer: Tokenizer | None, answer_seconds: float) -> None:
        """`answer_seconds`: how long a request may take to be accepted or refused."""
        self.model_name, self.tokenizer = model_name, tokenizer
        self.vocab_size = self.context_length = self.max_logprobs = 0
        self._answer_seconds = answer_seconds
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._command: Command | None = None
        self._state, self._loss = "the model is loading", ""
        self._is_stopping = False
        self._stats, self._before = _NO_LOAD, _NO_LOAD

    @property
    def failure(self) -> str | None:
        return self.state if self._loss and not self.is_ready and not self._is_stopping else None

    @property
    def state(self) -> str:
        """Why nothing is taken at the moment: what was lost, if anything was, and how far the new start is."""
        return "; ".join(part for part in (self._loss, self._state) if part)

    @property
    def is_ready(self) -> bool:
        return self._command is not None and not self._is_stopping

    @property
    def num_open(self) -> int:
        """Requests on the way."""
        return len(self._open)

    def submit(self, request: Request, on_output: OnOutput) -> None:
        answer: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        with self._lock:
            if request.id in self._open:
                raise RequestError(f"A request with id {request.id!r} is running already.", "id")
            command = self._command
            if command is None or self._is_stopping:
                raise self._stopped()
            self._open[request.id] = _Open(on_output, answer)
        command({"do": "submit", "request": encode_request(request)})
        try:
            refused = answer.get(timeout=self._answer_seconds)
        except queue.Empty:
            self.abort(request.id)
            refused = EngineStoppedError(f"The engine did not answer within {self._answer_seconds:g} s.")
        if refused is not None:
            raise refused

    def abort(self, request_id: str) -> None:
        with self._lock:
            known = self._open.pop(request_id, None)
            command = self._command
        if known is not None and command is not None:
            command({"do": "abort", "id": request_id})

    def stats(self) -> EngineStats:
        now, before = self._stats, self._before
        return EngineStats(
            now.num_running,
            now.num_waiting,
            now.num_pages_used,
            now.num_pages_total,
            now.num_prompt_tokens + before.num_prompt_tokens,
            now.num_generated_tokens + before.num_generated_tokens,
            now.num_preemptions + before.num_preemptions,
        )

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Tell the process to; its owner waits for its end."""
        with self._lock:
            self._is_stopping, self._loss, self._state = True, "", "the server is shutting down"
            command = self._command
        if command is not None:
            command({"do": "stop", "drain": drain_seconds})

    def attach(self, command: Command, limits: Mapping[str, Any]) -> None:
        """Serve with a process that is ready from now on; its stats begin anew, the totals go on."""
        with self._lock:
            self.vocab_size, self.context_length = limits["vocab_size"], limits["context_length"]
            self.max_logprobs = limits["max_logprobs"]
            self._before, self._stats = self.stats(), EngineStats(**limits["stats"])
            self._command, self._loss, self._state = command, "", ""

    def detach(self, reason: str) -> None:
        """The process is lost: end what is on the way, take nothing."""
        with self._lock:
            self._command, self._loss, self._state = None, reason, ""
            lost, self._open = self._open, {}
        for request_id, entry in lost.items():
            entry.answer.put(self._stopped())
            entry.on_output(Output(request_id, finish_reason=FinishReason.ERROR, error=reason))

    def tell(self, state: str) -> None:
        """How the start that is under way stands; for people."""
        if self._command is None:
            self._state = state

    def hear(self, body: Mapping[str, Any]) -> None:
        """Take a word of the process that is attached; others are ignored."""
        match body["is"]:
            case "news":
                for value in body["outputs"]:
                    self._deliver(decode_output(value))
            case "beat" if body["stats"] is not None:
                self._stats = EngineStats(**body["stats"])
            case "accepted":
                self._answer(body["id"], None)
            case "refused":
                kind = getattr(errors, body["kind"], RequestError)
                self._answer(body["id"], kind(body["text"], body["param"]))

    def _deliver(self, output: Output) -> None:
        if output.finish_reason is FinishReason.ERROR:
            return  # the engine failed, perhaps for what another process did: `detach` will know, and end all requests
        with self._lock:
            entry = self._open.get(output.request_id)
            if entry is not None and output.finish_reason is not None:
                del self._open[output.request_id]
        if entry is not None:
            entry.answer.put(None)  # news may overtake the word that the request was taken
            entry.on_output(output)

    def _answer(self, request_id: str, refused: Exception | None) -> None:
        with self._lock:
            entry = self._open.get(request_id) if refused is None else self._open.pop(request_id, None)
        if entry is not None:
            entry.answer.put(refused)

    def _stopped(self) -> EngineStoppedError:
        return EngineStoppedError(f"The engine does not serve: {self.state}.")
