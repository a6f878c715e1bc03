"""Runs scheduled steps on the devices: packs host values, picks the compiled bucket, holds weights and cache.

A step is dispatched without waiting; `Dispatched.read` waits for it. Knows nothing of text, threads or callers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from podquant.engine.programs import Bucket, Floats, Row, Rows, Scores, lower_step, pack_rows
from podquant.engine.request import SamplingParams, TokenLogprobs
from podquant.engine.sampling import Sampled
from podquant.engine.scheduler import Decode, Prefill
from podquant.engine.scheduler import Sequence as Running
from podquant.engine.slots import NUM_ENDS, Slots, slot_arrays
from podquant.model.attention import KVCache
from podquant.model.layout import CacheShape, Model

_SMALLEST_PREFILL = 32


@dataclass(frozen=True)
class StepResult:
    """What a step computed, on the host.

    Attributes:
        tokens: the sampled token of each row.
        logprobs: for each row that wants them, of its token.
        prompt_logprobs: of a scored prefill, for the tokens after each of its positions.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[TokenLogprobs]


@dataclass(frozen=True)
class Dispatched:
    """A step on its way through the devices."""

    step: Prefill | Decode
    sampled: Sampled
    scores: Scores | None
    wanted: tuple[int | None, ...]
    targets: tuple[int, ...]

    def read(self) -> StepResult:
        """Wait for the step and bring its results to the host."""
        tokens = np.asarray(self.sampled.tokens)[: len(self.wanted)].tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if any(count is not None for count in self.wanted):
            chosen, ids, values = (np.asarray(array) for array in self.sampled[1:])
            for row, count in enumerate(self.wanted):
                if count is not None:
                    logprobs[row] = _token_logprobs(tokens[row], chosen[row], ids[row], values[row], count)
        return StepResult(tokens, logprobs, list(self._prompt_logprobs()))

    def _prompt_logprobs(self) -> Iterator[TokenLogprobs]:
        if self.scores is None:
            return
        assert isinstance(self.step, Prefill)
        count = self.step.sequence.request.params.prompt_logprobs or 0
        chosen, ids, values = (np.asarray(array)[0] for array in self.scores)
        for i, token in enumerate(self.targets):
            yield _token_logprobs(token, chosen[i], ids[i], values[i], count)


