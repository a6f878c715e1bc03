"""The compiled steps of one model, by their buckets: before the first request, beside the first ones, or at first use.

They need no weights, so they are compiled while these are loaded. On a CPU, which often serves one user for a minute,
two are enough to begin with; steps are then as large as what is there, until all are. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from podquant.engine.compile_cache import was_found
from podquant.engine.compiler import compiler_options
from podquant.engine.programs import Bucket, lower_step
from podquant.model.layout import CacheShape, Model

_log = logging.getLogger(__name__)

Program = Callable[..., Any]


class Programs:
    """The steps that one engine runs.

    Args:
        model: laid out over its mesh.
        shape: of the KV cache.
        sizes: tokens of each program's step, the largest last.
        num_top: log-probabilities of top tokens that they report.
        is_lazy: compile each at its first use.

    Attributes:
        num_compiled: programs that were compiled, and not found in the cache of an earlier start.
    """

    def __init__(
        self, model: Model, shape: CacheShape, sizes: Sequence[int], num_top: int, *, is_lazy: bool = False
    ) -> None:
        self.model, self.shape, self.sizes = model, shape, tuple(sizes)
        self.num_compiled = 0
        self._is_lazy = is_lazy
        self._num_top = min(num_top, model.config.vocab_size)
        self._options = dict(compiler_options(model.numerics.device_kind, model.numerics.dtype))
        self._programs: dict[Bucket, Program] = {}
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._rest: threading.Thread | None = None

    @property
    def buckets(self) -> list[Bucket]:
        """Every shape the engine can run, the largest first."""
        return [Bucket(self.sizes[-1], scores=True), *map(Bucket, reversed(self.sizes))]

    @property
    def first(self) -> list[Bucket]:
        """To compile before the first request: all; on a CPU one with room for all sequences, and the smallest."""
        if self._is_lazy:
            return []
        if self.model.numerics.platform != "cpu":
            return self.buckets
        roomy = next((size for size in self.sizes if size >= 2 * self.shape.num_slots), self.sizes[-1])
        return [Bucket(size) for size in dict.fromkeys((roomy, self.sizes[0]))]

    @property
    def max_tokens(self) -> int:
        """Of a step, for which there is a program by now."""
        return self.sizes[-1] if self._is_lazy else max(self._ready)

    def bucket(self, num_tokens: int, *, scores: bool) -> Bucket:
        """The smallest that takes so many tokens; prompts are scored in the largest."""
        if scores:
            return Bucket(self.sizes[-1], scores=True)
        sizes = self.sizes if self._is_lazy else self._ready
        return Bucket(min(size for size in sizes if size >= num_tokens))

    def start_rest(self, on_end: Callable[[], None]) -> None:
        """Compile what is missing beside the first requests, until `close`; then call `on_end`, in a thread."""
        if not self._is_lazy:
            self._rest = threading.Thread(target=self._compile_rest, args=(on_end,), name="compile")
            self._rest.start()

    def close(self) -> None:
        """Compile no more; waits for the program that is being compiled."""
        self._is_closed.set()
        if self._rest is not None:
            self._rest.join()

    @property
    def _ready(self) -> list[int]:
        return [bucket.num_tokens for bucket in list(self._programs) if not bucket.scores]

    def _compile_rest(self, on_end: Callable[[], None]) -> None:
        for bucket in self.buckets:
            if self._is_closed.is_set() or not threading.main_thread().is_alive():  # nobody will run it
                return
            if not bucket.scores:  # which most never ask for
                self.get(bucket)
        on_end()

    def compile(self, buckets: Sequence[Bucket]) -> None:
        """Compile these, several at a time."""
        with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), "compile") as pool:
            for _ in pool.map(self.get, buckets):
                pass

    def get(self, bucket: Bucket) -> Program:
        """A program, compiled now if it has not been."""
        program = self._programs.get(bucket)
        if program is not None:
            return program
        began = time.monotonic()
        program = lower_step(self.model, self.shape, bucket, self._num_top).compile(self._options)
        is_found = was_found()
        with self._lock:
            self.num_compiled += not is_found
            program = self._programs.setdefault(bucket, program)
        how = "found" if is_found else "compiled"
        _log.info("%s the step of %s in %.1f s", how, bucket, time.monotonic() - began)
        return program
