"""Several engines behind one: a request goes to the one with the least on the way. A `Backend`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import astuple

from podquant.engine.backend import EngineStats, OnOutput
from podquant.engine.request import Output, Request
from podquant.errors import EngineStoppedError
from podquant.group.remote_engine import RemoteEngine


class Replicas:
    """Engines that serve the same model, independently: while one is lost, the others go on."""

    def __init__(self, engines: Sequence[RemoteEngine]) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._owners: dict[str, RemoteEngine] = {}
        self._next = 0
        self.model_name, self.tokenizer = engines[0].model_name, engines[0].tokenizer

    @property
    def vocab_size(self) -> int:
        return max(engine.vocab_size for engine in self._engines)

    @property
    def context_length(self) -> int:
        return max(engine.context_length for engine in self._engines)

    @property
    def max_logprobs(self) -> int:
        return max(engine.max_logprobs for engine in self._engines)

    @property
    def failure(self) -> str | None:
        failures = [engine.failure for engine in self._engines]
        if any(engine.is_ready for engine in self._engines):
            return None
        return "; ".join(text for text in failures if text is not None) or None

    @property
    def is_ready(self) -> bool:
        return any(engine.is_ready for engine in self._engines)

    def submit(self, request: Request, on_output: OnOutput) -> None:
        with self._lock:
            ready = [engine for engine in self._engines if engine.is_ready]
            if not ready:
                raise EngineStoppedError(f"The engine does not serve: {self.failure or self._engines[0].state}.")
            self._next += 1  # of several with as little, each in its turn
            order = [ready[(self._next + each) % len(ready)] for each in range(len(ready))]
            engine = min(order, key=lambda each: each.num_open)
            self._owners[request.id] = engine

        def hear(output: Output) -> None:
            if output.finish_reason is not None:
                self._forget(request.id)
            on_output(output)

        try:
            engine.submit(request, hear)
        except BaseException:
            self._forget(request.id)
            raise

    def abort(self, request_id: str) -> None:
        engine = self._forget(request_id)
        if engine is not None:
            engine.abort(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(*map(sum, zip(*(astuple(engine.stats()) for engine in self._engines), strict=True)))

    def stop(self, drain_seconds: float = 0.0) -> None:
        for engine in self._engines:
            engine.stop(drain_seconds)

    def _forget(self, request_id: str) -> RemoteEngine | None:
        with self._lock:
            return self._owners.pop(request_id, None)