def _token_logprobs(token: int, logprob: Any, ids: Any, values: Any, count: int) -> TokenLogprobs:
    top = tuple(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
    return TokenLogprobs(token, float(logprob), top)


Array = np.ndarray[Any, np.dtype[Any]]
Announce = Callable[[Bucket, Sequence[Array]], None]
"""Told of each step, before it is dispatched: its bucket and the host values it takes."""


class Executor:
    """The devices' side of the engine; used by one thread.

    Where the mesh spans several processes, every one of them has an executor and runs the same steps in the same order:
    one schedules and announces, the others `run` what they hear.

    Args:
        model: laid out over its mesh.
        weights: in the order of `model.leaves`.
        shape: of the KV cache to make.
        chunk_size: prompt tokens of the largest prefill step.
        num_top: log-probabilities of top tokens the programs report.
        eos_ids: the model's end tokens; needed where `dispatch` is called.
        announce: told of each step that `dispatch` starts.
    """

    def __init__(
        self,
        model: Model,
        weights: tuple[jax.Array, ...],
        shape: CacheShape,
        chunk_size: int,
        num_top: int,
        eos_ids: frozenset[int] = frozenset(),
        announce: Announce = lambda bucket, arrays: None,
    ) -> None:
        self._model = model
        self._weights = weights
        self._shape = shape
        self._eos_ids = eos_ids
        self._announce = announce
        self._num_top = min(num_top, model.config.vocab_size)
        self._programs: dict[Bucket, Callable[..., Any]] = {}
        self._cache = KVCache(*map(_zeros, model.cache_arrays(shape)))
        self._slots = Slots(*map(_zeros, slot_arrays(model, shape)))
        self._decode_sizes = _powers_of_two(1, shape.num_slots)
        self._prefill_sizes = _powers_of_two(min(_SMALLEST_PREFILL, chunk_size), chunk_size)

    @property
    def buckets(self) -> list[Bucket]:
        """Every shape the engine can run, the largest first."""
        prefills = [Bucket(1, size) for size in self._prefill_sizes]
        return [
            Bucket(1, self._prefill_sizes[-1], scores=True),
            *reversed(prefills),
            *(Bucket(size, 1) for size in reversed(self._decode_sizes)),
        ]

    def warm_up(self, on_compiled: Callable[[Bucket, float], None]) -> None:
        """Compile every bucket and run it once on padding; nothing compiles afterwards.

        Args:
            on_compiled: called with each bucket and the seconds it took.
        """

        def build(bucket: Bucket) -> tuple[Bucket, Callable[..., Any], float]:
            began = time.monotonic()
            return bucket, self._compile(bucket), time.monotonic() - began

        with ThreadPoolExecutor(2, "compile") as pool:
            for bucket, program, seconds in pool.map(build, self.buckets):
                self._programs[bucket] = program
                self.run(bucket, self._arrays(bucket, pack_rows([], [], bucket.batch, self._shape)))
                on_compiled(bucket, seconds)
        jax.block_until_ready(self._cache)

    def dispatch(self, step: Prefill | Decode) -> Dispatched:
        """Start a step; returns before it is done."""
        if isinstance(step, Decode):
            return self._dispatch_decode(step)
        return self._dispatch_prefill(step)

    def _dispatch_decode(self, step: Decode) -> Dispatched:
        bucket = Bucket(_at_least(self._decode_sizes, len(step.sequences)), 1)
        entries = [self._entry(s, s.num_computed - 1, 1, s.num_computed - s.num_prompt) for s in step.sequences]
        rows = pack_rows(entries, [_floats(s.request.params) for s in step.sequences], bucket.batch, self._shape)
        sampled, _ = self._run(bucket, self._arrays(bucket, rows))
        return Dispatched(step, sampled, None, tuple(s.request.params.logprobs for s in step.sequences), ())

    def _dispatch_prefill(self, step: Prefill) -> Dispatched:
        sequence, params = step.sequence, step.sequence.request.params
        scored = params.prompt_logprobs is not None and sequence.num_generated == 0
        size = self._prefill_sizes[-1] if scored else _at_least(self._prefill_sizes, step.length)
        stop = step.start + step.length
        entry = self._entry(sequence, step.start, step.length, sequence.num_generated)
        rows = pack_rows([entry], [_floats(params)], 1, self._shape)
        tokens = sequence.token_ids[step.start : stop]
        targets = sequence.token_ids[step.start + 1 : stop + 1] if scored else []
        bucket = Bucket(1, size, scored)
        sampled, scores = self._run(bucket, self._arrays(bucket, rows, tokens, self._ends(params), targets))
        wanted = (params.logprobs,) if step.is_last else ()
        return Dispatched(step, sampled, scores, wanted, tuple(targets))

    def _entry(self, sequence: Running, start: int, length: int, num_generated: int) -> Row:
        """A row, whose sequence has so many generated tokens once all steps before this one are done."""
        params = sequence.request.params
        forbids_ends = num_generated < params.min_tokens
        assert params.seed is not None  # the engine draws one for a request without
        return Row(
            slot=sequence.slot,
            start=start,
            length=length,
            top_k=max(params.top_k, 0),
            seed=params.seed,
            wants_logprobs=params.logprobs is not None,
            prompt_length=sequence.num_prompt,
            is_tallied=forbids_ends or params.is_penalized,
            forbids_ends=forbids_ends,
            pages=sequence.pages,
        )

    def _ends(self, params: SamplingParams) -> list[int]:
        """The tokens that `min_tokens` forbids."""
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self._eos_ids)
        return [token for token in ends if token < self._model.config.vocab_size] if params.min_tokens else []

    def run(self, bucket: Bucket, arrays: Sequence[Array]) -> tuple[Sampled, Scores | None]:
        """Run a step on host values as they were announced; returns before it is done."""
        program = self._programs.get(bucket)
        if program is None:
            program = self._programs[bucket] = self._compile(bucket)
        ints, floats, *given = arrays
        self._cache, self._slots, sampled, *scores = program(
            self._weights, self._cache, self._slots, Rows(ints, floats), *given
        )
        return sampled, scores[0] if scores else None

    def _run(self, bucket: Bucket, arrays: Sequence[Array]) -> tuple[Sampled, Scores | None]:
        self._announce(bucket, arrays)
        return self.run(bucket, arrays)

    def _arrays(
        self,
        bucket: Bucket,
        rows: Rows,
        tokens: Sequence[int] = (),
        ends: Sequence[int] = (),
        targets: Sequence[int] = (),
    ) -> list[Array]:
        """The host values a bucket's program takes, in its order."""
        arrays: list[Array] = [rows.ints, rows.floats]
        if not bucket.is_decode:
            arrays += [_padded(tokens, bucket.length), _padded(ends, NUM_ENDS, -1)]
        if bucket.scores:
            arrays.append(_padded(targets, bucket.length))
        return arrays

    def _compile(self, bucket: Bucket) -> Callable[..., Any]:
        return lower_step(self._model, self._shape, bucket, self._num_top).compile()


def _floats(params: SamplingParams) -> Floats:
    return Floats(
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
    )


def _padded(tokens: Sequence[int], length: int, padding: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    row = np.full((1, length), padding, np.int32)
    row[0, : len(tokens)] = tokens
    return row


def _zeros(array: jax.ShapeDtypeStruct) -> jax.Array:
    zeros: jax.Array = jax.jit(partial(jnp.zeros, array.shape, array.dtype), out_shardings=array.sharding)()
    return zeros


def _powers_of_two(smallest: int, largest: int) -> list[int]:
    """Powers of two from `smallest` on, and `largest` itself at the end."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, largest]


def _at_least(sizes: Sequence[int], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)
