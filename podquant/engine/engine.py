"""The engine: one thread that schedules, dispatches and delivers, with one step always ahead of the host.

    loop: take what callers sent → schedule → dispatch → read the step before → deliver

Callers talk to it through a queue and hear back through callbacks from the engine's thread. Nobody waits for it:
whether a request is taken is arithmetic, done in the caller's thread.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from podquant.engine.backend import EngineStats, OnOutput
from podquant.engine.defaults import SamplingDefaults
from podquant.engine.executor import Dispatched, Executor, StepResult
from podquant.engine.limits import Limits
from podquant.engine.output import OutputProcessor
from podquant.engine.pages import PagePool
from podquant.engine.request import FinishReason, Output, Request, TokenLogprobs
from podquant.engine.scheduler import Scheduler
from podquant.engine.steps import Chunk, Sequence
from podquant.errors import EngineStoppedError, RequestError
from podquant.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_STEPS_AHEAD = 1
"""Steps dispatched beyond the one whose tokens are being read."""


@dataclass
class _Client:
    """The caller's side of a running request."""

    sequence: Sequence
    processor: OutputProcessor
    on_output: OnOutput
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])


class LocalEngine:
    """Serves one model, in this process; a `Backend`.

    Args:
        model_name: what callers call it.
        executor: the devices' side, warmed up.
        scheduler: over the same cache.
        pool: its pages, for statistics.
        tokenizer: None to serve token ids only.
        limits: what requests it takes.
        eos_token_ids: the model's end tokens.
        random_seed: requests without a seed draw theirs from it.
        defaults: for whoever makes requests: how the model recommends to choose tokens.
    """

    def __init__(
        self,
        *,
        model_name: str,
        executor: Executor,
        scheduler: Scheduler,
        pool: PagePool,
        tokenizer: Tokenizer | None,
        limits: Limits,
        eos_token_ids: frozenset[int],
        random_seed: int,
        defaults: SamplingDefaults,
    ) -> None:
        self.model_name = model_name
        self.tokenizer = tokenizer
        self.limits = limits
        self.defaults = defaults
        self._failure: str | None = None
        self._executor = executor
        self._scheduler = scheduler
        self._pool = pool
        self._eos = eos_token_ids
        self._seeds = random.Random(random_seed)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[str, Request] = {}  # what was taken and has not ended; under the lock
        self._clients: dict[str, _Client] = {}  # the engine's thread's
        self._in_flight: deque[Dispatched] = deque()
        self._accepting = False
        self._deadline = float("inf")
        self._busy_since: float | None = None
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def failure(self) -> str | None:
        return self._failure

    @property
    def is_ready(self) -> bool:
        return self._accepting and self._failure is None

    @property
    def busy_seconds(self) -> float:
        """For how long it has been at the step it is at; 0 while there is nothing to do."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        """Begin to serve."""
        self._accepting = True
        self._thread.start()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those in flight end for `drain_seconds`, abort the rest, and end the thread."""
        self._accepting = False
        self._deadline = time.monotonic() + drain_seconds
        self._commands.put(lambda: None)
        if self._thread.ident is not None:
            self._thread.join()
        self._executor.close()

    def stats(self) -> EngineStats:
        """Load and totals; may be called from any thread."""
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_pages_used=self._pool.num_usable - self._pool.num_free,
            num_pages_total=self._pool.num_usable,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=self._scheduler.num_preemptions,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            num_compiled=self._executor.num_compiled,
            num_draft_tokens=self._scheduler.num_draft_tokens,
            num_accepted_tokens=self._scheduler.num_accepted_tokens,
        )

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Run a request; returns at once. News of it comes to `on_output`, from the engine's thread.

        Whatever happens to the engine, the last news has a finish reason.

        Raises:
            RequestError: a token id or a parameter the model does not have.
            RequestTooLongError, QueueFullError: it can never, or not now, be taken.
            EngineStoppedError: the engine does not serve.
        """
        self._require_ready()
        self.limits.check(request)
        if request.params.seed is None:
            request = replace(request, params=replace(request.params, seed=self._seeds.getrandbits(31)))
        with self._lock:  # `_close` takes it too: a request is refused, or is among those that end there
            self._require_ready()
            if request.id in self._open:
                raise RequestError(f"A request with id {request.id!r} is running already.", "id")
            self.limits.check_load(len(self._open))
            self._open[request.id] = request
            self._commands.put(partial(self._add, request, on_output))

    def abort(self, request_id: str) -> None:
        """End a request; its pages are free at once and nothing more is heard of it. Unknown ids are ignored."""
        with self._lock:
            if self._open.pop(request_id, None) is not None:
                self._commands.put(partial(self._abort, request_id))

    def _require_ready(self) -> None:
        if not self.is_ready:
            raise EngineStoppedError(f"The engine does not serve: {self._failure or 'it is shutting down'}.")

    def _add(self, request: Request, on_output: OnOutput) -> None:
        processor = OutputProcessor(request, self.tokenizer, self._eos)
        self._clients[request.id] = _Client(self._scheduler.add(request), processor, on_output)
        self._num_prompt_tokens += len(request.prompt_ids)

    def _abort(self, request_id: str) -> None:
        client = self._clients.get(request_id)
        if client is not None:
            self._forget(client)

    def _forget(self, client: _Client) -> None:
        """Give up what a request holds."""
        request = client.sequence.request
        self._scheduler.finish(client.sequence)
        del self._clients[request.id]
        with self._lock:
            if self._open.get(request.id) is request:  # not another of this name, after an abort
                del self._open[request.id]

    def _run(self) -> None:
        try:
            while self._step():
                pass
            self._close(FinishReason.ABORT, "the server is shutting down")
        except Exception as error:
            _log.exception("the engine failed")
            self._failure = f"{type(error).__name__}: {error}"
            self._close(FinishReason.ERROR, self._failure)

    def _step(self) -> bool:
        """One round; False when the engine is to end."""
        self._take_commands()
        if not self._accepting and (not self._clients or time.monotonic() >= self._deadline):
            return False
        self._scheduler.max_tokens = self._executor.max_tokens
        step = self._scheduler.schedule()
        self._busy_since = time.monotonic() if step is not None or self._in_flight else None
        if step is not None:
            self._in_flight.append(self._executor.dispatch(step))
        if self._in_flight and (step is None or len(self._in_flight) > _STEPS_AHEAD):
            dispatched = self._in_flight.popleft()
            self._deliver(dispatched, dispatched.read())
        elif step is None and self._commands.empty():
            self._commands.get()()  # nothing to do: sleep until a caller has something
        return True

    def _take_commands(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _deliver(self, dispatched: Dispatched, result: StepResult) -> None:
        step = dispatched.step
        for chunk, scored in zip(step.chunks, result.prompt_logprobs, strict=True):
            if chunk.is_prompt:
                self._deliver_prompt(chunk, scored)
        accepted = self._scheduler.complete(step, result.tokens)
        for (sequence, tokens), logprobs in zip(accepted, result.logprobs, strict=True):
            for index, token in enumerate(tokens):
                client = self._clients.get(sequence.request.id)
                if client is None or client.sequence is not sequence:  # it has ended at the token before
                    break
                self._num_generated_tokens += 1
                output = client.processor.append(token, logprobs[index] if logprobs is not None else None)
                if output is None:
                    continue
                if output.finish_reason is not None:
                    self._forget(client)
                self._emit(client, output)

    def _deliver_prompt(self, chunk: Chunk, logprobs: list[TokenLogprobs]) -> None:
        """Gather the prompt's log-probabilities, and end a request that wants nothing else."""
        sequence, request = chunk.sequence, chunk.sequence.request
        client = self._clients.get(request.id)
        if client is None:
            return
        if chunk.start == 0:
            client.prompt_logprobs = [None]  # from the start again, if the sequence was preempted half-way
        client.prompt_logprobs += logprobs
        if not chunk.samples:
            return
        if sequence.num_generated == 0:
            client.processor.note_cached(sequence.num_cached)
        if request.params.prompt_logprobs is not None and sequence.num_generated == 0:
            client.processor.add_prompt_logprobs(tuple(client.prompt_logprobs))
        if request.params.max_tokens == 0:
            self._end(client, FinishReason.LENGTH)

    def _end(self, client: _Client, reason: FinishReason, error: str | None = None) -> None:
        self._forget(client)
        output = client.processor.finish(reason, error)
        if output is not None:
            self._emit(client, output)

    def _emit(self, client: _Client, output: Output) -> None:
        try:
            client.on_output(output)
        except Exception:
            # A caller's fault (a closed event loop, say) must not end everyone's engine.
            _log.exception("request %s: its callback failed; aborting it", output.request_id)
            self._abort(output.request_id)

    def _close(self, reason: FinishReason, why: str) -> None:
        """Take no more requests, and end those that were taken."""
        with self._lock:
            self._accepting = False
        self._take_commands()
        for client in list(self._clients.values()):
            self._end(client, reason, why)
