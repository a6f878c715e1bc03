"""Which sequences the next step runs, and in which pages. Plain Python: no arrays, no devices, no text.

Steps run ahead of the host: `schedule` counts the step it returns as dispatched, although the tokens of the one or two
before it are not known yet. That works because a device runs its programs in order: a decode step takes its input from
the device's own `last token` array, and pages or slots freed on the host can be handed out at once, since whatever
still writes to them was dispatched earlier.

Every step has a token of each sequence that is generating, and fills up with tokens of prompts. A prompt that needs
several steps has a quarter of each, while others are generating: these wait for no more of it at a time.

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

from podquant.engine.pages import PagePool
from podquant.engine.prefix import PageKeys
from podquant.engine.request import Request
from podquant.engine.steps import Chunk, Sequence, Step


class Scheduler:
    """Chooses steps over one pool of pages.

    Args:
        pool: the pages; no one else allocates from it.
        max_running: sequences that hold pages at a time, and the number of slots.
        max_tokens: tokens of a step at the most; more than `max_running`, and may be changed between steps.
        keeps_prefixes: pages are kept and shared for what is in them.
        num_drafts: tokens that are guessed at a time for each sequence that is generating, see `lookup`. Such a
            sequence waits for each of its steps to be completed, since the next one depends on its tokens.
    """

    def __init__(
        self, pool: PagePool, *, max_running: int, max_tokens: int, keeps_prefixes: bool = True, num_drafts: int = 0
    ) -> None:
        self._pool = pool
        self._keeps_prefixes = keeps_prefixes
        self._num_drafts = num_drafts
        self.max_tokens = max_tokens
        # each in the order of arrival
        self._waiting: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._num_added = 0
        self._free_slots = list(range(max_running - 1, -1, -1))
        self._num_unfinished = 0
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

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
        most = self.max_tokens // 4 if chunks else self.max_tokens
        chunks += self._prompt_chunks(self.max_tokens - sum(chunk.length for chunk in chunks), most)
        if not chunks:
            return None
        return Step(tuple(sorted(chunks, key=_by_shape)))

    def complete(self, step: Step, tokens: Seq[Seq[int]]) -> list[tuple[Sequence, list[int]]]:
        """Hand in the tokens that a step sampled: of each chunk of `Step.sampling`, `num_sampled` of them.

        Steps are completed in the order they were scheduled. Returns the tokens that count, for each of these chunks:
        behind a draft only if it was right; none of sequences that have finished meanwhile. A sequence that now has
        `max_tokens` is finished.
        """
        return [
            (chunk.sequence, self._accept(chunk, sampled)) for chunk, sampled in zip(step.sampling, tokens, strict=True)
        ]

    def _accept(self, chunk: Chunk, sampled: Seq[int]) -> list[int]:
        sequence = chunk.sequence
        sequence.num_in_flight -= 1
        num_right = 0
        while num_right < len(chunk.drafts) and sampled[num_right] == chunk.drafts[num_right]:
            num_right += 1
        if sequence.num_computed == chunk.start + chunk.length:  # else it has lost its pages
            sequence.num_computed -= len(chunk.drafts) - num_right
        if sequence.finished:
            return []
        self.num_draft_tokens += len(chunk.drafts)
        self.num_accepted_tokens += num_right
        most = sequence.request.params.max_tokens
        accepted = list(sampled[: min(num_right + 1, most - sequence.num_generated)])
        sequence.token_ids += accepted
        if sequence.num_generated >= most:
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
        room = (self.max_tokens // 2 if self._prefilling else self.max_tokens) - len(self._decoding)
        for sequence in self._decoding:
            if self._num_drafts and sequence.num_in_flight > 0:
                continue  # its next step depends on tokens that are not known yet
            drafts = self._drafts(sequence, room)
            room -= len(drafts)
            start, length = sequence.num_computed, 1 + len(drafts)
            chunks.append(Chunk(sequence, start, length, is_prompt=False, samples=True, drafts=drafts))
            sequence.num_computed += length
            sequence.num_in_flight += 1
        return chunks

    def _drafts(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Guesses at what follows, as many as are wanted, may follow, and have pages without taking another's."""
        params = sequence.request.params
        if not self._num_drafts or params.is_penalized or params.min_tokens:  # whose tallies know no guesses
            return ()
        most = min(most, self._num_drafts, params.max_tokens - sequence.num_generated - 1)
        if most <= 0:
            return ()
        drafts = sequence.lookup.drafts(sequence.token_ids, most)
        lacking = self._pool.num_pages_for(sequence.num_computed + 1 + len(drafts)) - len(sequence.pages)
        if lacking > 0:
            if lacking + self.num_running > self._pool.num_free:
                return ()
            sequence.pages += self._pool.allocate(lacking)
        return tuple(drafts)

    def _prompt_chunks(self, num_tokens: int, most: int) -> list[Chunk]:
        """So many tokens of prompts: in the order of arrival, with up to half of them for the one with the least left,
        and no more than `most` of one that cannot have all that it has left.

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
            room = room if sequence.num_left <= room else min(room, max(1, most))
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
            if len(sequence.token_ids) <= self.max_tokens // 2 and self._has_room(sequence):
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
