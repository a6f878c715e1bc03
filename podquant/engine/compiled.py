"""The compiled steps of one model, by their buckets: before the first request, or each at its first use.

They need no weights, so they are compiled while these are loaded. Knows nothing of requests.
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

    Attributes:
        num_compiled: programs that were compiled, and not found in the cache of an earlier start.
    """

    def __init__(self, model: Model, shape: CacheShape, sizes: Sequence[int], num_top: int) -> None:
        self.model, self.shape, self.sizes = model, shape, tuple(sizes)
        self.num_compiled = 0
        self._num_top = min(num_top, model.config.vocab_size)
        self._options = dict(compiler_options(model.numerics.device_kind, model.numerics.dtype))
        self._programs: dict[Bucket, Program] = {}
        self._lock = threading.Lock()

    @property
    def buckets(self) -> list[Bucket]:
        """Every shape the engine can run, the largest first."""
        return [Bucket(self.sizes[-1], scores=True), *map(Bucket, reversed(self.sizes))]

    @property
    def first(self) -> list[Bucket]:
        """Those to compile before the first request.

        All of them; but on a CPU, which compiles one in seconds and often runs for one user, the smallest alone.
        """
        return [Bucket(self.sizes[0])] if self.model.numerics.platform == "cpu" else self.buckets

    def bucket(self, num_tokens: int, *, scores: bool) -> Bucket:
        """The smallest that takes so many tokens; prompts are scored in the largest."""
        size = self.sizes[-1] if scores else next(size for size in self.sizes if size >= num_tokens)
        return Bucket(size, scores)

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
