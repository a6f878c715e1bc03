"""Runs scheduled steps on the devices: packs host values, picks the compiled bucket, holds weights and cache.

A step is dispatched without waiting; `Dispatched.read` waits for it. Knows nothing of text, threads or callers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from podquant.engine.compiled import Programs
from podquant.engine.programs import FROM_DEVICE, Bucket, Floats, Inputs, Row, Scores, pack_rows, pad_inputs
from podquant.engine.request import SamplingParams, TokenLogprobs
from podquant.engine.sampling import Sampled
from podquant.engine.slots import Slots, slot_arrays
from podquant.engine.steps import Chunk, Step

Array = np.ndarray[Any, np.dtype[Any]]
Announce = Callable[[Bucket, Inputs], None]
"""Told of each step, before it is dispatched: its bucket and the host values it takes."""


@dataclass(frozen=True)
class StepResult:
    """What a step computed, on the host.

    Attributes:
        tokens: of each chunk of `Step.sampling`.
        logprobs: of these tokens; None where they are not wanted.
        prompt_logprobs: for each chunk of the step, of the tokens after each of its positions, if it is scored.
    """

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    prompt_logprobs: list[list[TokenLogprobs]]


@dataclass(frozen=True)
class Dispatched:
    """A step on its way through the devices; `targets` are those of `Inputs`, -1 where none is wanted."""

    step: Step
    sampled: Sampled
    scores: Scores | None
    targets: Array | None

    def read(self) -> StepResult:
        """Wait for the step and bring its results to the host."""
        chunks = self.step.sampling
        flat = np.asarray(self.sampled.tokens).tolist()
        ends = list(accumulate(chunk.num_sampled for chunk in chunks))
        spans = [range(end - chunk.num_sampled, end) for chunk, end in zip(chunks, ends, strict=True)]
        counts = [chunk.sequence.request.params.logprobs for chunk in chunks]
        logprobs: list[list[TokenLogprobs] | None] = [None] * len(chunks)
        if any(count is not None for count in counts):
            chosen, ids, values = (np.asarray(array) for array in self.sampled[1:])
            for i, (span, count) in enumerate(zip(spans, counts, strict=True)):
                if count is not None:
                    logprobs[i] = [_token_logprobs(flat[k], chosen[k], ids[k], values[k], count) for k in span]
        return StepResult([[flat[k] for k in span] for span in spans], logprobs, self._prompt_logprobs())

    def _prompt_logprobs(self) -> list[list[TokenLogprobs]]:
        found: list[list[TokenLogprobs]] = [[] for _ in self.step.chunks]
        if self.scores is None or self.targets is None:
            return found
        chosen, ids, values = (np.asarray(array) for array in self.scores)
        first = 0
        for chunk, entries in zip(self.step.chunks, found, strict=True):
            count = chunk.sequence.request.params.prompt_logprobs or 0
            for i in range(first, first + chunk.length):
                if self.targets[i] >= 0:
                    entries.append(_token_logprobs(int(self.targets[i]), chosen[i], ids[i], values[i], count))
            first += chunk.length
        return found


def _token_logprobs(token: int, logprob: Any, ids: Any, values: Any, count: int) -> TokenLogprobs:
    top = tuple(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
    return TokenLogprobs(token, float(logprob), top)


class Executor:
    """The devices' side of the engine; used by one thread.

    Where the mesh spans several processes, every one of them has an executor and runs the same steps in the same order:
    one schedules and announces, the others `run` what they hear.

    Args:
        programs: the compiled steps.
        weights: in the order of `Model.leaves`.
        eos_ids: the model's end tokens; needed where `dispatch` is called.
        announce: told of each step that `dispatch` starts.
    """

    def __init__(
        self,
        programs: Programs,
        weights: tuple[jax.Array, ...],
        eos_ids: frozenset[int] = frozenset(),
        announce: Announce = lambda bucket, inputs: None,
    ) -> None:
        self._programs = programs
        self._model, self._shape = programs.model, programs.shape
        self._weights = weights
        self._eos_ids = eos_ids
        self._announce = announce
        self._cache = jax.tree.map(_zeros, self._model.cache_arrays(self._shape))
        self._slots: Slots = jax.tree.map(_zeros, slot_arrays(self._model, self._shape))

    @property
    def num_compiled(self) -> int:
        """Programs compiled, and not found in the cache of an earlier start."""
        return self._programs.num_compiled

    @property
    def max_tokens(self) -> int:
        """Of a step at the most, by now."""
        return self._programs.max_tokens

    def warm_up(self) -> None:
        """Run each program that is there before the first request once, on padding."""
        for bucket in self._programs.first:
            self.run(bucket, self._packed([], is_scored=bucket.scores))
        jax.block_until_ready(self._cache)

    def close(self) -> None:
        """Compile no more."""
        self._programs.close()

    def dispatch(self, step: Step) -> Dispatched:
        """Start a step; returns before it is done."""
        is_scored = any(_is_scored(chunk) for chunk in step.chunks)
        bucket = self._programs.bucket(step.num_tokens, scores=is_scored)
        inputs = self._packed(step.chunks, is_scored=is_scored)
        self._announce(bucket, inputs)
        sampled, scores = self.run(bucket, inputs)
        return Dispatched(step, sampled, scores, inputs.targets)

    def _packed(self, chunks: Sequence[Chunk], *, is_scored: bool) -> Inputs:
        """What the devices need to know of these chunks."""
        rows, floats = pack_rows(
            list(map(self._entry, chunks)), [_floats(chunk.sequence.request.params) for chunk in chunks]
        )
        tokens: list[int] = []
        targets: list[int] = []
        ends: list[tuple[int, int]] = []
        for row, chunk in enumerate(chunks):
            ids, stop = chunk.sequence.token_ids, chunk.start + chunk.length
            tokens += ids[chunk.start : stop - len(chunk.drafts)] or [FROM_DEVICE]
            tokens += chunk.drafts
            after = ids[chunk.start + 1 : stop + 1] if _is_scored(chunk) else []
            targets += [*after, *[-1] * (chunk.length - len(after))]
            if chunk.start == 0:
                ends += [(row, token) for token in self._ends(chunk.sequence.request.params)]
        return Inputs(
            rows,
            floats,
            np.asarray(tokens, np.int32),
            np.asarray(ends, np.int32).reshape(-1, 2),
            np.asarray(targets, np.int32) if is_scored else None,
        )

    def _entry(self, chunk: Chunk) -> Row:
        sequence, params = chunk.sequence, chunk.sequence.request.params
        # Once all steps before this one are done the sequence has all tokens up to the end of the chunk.
        num_generated = max(chunk.start + chunk.length, len(sequence.token_ids)) - sequence.num_prompt
        forbids_ends = num_generated < params.min_tokens
        assert params.seed is not None  # the engine draws one for a request without
        return Row(
            slot=sequence.slot,
            start=chunk.start,
            length=chunk.length,
            top_k=max(params.top_k, 0),
            seed=params.seed,
            wants_logprobs=params.logprobs is not None,
            prompt_length=sequence.num_prompt,
            is_tallied=forbids_ends or params.is_penalized,
            forbids_ends=forbids_ends,
            num_sampled=chunk.num_sampled,
            pages=sequence.pages,
        )

    def _ends(self, params: SamplingParams) -> list[int]:
        """The tokens that `min_tokens` forbids."""
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self._eos_ids)
        return [token for token in ends if token < self._model.config.vocab_size] if params.min_tokens else []

    def run(self, bucket: Bucket, inputs: Inputs) -> tuple[Sampled, Scores | None]:
        """Run a step on host values as they were announced; returns before it is done.

        Raises:
            ValueError: they do not fit the bucket.
        """
        inputs = pad_inputs(inputs, bucket, self._shape)
        program = self._programs.get(bucket)
        self._cache, self._slots, sampled, *scores = program(self._weights, self._cache, self._slots, inputs)
        return sampled, scores[0] if scores else None


def _floats(params: SamplingParams) -> Floats:
    return Floats(
        temperature=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
    )


def _is_scored(chunk: Chunk) -> bool:
    """Whether log-probabilities of its own tokens are wanted: not again after a preemption."""
    sequence = chunk.sequence
    return chunk.is_prompt and sequence.request.params.prompt_logprobs is not None and sequence.num_generated == 0


def _zeros(array: jax.ShapeDtypeStruct) -> jax.Array:
    zeros: jax.Array = jax.jit(partial(jnp.zeros, array.shape, array.dtype), out_shardings=array.sharding)()
    return zeros
