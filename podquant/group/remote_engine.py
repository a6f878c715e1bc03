"""An engine that runs in another process, as a `Backend`: requests go there, outputs come back, and when the process is
lost every request in flight ends with an error that says so.

Whether a request is taken is decided here, by the limits that the process told. Knows nothing of how the process is
started again; until it is, nothing is taken.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import fields

import numpy as np

from podquant.engine.backend import EngineStats, OnOutput
from podquant.engine.defaults import SamplingDefaults
from podquant.engine.limits import Limits
from podquant.engine.request import FinishReason, Output, Request
from podquant.errors import EngineStoppedError, RequestError
from podquant.group.messages import (
    Abort,
    EngineCommand,
    EngineNews,
    EngineReady,
    MemberHeartbeat,
    Outputs,
    Stop,
    Submit,
)
from podquant.tokenizer.tokenizer import Tokenizer

Send = Callable[[EngineCommand], None]

_NO_LOAD = EngineStats(*[0] * len(fields(EngineStats)))


class _Outbox:
    """Sends requests and commands to a process in their order, from a thread: encoding and sending hold up nobody."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: queue.SimpleQueue[Request | Abort | Stop | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="commands", daemon=True).start()

    def put(self, command: Request | Abort | Stop) -> None:
        """Send a command, in its turn."""
        self._waiting.put(command)

    def close(self) -> None:
        """End once what is there has been sent."""
        self._waiting.put(None)

    def _run(self) -> None:
        sent: tuple[int, ...] = ()
        while (command := self._waiting.get()) is not None:
            if not isinstance(command, Request):
                self._send(command)
                continue
            prompt, sent = () if command.prompt_ids is sent else command.prompt_ids, command.prompt_ids
            self._send(Submit(command.id, np.array(prompt, np.int32), command.params, command.cache_salt))


class RemoteEngine:
    """A `Backend`, served by whichever process is attached."""

    def __init__(self, model_name: str, tokenizer: Tokenizer | None, defaults: SamplingDefaults) -> None:
        self.model_name, self.tokenizer, self.defaults = model_name, tokenizer, defaults
        self.limits = Limits()
        self._lock = threading.Lock()
        self._open: dict[str, OnOutput] = {}
        self._outbox: _Outbox | None = None
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
        return self._outbox is not None and not self._is_stopping

    @property
    def num_open(self) -> int:
        """Requests in flight."""
        return len(self._open)

    def submit(self, request: Request, on_output: OnOutput) -> None:
        self._ready_outbox()
        self.limits.check(request)
        with self._lock:
            outbox = self._ready_outbox()
            if request.id in self._open:
                raise RequestError(f"A request with id {request.id!r} is running already.", "id")
            self.limits.check_load(len(self._open))
            self._open[request.id] = on_output
            outbox.put(request)

    def abort(self, request_id: str) -> None:
        with self._lock:
            if self._open.pop(request_id, None) is not None and self._outbox is not None:
                self._outbox.put(Abort(request_id))

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
            now.num_cached_tokens + before.num_cached_tokens,
            now.num_compiled + before.num_compiled,
            now.num_draft_tokens + before.num_draft_tokens,
            now.num_accepted_tokens + before.num_accepted_tokens,
        )

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Tell the process to; its owner waits for its end."""
        with self._lock:
            self._is_stopping, self._loss, self._state = True, "", "the server is shutting down"
            if self._outbox is not None:
                self._outbox.put(Stop(drain_seconds))

    def attach(self, send: Send, ready: EngineReady) -> None:
        """Serve with a process that is ready from now on; its stats begin at 0, the totals go on."""
        with self._lock:
            self.limits = ready.limits
            self._before, self._stats = self.stats(), ready.stats
            self._outbox, self._loss, self._state = _Outbox(send), "", ""

    def detach(self, reason: str) -> None:
        """The process is lost: end what is in flight, take nothing."""
        with self._lock:
            outbox, self._outbox = self._outbox, None
            self._loss, self._state = reason, ""
            lost, self._open = self._open, {}
        if outbox is not None:
            outbox.close()
        for request_id, on_output in lost.items():
            on_output(Output(request_id, finish_reason=FinishReason.ERROR, error=reason))

    def tell(self, state: str) -> None:
        """How the start that is under way stands; for people."""
        if self._outbox is None:
            self._state = state

    def take(self, news: EngineNews) -> None:
        """Hear of the process that is attached."""
        match news:
            case Outputs(outputs):
                for output in outputs:
                    self._deliver(output)
            case MemberHeartbeat(stats=EngineStats() as stats):
                self._stats = stats

    def _deliver(self, output: Output) -> None:
        if output.finish_reason is FinishReason.ERROR:
            return  # the engine failed, perhaps for what another process did: `detach` will know, and end all requests
        with self._lock:
            on_output = self._open.get(output.request_id)
            if on_output is not None and output.finish_reason is not None:
                del self._open[output.request_id]
        if on_output is not None:
            on_output(output)

    def _ready_outbox(self) -> _Outbox:
        outbox = self._outbox
        if outbox is None or self._is_stopping:
            raise EngineStoppedError(f"The engine does not serve: {self.state}.")
        return outbox
