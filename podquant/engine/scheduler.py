"""Which sequences the next step runs, and in which pages. Plain Python: no arrays, no devices, no text.

Steps run ahead of the host: `schedule` counts the step it returns as dispatched, although the tokens of the one or two
before it are not known yet. That works because a device runs its programs in order: a decode step takes its input from
the device's own `last token` array, and pages or slots freed on the host can be handed out at once, since whatever
still writes to them was dispatched earlier.

Every step has a token of each sequence that is generating, and fills up with tokens of prompts: nobody who generates
waits for a prompt longer than for one step's share of it.

Memory goes by the order of arrival: who arrived later is preempted for who arrived earlier, so the oldest is never
preempted, always has room (requests fit the whole pool, see `Limits`), and ends: nobody starves. What a step has for
prompts goes by arrival too, but for half of it, if need be, for the prompt with the least left: a short one never waits
for all of a long one. A prompt of one step may also overtake those for which there is no memory yet; it gives back what
it took when the first of them can have it.

Pages that are full are named by their content (`prefix`), from the step on that writes them. A prompt that begins with
such pages has them, and shares them with whoever uses them: nobody writes to a full page. What was computed meanwhile
for another prompt is taken over just before it would be computed again; even in the same step, since within a layer
all keys and values are written before any are read.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from podquant.engine.pages import PagePool
from podquant.engine.prefix import PageKeys
from podquant.engine.request import Request


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way through the device.

    Attributes:
        request: what was asked.
        arrival: its place in the order of arrival.
        token_ids: the prompt and the generated tokens read back so far.
        pages: where its KV entries are: entry i in page `pages[i // page_size]`; empty while it waits.
        slot: its row of the device's `last token` array; -1 while it waits.
        num_computed: KV entries written by the steps dispatched so far.
        num_in_flight: tokens sampled by dispatched steps but not read back yet.
        keys: names of its full pages.
        num_named: pages of which the pool has been told what is in them.
        num_cached: tokens of the prompt that were in the cache when it first ran.
        was_preempted: it has lost its pages before.
        finished: it has all its tokens, was stopped or aborted; tokens still in flight are dropped.
    """

    request: Request
    arrival: int
    token_ids: list[int]
    keys: PageKeys
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    num_computed: int = 0
    num_in_flight: int = 0
    num_named: int = 0
    num_cached: int = 0
    was_preempted: bool = False
    finished: bool = False

    @property
    def can_share(self) -> bool:
        """Whether its prompt need not be computed whole: log-probabilities of it, and tallies of its tokens, do."""
        params = self.request.params
        return params.prompt_logprobs is None and params.min_tokens == 0 and not params.is_penalized

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Generated tokens read back so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Known tokens whose KV entries no step has been dispatched for."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_exhausted(self) -> bool:
        """Every token it may have is read back or in flight."""
        return self.num_generated + self.num_in_flight >= self.request.params.max_tokens


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence in a step.

    Attributes:
        sequence: whose.
        start, length: their positions; `token_ids` has them all, but for the last token generated, which may be known
            to the devices alone.
        is_prompt: whether they come before what is generated next for the first time, or again after a preemption.
        samples: whether the token behind them is sampled, into the sequence's slot. A request for no tokens
            (`max_tokens` 0) samples too; `complete` drops that token.
    """

    sequence: Sequence
    start: int
    length: int
    is_prompt: bool
    samples: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What the devices do at a time: the KV entries of each chunk are written, and tokens sampled.

    Attributes:
        chunks: of different sequences; those of one token first, the longest contexts in front, as attention wants it.
    """

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def sampled(self) -> list[Sequence]:
        """Whose tokens it samples, in order."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]


class Scheduler:
    """Chooses steps over one pool of pages.

    Args:
        pool: the pages; no one else allocates from it.
        max_running: sequences that hold pages at a time, and the number of slots.
        max_tokens: tokens of a step at the most; more than `max_running`.
        keeps_prefixes: pages are kept and shared for what is in them.
    """

    def __init__(self, pool: PagePool, *, max_running: int, max_tokens: int, keeps_prefixes: bool = True) -> None:
        self._pool = pool
        self._keeps_prefixes = keeps_prefixes
        self._max_tokens = max_tokens
        # each in the order of arrival
        self._waiting: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._num_added = 0
        self._free_slots = list(range(max_running - 1, -1, -1))
        self._num_unfinished = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without pages, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with pages."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def has_work(self) -> bool:
        """Some sequence has not ended, be it that its last tokens are only to be read back."""
        return self._num_unfinished > 0

    def add(self, request: Request) -> Sequence:
        """Queue a request that fits the whole pool."""
        sequence = Sequence(
            request, self._num_added, list(request.prompt_ids), PageKeys(self._pool.page_size, request.cache_salt)
        )
        self._waiting.append(sequence)
        self._num_added += 1
        self._num_unfinished += 1
        return sequence

    def schedule(self) -> Step | None:
        """The next step, counted as dispatched.

        None: nothing can run before a step in flight is completed or a request is added.
        """
        for sequence in [sequence for sequence in self._decoding if sequence.is_exhausted]:
            self._release(sequence)
        self._admit()
        chunks = self._decode_chunks()
        chunks += self._prompt_chunks(self._max_tokens - len(chunks))
        if not chunks:
            return None
        return Step(tuple(sorted(chunks, key=_by_shape)))

    def complete(self, step: Step, tokens: Seq[int]) -> list[tuple[Sequence, int]]:
        """Hand in the tokens a step sampled, one for each of `Step.sampled`.

        Steps are completed in the order they were scheduled. Returns the tokens that count; those of sequences that
        have finished meanwhile are dropped. A sequence that now has `max_tokens` is finished.
        """
        accepted = []
        for sequence, token in zip(step.sampled, tokens, strict=True):
            sequence.num_in_flight -= 1
            if sequence.finished:
                continue
            if sequence.request.params.max_tokens > 0:
                sequence.token_ids.append(token)
                accepted.append((sequence, token))
            if sequence.num_generated >= sequence.request.params.max_tokens:
                self.finish(sequence)
        return accepted

    def finish(self, sequence: Sequence) -> None:
        """End a sequence, wherever it is; its pages and slot are free at once. Again: no effect."""
        if sequence.finished:
            return
        sequence.finished = True
        self._num_unfinished -= 1
        if sequence.slot >= 0:
            self._release(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def _decode_chunks(self) -> list[Chunk]:
        """A token of each sequence that is generating, for which it has a page."""
        position = 0
        while position < len(self._decoding):  # preempting shortens the list, from its end
            sequence = self._decoding[position]
            if len(sequence.pages) * self._pool.page_size > sequence.num_computed:
                position += 1
            elif self._pool.num_free > 0:
                sequence.pages += self._pool.allocate(1)
            else:
                self._preempt_latest()
        chunks = []
        for sequence in self._decoding:
            chunks.append(Chunk(sequence, sequence.num_computed, 1, is_prompt=False, samples=True))
            sequence.num_computed += 1
            sequence.num_in_flight += 1
        return chunks

    def _prompt_chunks(self, num_tokens: int) -> list[Chunk]:
        """So many tokens of prompts: in the order of arrival, with up to half of them for the one with the least left.

        Of requests with `min_tokens` one begins in a step: it brings its end tokens along.
        """
        if not self._prefilling:
            return []
        shortest = min(self._prefilling, key=_num_left)  # of equals, the oldest
        kept = 0 if shortest is self._prefilling[0] else min(shortest.num_left, num_tokens // 2)
        order = [sequence for sequence in self._prefilling if not kept or sequence is not shortest]
        chunks: list[Chunk] = []
        brings_ends = False
        for sequence in [*order, shortest] if kept else order:
            room = num_tokens - (kept if sequence is not shortest else 0)
            if room <= 0:
                continue
            self._take_over(sequence)
            if sequence.num_computed == 0 and sequence.request.params.min_tokens > 0:
                if brings_ends:
                    continue
                brings_ends = True
            chunks.append(self._prompt_chunk(sequence, min(room, sequence.num_left)))
            num_tokens -= chunks[-1].length
        return chunks

    def _prompt_chunk(self, sequence: Sequence, length: int) -> Chunk:
        start = sequence.num_computed
        sequence.num_computed += length
        self._name_pages(sequence)
        is_last = sequence.num_left == 0
        if is_last:
            sequence.num_in_flight += 1
            self._prefilling.remove(sequence)
            insort(self._decoding, sequence, key=_arrival)
        return Chunk(sequence, start, length, is_prompt=True, samples=is_last)

    def _admit(self) -> None:
        """Give slots and pages to those that wait: in their order as far as there is room, then to short ones."""
        while self._waiting and self._make_room(self._waiting[0]):
            self._begin(self._waiting[0])
        for sequence in self._waiting[1:]:
            if not self._free_slots or self._pool.num_free <= self.num_running:
                return
            if len(sequence.token_ids) <= self._max_tokens // 2 and self._has_room(sequence):
                self._begin(sequence)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether there are a slot and pages for all it has, and beside them a page for each that runs.

        Without those spare pages the newcomer would soon be preempted and prefilled again.
        """
        if not self._free_slots or sequence.num_in_flight > 0:  # it can be prefilled once all its tokens are known
            return False
        num_shared = sum(map(self._pool.is_used, self._cached_pages(sequence)))
        num_pages = self._pool.num_pages_for(len(sequence.token_ids)) - num_shared
        return num_pages + self.num_running <= self._pool.num_free

    def _make_room(self, sequence: Sequence) -> bool:
        """`_has_room`, after preempting those that arrived later if that is enough and needed."""
        if self._has_room(sequence):
            return True
        later = [other for other in (*self._prefilling, *self._decoding) if other.arrival > sequence.arrival]
        num_free = self._pool.num_free + self._pool.num_freed_by(other.pages for other in later)
        num_pages = self._pool.num_pages_for(len(sequence.token_ids)) + self.num_running - len(later)
        if not later or sequence.num_in_flight > 0 or num_pages > num_free:
            return False
        while not self._has_room(sequence):
            self._preempt_latest()
        return True

    def _begin(self, sequence: Sequence) -> None:
        """Let a sequence that waits run, with pages for all it has."""
        self._waiting.remove(sequence)
        cached = self._cached_pages(sequence)
        for page in cached:
            self._pool.share(page)
        num_pages = self._pool.num_pages_for(len(sequence.token_ids))
        sequence.pages = cached + self._pool.allocate(num_pages - len(cached))
        self._skip(sequence, len(cached))
        sequence.slot = self._free_slots.pop()
        insort(self._prefilling, sequence, key=_arrival)

    def _cached_pages(self, sequence: Sequence, first: int = 0) -> list[int]:
        """Pages that hold what it would compute from its page `first` on; but its last known token is always computed,
        for what follows it."""
        if not self._keeps_prefixes or not sequence.can_share:
            return []
        pages = []
        for key in sequence.keys.of(sequence.token_ids, (len(sequence.token_ids) - 1) // self._pool.page_size)[first:]:
            page = self._pool.find(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def _take_over(self, sequence: Sequence) -> None:
        """Instead of its own pages that are next to be computed, share those that others have computed meanwhile."""
        at, left = divmod(sequence.num_computed, self._pool.page_size)
        if left:
            return
        cached = self._cached_pages(sequence, at)
        for index, page in enumerate(cached, at):
            self._pool.share(page)
            self._pool.free([sequence.pages[index]])
            sequence.pages[index] = page
        self._skip(sequence, len(cached))

    def _skip(self, sequence: Sequence, num_pages: int) -> None:
        """Count so many pages, which are next, as computed."""
        num_tokens = num_pages * self._pool.page_size
        sequence.num_computed += num_tokens
        sequence.num_named = sequence.num_computed // self._pool.page_size
        if not sequence.was_preempted:
            sequence.num_cached += num_tokens
            self.num_cached_tokens += num_tokens

    def _name_pages(self, sequence: Sequence) -> None:
        """Tell the pool what is in the pages that are full, of tokens that are known."""
        if not self._keeps_prefixes:
            return
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // self._pool.page_size
        if num_full > sequence.num_named:
            keys = sequence.keys.of(sequence.token_ids, num_full)
            for index in range(sequence.num_named, num_full):
                self._pool.keep(sequence.pages[index], keys[index])
            sequence.num_named = num_full

    def _preempt_latest(self) -> None:
        """Send the running sequence that arrived last back to the queue, to be prefilled again."""
        sequence = max((*self._prefilling[-1:], *self._decoding[-1:]), key=_arrival)
        self._release(sequence)
        sequence.num_computed = sequence.num_named = 0
        sequence.was_preempted = True
        insort(self._waiting, sequence, key=_arrival)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """Take pages and slot from a running sequence."""
        (self._prefilling if sequence in self._prefilling else self._decoding).remove(sequence)
        self._name_pages(sequence)
        self._pool.free(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], -1


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _num_left(sequence: Sequence) -> int:
    return sequence.num_left


def _by_shape(chunk: Chunk) -> tuple[bool, int]:
    return chunk.length > 1, -chunk.start
