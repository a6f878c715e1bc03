"""Several engines behind one: a request goes to the one with the fewest in flight. A `Backend`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import astuple

from podquant.engine.backend import EngineStats, OnOutput
from podquant.engine.limits import Limits
from podquant.engine.request import Output, Request
from podquant.errors import EngineStoppedError, RequestError
from podquant.group.remote_engine import RemoteEngine


class Replicas:
    """Engines that serve the same model, independently: while one is lost, the others go on."""

    def __init__(self, engines: Sequence[RemoteEngine]) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._owners: dict[str, RemoteEngine] = {}
        self._next = 0
        first = engines[0]
        self.model_name, self.tokenizer, self.defaults = first.model_name, first.tokenizer, first.defaults

    @property
    def limits(self) -> Limits:
        """Of the replica with the smallest cache: any may be the one that serves a request."""
        told = [engine.limits for engine in self._engines if engine.limits.vocab_size]
        return min(told, key=lambda limits: limits.cache_tokens, default=Limits())

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
        def hear(output: Output) -> None:
            if output.finish_reason is not None:
                self._forget(request.id)
            on_output(output)

        for engine in self._by_load():
            with self._lock:
                if request.id in self._owners:
                    raise RequestError(f"A request with id {request.id!r} is running already.", "id")
                self._owners[request.id] = engine
            try:
                engine.submit(request, hear)
            except EngineStoppedError:  # lost since it was chosen
                self._forget(request.id)
            except BaseException:
                self._forget(request.id)
                raise
            else:
                return
        raise EngineStoppedError(f"The engine does not serve: {self.failure or self._engines[0].state}.")

    def _by_load(self) -> list[RemoteEngine]:
        """Those that serve, the one with the fewest requests in flight first; of equals, each in its turn."""
        with self._lock:
            self._next += 1
            first = self._next % len(self._engines)
        order = [*self._engines[first:], *self._engines[:first]]
        return sorted((engine for engine in order if engine.is_ready), key=lambda engine: engine.num_open)

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
