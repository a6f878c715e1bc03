"""A request on its way through the devices, and what a step does for it. Plain values, that the scheduler changes."""

from __future__ import annotations

from dataclasses import dataclass, field

from podquant.engine.lookup import Lookup
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
        num_in_flight: tokens sampled by dispatched steps but not read back yet, not counting those behind drafts.
        keys: names of its full pages.
        num_named: pages of which the pool has been told what is in them.
        num_cached: tokens of the prompt that were in the cache when it first ran.
        was_preempted: it has lost its pages before.
        finished: it has all its tokens, was stopped or aborted; tokens still in flight are dropped.
        lookup: of its tokens, for drafts.
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
    lookup: Lookup = field(default_factory=Lookup)

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
        drafts: guesses at its last tokens, which are not known yet; a token is sampled in front of each of them, too.
    """

    sequence: Sequence
    start: int
    length: int
    is_prompt: bool
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def num_sampled(self) -> int:
        """Tokens that are sampled: behind each of so many of its last ones."""
        return 1 + len(self.drafts) if self.samples else 0


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
    def sampling(self) -> list[Chunk]:
        """Those behind which tokens are sampled, in order."""
        return [chunk for chunk in self.chunks if chunk.samples]
