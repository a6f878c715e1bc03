"""A small machine for a scheduler to drive: paged memory, one last token per slot, programs run in order.

Its next token depends on every earlier one, read back through the pages, so a page that is shared, lost, skipped or
written out of order changes the output.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from podquant.engine.pages import PagePool
from podquant.engine.request import Request
from podquant.engine.scheduler import Scheduler
from podquant.engine.steps import Chunk, Sequence, Step

VOCABULARY = 97


def next_token(tokens: list[int]) -> int:
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 10007
    return value % VOCABULARY


def expected_tokens(request: Request, stop_token: int) -> list[int]:
    tokens = list(request.prompt_ids)
    for _ in range(request.params.max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] == stop_token:
            break
    return tokens[len(request.prompt_ids) :]


class Machine:
    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.memory: dict[tuple[int, int], int] = {}
        self.last_token: dict[int, int] = {}

    def run(self, step: Step) -> list[list[int]]:
        """As the devices do: the inputs are read first, then all is written, then all is read back."""
        for chunk, tokens in [(chunk, self._tokens(chunk)) for chunk in step.chunks]:
            self.memory.update(zip(self._places(chunk)[chunk.start :], tokens, strict=True))
        sampled = []
        for chunk in step.sampling:
            text = [self.memory[place] for place in self._places(chunk)]
            ends = range(len(text) - chunk.num_sampled + 1, len(text) + 1)
            sampled.append([next_token(text[:end]) for end in ends])
            self.last_token[chunk.sequence.slot] = sampled[-1][-1]
        return sampled

    def _tokens(self, chunk: Chunk) -> list[int]:
        stop = chunk.start + chunk.length - len(chunk.drafts)
        known = chunk.sequence.token_ids[chunk.start : stop]
        return [*(known or [self.last_token[chunk.sequence.slot]]), *chunk.drafts]

    def _places(self, chunk: Chunk) -> list[tuple[int, int]]:
        pages = chunk.sequence.pages
        return [(pages[i // self.page_size], i % self.page_size) for i in range(chunk.start + chunk.length)]


@dataclass
class Run:
    """Drives a scheduler as an engine does, `run_ahead` steps ahead of the tokens, checking every step."""

    pool: PagePool
    scheduler: Scheduler
    max_running: int
    max_tokens: int
    run_ahead: int
    stop_token: int
    num_drafts: int = 0
    outputs: dict[str, list[int]] = field(default_factory=dict)
    sequences: dict[str, Sequence] = field(default_factory=dict)
    in_flight: deque[tuple[Step, list[list[int]]]] = field(default_factory=deque)
    oldest: Sequence | None = None

    def __post_init__(self) -> None:
        self.machine = Machine(self.pool.page_size)

    def add(self, request: Request) -> None:
        self.sequences[request.id] = self.scheduler.add(request)
        self.outputs[request.id] = []

    def advance(self) -> None:
        step = self.scheduler.schedule()
        self.check_pages()
        if step is not None:
            self.check_step(step)
            self.in_flight.append((step, self.machine.run(step)))
        else:
            assert self.in_flight or not self.scheduler.has_work, "nothing to run, nothing to wait for, yet not done"
        if self.in_flight and (step is None or len(self.in_flight) > self.run_ahead):
            for sequence, tokens in self.scheduler.complete(*self.in_flight.popleft()):
                for token in tokens:
                    self.outputs[sequence.request.id].append(token)
                    if token == self.stop_token:
                        self.scheduler.finish(sequence)
                        break

    def check_step(self, step: Step) -> None:
        assert 1 <= step.num_tokens <= self.max_tokens
        assert len({chunk.sequence.slot for chunk in step.chunks}) == len(step.chunks)
        lengths = [chunk.length for chunk in step.chunks]
        assert lengths == sorted(lengths, key=lambda length: length > 1)
        generating = {id(s) for s in self.sequences.values() if s.slot >= 0 and s.num_in_flight > 0 and not s.finished}
        assert {id(chunk.sequence) for chunk in step.sampling} <= generating
        assert self.num_drafts or {id(chunk.sequence) for chunk in step.sampling} == generating
        for chunk in step.chunks:
            sequence = chunk.sequence
            if chunk.is_prompt:
                assert sequence.num_in_flight == chunk.samples
                assert chunk.samples == (chunk.start + chunk.length == len(sequence.token_ids))
            assert not sequence.finished
            assert sequence.num_computed == chunk.start + chunk.length <= len(sequence.pages) * self.pool.page_size
            assert len(chunk.drafts) <= self.num_drafts
            assert sequence.num_generated + chunk.num_sampled <= max(sequence.request.params.max_tokens, 1)
            assert sequence.num_generated + sequence.num_in_flight <= max(sequence.request.params.max_tokens, 1)

    def check_pages(self) -> None:
        running = [sequence for sequence in self.sequences.values() if sequence.slot >= 0]
        held = [page for sequence in self.sequences.values() for page in sequence.pages]
        assert all(len(set(sequence.pages)) == len(sequence.pages) for sequence in running)
        # a page that somebody still writes to has no other user
        written = [page for s in running for page in s.pages[s.num_computed // self.pool.page_size :]]
        assert all(held.count(page) == 1 for page in written)
        assert 0 not in held
        assert len(set(held)) + self.pool.num_free == self.pool.num_usable
        assert len(running) == self.scheduler.num_running <= self.max_running
        assert len({sequence.slot for sequence in running}) == len(running)
        # self.sequences is in the order of arrival; once it runs, the oldest keeps what it has
        live = (s for s in self.sequences.values() if not s.finished and not (s.slot < 0 and s.is_exhausted))
        oldest = next(live, None)
        assert oldest is None or oldest is not self.oldest or oldest.slot >= 0
        self.oldest = oldest if oldest is not None and oldest.slot >= 0 else None
        assert all(0 <= sequence.slot < self.max_running for sequence in running)
