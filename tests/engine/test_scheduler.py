"""The scheduler: every request ends with its own tokens on a reference machine, and who is next."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from podquant.engine.pages import PagePool
from podquant.engine.request import Request, SamplingParams
from podquant.engine.scheduler import Decode, Prefill, Scheduler
from tests.calls import calls_of
from tests.engine.reference_machine import VOCABULARY, Run, expected_tokens


def make_request(name: str, num_prompt: int, max_tokens: int) -> Request:
    prompt = tuple((ord(name[-1]) * 13 + i * 5) % VOCABULARY for i in range(num_prompt))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens))


def make_scheduler(
    num_pages: int = 64,
    page_size: int = 4,
    max_running: int = 8,
    chunk_size: int = 8,
    *,
    keeps_prefixes: bool = True,
) -> tuple[PagePool, Scheduler]:
    pool = PagePool(num_pages, page_size)
    return pool, Scheduler(pool, max_running=max_running, chunk_size=chunk_size, keeps_prefixes=keeps_prefixes)


@settings(max_examples=300, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 3),  # steps since the previous arrival
            st.integers(1, 20),  # prompt
            st.integers(0, 14),  # max_tokens
            st.one_of(st.none(), st.integers(0, 40)),  # aborted so many steps after
            st.integers(0, 3),  # which of a few texts the prompt is a beginning of; 0: of none
            st.sampled_from(("", "", "salt")),
        ),
        min_size=1,
        max_size=12,
    ),
    page_size=st.integers(1, 5),
    spare_pages=st.integers(0, 12),
    max_running=st.integers(1, 5),
    chunk_size=st.integers(1, 9),
    run_ahead=st.integers(0, 2),
    stop_token=st.integers(0, 4),
    keeps_prefixes=st.booleans(),
)
@example([(0, 7, 14, None, 0, "")] * 4, 2, 0, 4, 3, 2, -1, True)
@example([(0, 7, 14, None, 1, "")] * 4, 2, 0, 4, 3, 2, -1, True)
def test_every_request_ends_with_its_own_tokens(
    arrivals: list[tuple[int, int, int, int | None, int, str]],
    page_size: int,
    spare_pages: int,
    max_running: int,
    chunk_size: int,
    run_ahead: int,
    stop_token: int,
    keeps_prefixes: bool,
) -> None:
    longest = max(-(-(prompt + max(new - 1, 0)) // page_size) for _, prompt, new, *_ in arrivals)
    pool, scheduler = make_scheduler(
        1 + longest + spare_pages, page_size, max_running, chunk_size, keeps_prefixes=keeps_prefixes
    )
    run = Run(pool, scheduler, max_running, chunk_size, run_ahead, stop_token)
    events: list[tuple[int, str, Request]] = []
    now = 0
    for index, (gap, prompt, new, abort, text, salt) in enumerate(arrivals):
        now += gap
        request = replace(make_request(f"r{chr(97 + index)}", prompt, new), cache_salt=salt)
        if text:
            request = replace(request, prompt_ids=make_request(str(text), prompt, new).prompt_ids)
        events.append((now, "add", request))
        if abort is not None:
            events.append((now + abort, "abort", request))
    events.sort(key=lambda event: event[0])
    aborted = set()
    # far above what any order needs: each token at worst costs the prefill of all before it
    for tick in range(20_000):
        while events and events[0][0] <= tick:
            _, kind, request = events.pop(0)
            if kind == "add":
                run.add(request)
            elif not run.sequences[request.id].finished:
                scheduler.finish(run.sequences[request.id])
                aborted.add(request.id)
        if not events and not scheduler.has_work and not run.in_flight:
            break
        run.advance()
    assert not scheduler.has_work
    assert (pool.num_free, scheduler.num_running, scheduler.num_waiting) == (pool.num_usable, 0, 0)
    for name, sequence in run.sequences.items():
        expected = expected_tokens(sequence.request, stop_token)
        assert sequence.finished
        assert run.outputs[name] == (expected[: len(run.outputs[name])] if name in aborted else expected)


def test_chunks_and_decode_steps_take_turns() -> None:
    _, scheduler = make_scheduler(chunk_size=4)
    first = scheduler.add(make_request("a", 3, 10))
    assert scheduler.schedule() == Prefill(first, 0, 3, is_last=True)
    second = scheduler.add(make_request("b", 10, 10))
    steps = [scheduler.schedule() for _ in range(6)]
    assert steps == [
        Decode((first,)),
        Prefill(second, 0, 4, is_last=False),
        Decode((first,)),
        Prefill(second, 4, 4, is_last=False),
        Decode((first,)),
        Prefill(second, 8, 2, is_last=True),
    ]
    assert scheduler.schedule() == Decode((first, second))


def names(scheduler: Scheduler, count: int) -> str:
    """Whose prompts the next prefill steps belong to, without the decode steps between them."""
    found = ""
    while len(found) < count:
        step = scheduler.schedule()
        assert step is not None
        if isinstance(step, Prefill):
            found += step.sequence.request.id[-1]
    return found


def test_a_short_prompt_waits_for_one_chunk_of_a_long_one_at_the_most() -> None:
    _, scheduler = make_scheduler(num_pages=1000, chunk_size=4)
    scheduler.add(make_request("long", 400, 10))
    assert names(scheduler, 3) == "ggg"
    scheduler.add(make_request("a", 3, 10))
    assert names(scheduler, 3) == "agg"
    scheduler.add(make_request("another long", 100, 10))
    scheduler.add(make_request("b", 7, 10))
    assert names(scheduler, 5) == "bgbgg"


def test_a_long_prompt_has_every_other_prefill_step_however_many_short_ones_come() -> None:
    _, scheduler = make_scheduler(num_pages=1000, chunk_size=4, max_running=4)
    scheduler.add(make_request("long", 40, 1))
    turns = ""
    while turns.count("g") < 10:
        scheduler.add(make_request("a", 3, 1))
        turns += names(scheduler, 1)
    assert turns == "ga" * 9 + "g"


def test_of_prompts_as_long_the_first_is_prefilled_whole() -> None:
    _, scheduler = make_scheduler(chunk_size=4)
    for name in "abc":
        scheduler.add(make_request(name, 12, 2))
    assert names(scheduler, 9) == "aaabbbccc"


def test_a_short_prompt_overtakes_a_long_one_that_waits_for_memory_and_makes_room_for_it() -> None:
    _, scheduler = make_scheduler(num_pages=13, page_size=4, chunk_size=8)
    first = scheduler.add(make_request("a", 24, 3))
    long = scheduler.add(make_request("long", 40, 2))
    short = scheduler.add(make_request("b", 8, 20))
    assert names(scheduler, 3) == "aba"
    assert (long.slot, scheduler.num_waiting) == (-1, 1)
    assert scheduler.schedule() == Decode((short,))
    scheduler.finish(first)
    assert names(scheduler, 1) == "g"
    assert (short.slot, len(long.pages), scheduler.num_preemptions) == (-1, 10, 1)


def test_a_long_prompt_that_waits_for_memory_is_not_overtaken_for_ever() -> None:
    pool, scheduler = make_scheduler(num_pages=9, page_size=4, chunk_size=4, max_running=3)
    run = Run(pool, scheduler, max_running=3, chunk_size=4, run_ahead=1, stop_token=-1)
    run.add(make_request("r0", 20, 4))
    run.add(make_request("long", 24, 4))
    number = 1
    while not run.sequences["long"].finished:
        if scheduler.num_waiting < 5:
            run.add(make_request(f"r{number}", 3, 6))
            number += 1
        run.advance()
        assert number < 60
    assert number > 6  # some have overtaken it
    assert run.outputs["long"] == expected_tokens(run.sequences["long"].request, -1)


def test_steps_run_ahead_of_their_tokens_but_never_past_the_limit() -> None:
    _, scheduler = make_scheduler()
    sequence = scheduler.add(make_request("a", 3, 3))
    steps = [scheduler.schedule() for _ in range(4)]
    assert steps == [Prefill(sequence, 0, 3, is_last=True), Decode((sequence,)), Decode((sequence,)), None]
    assert [scheduler.complete(step, [9]) for step in steps if step] == [[(sequence, 9)]] * 3
    assert sequence.finished
    assert not scheduler.has_work


def next_step(scheduler: Scheduler) -> Prefill | Decode:
    step = scheduler.schedule()
    assert step is not None
    return step


def test_pages_and_slot_are_free_once_the_last_token_is_dispatched() -> None:
    pool, scheduler = make_scheduler(max_running=1)
    first = scheduler.add(make_request("a", 3, 1))
    second = scheduler.add(make_request("b", 3, 1))
    prefill = scheduler.schedule()
    assert prefill == Prefill(first, 0, 3, is_last=True)
    assert scheduler.schedule() == Prefill(second, 0, 3, is_last=True)
    assert pool.num_free == pool.num_usable - 1
    assert scheduler.complete(prefill, [5]) == [(first, 5)]


def test_a_request_for_no_tokens_only_prefills() -> None:
    pool, scheduler = make_scheduler(chunk_size=4)
    sequence = scheduler.add(make_request("a", 6, 0))
    steps = [next_step(scheduler) for _ in range(2)]
    assert steps == [Prefill(sequence, 0, 4, is_last=False), Prefill(sequence, 4, 2, is_last=True)]
    assert scheduler.schedule() is None
    assert scheduler.complete(steps[0], []) == []
    assert not sequence.finished
    assert scheduler.complete(steps[1], [1]) == []
    assert sequence.finished
    assert pool.num_free == pool.num_usable


def test_tokens_of_a_stopped_sequence_are_dropped() -> None:
    pool, scheduler = make_scheduler()
    sequence = scheduler.add(make_request("a", 3, 10))
    steps = [next_step(scheduler) for _ in range(3)]
    assert scheduler.complete(steps[0], [1]) == [(sequence, 1)]
    scheduler.finish(sequence)
    scheduler.finish(sequence)
    assert pool.num_free == pool.num_usable
    assert scheduler.complete(steps[1], [2]) == []
    assert scheduler.complete(steps[2], [3]) == []
    assert sequence.token_ids[3:] == [1]
    assert not scheduler.has_work


def test_the_latest_is_preempted_and_prefilled_again_but_for_what_is_kept() -> None:
    _, scheduler = make_scheduler(num_pages=5, page_size=2, max_running=2)
    first = scheduler.add(make_request("a", 1, 6))
    second = scheduler.add(make_request("b", 1, 6))
    steps: list[Prefill | Decode] = []
    while scheduler.has_work:
        steps.append(next_step(scheduler))
        step = steps[-1]
        if isinstance(step, Decode) and scheduler.num_preemptions == 1 and not first.finished:
            assert step == Decode((first,))
            assert (scheduler.num_running, scheduler.num_waiting, second.pages, second.slot) == (1, 1, [], -1)
        scheduler.complete(step, [3] * (len(step.sequences) if isinstance(step, Decode) else 1))
    assert scheduler.num_preemptions == 1
    prefills = [(step.sequence, step.start, step.length) for step in steps if isinstance(step, Prefill)]
    assert prefills == [(first, 0, 1), (second, 0, 1), (second, 2, 2)]


def test_a_preempted_sequence_waits_for_its_tokens_in_flight() -> None:
    _, scheduler = make_scheduler(num_pages=5, page_size=2, max_running=2)
    first, second = scheduler.add(make_request("a", 1, 6)), scheduler.add(make_request("b", 1, 6))
    steps: deque[Prefill | Decode] = deque()
    while scheduler.num_preemptions == 0:
        steps.append(next_step(scheduler))
    scheduler.finish(first)
    assert second.num_in_flight > 0
    while second.num_in_flight > 0:
        assert scheduler.schedule() is None
        step = steps.popleft()
        scheduler.complete(step, [3] * (len(step.sequences) if isinstance(step, Decode) else 1))
    assert scheduler.schedule() == Prefill(second, 0, len(second.token_ids), is_last=True)


def test_a_waiting_request_can_be_aborted() -> None:
    _, scheduler = make_scheduler(max_running=1)
    scheduler.add(make_request("a", 3, 5))
    waiting = scheduler.add(make_request("b", 3, 5))
    scheduler.schedule()
    scheduler.finish(waiting)
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)


def test_a_newcomer_leaves_a_page_for_each_that_runs() -> None:
    pool, scheduler = make_scheduler(num_pages=4, page_size=4)
    first = scheduler.add(make_request("a", 2, 5))
    second = scheduler.add(make_request("b", 8, 1))
    assert scheduler.schedule() == Prefill(first, 0, 2, is_last=True)
    assert [scheduler.schedule() for _ in range(2)] == [Decode((first,))] * 2
    assert pool.num_free == pool.num_pages_for(len(second.token_ids))
    scheduler.finish(first)
    assert scheduler.schedule() == Prefill(second, 0, 8, is_last=True)


def test_what_just_fits_runs() -> None:
    pool, scheduler = make_scheduler(num_pages=5, page_size=4)
    run = Run(pool, scheduler, max_running=8, chunk_size=8, run_ahead=1, stop_token=-1)
    request = make_request("a", 8, 9)
    run.add(request)
    while scheduler.has_work:
        run.advance()
    assert run.outputs["a"] == expected_tokens(request, -1)


def test_a_decode_step_costs_a_few_calls_for_each_of_256() -> None:
    _, scheduler = make_scheduler(num_pages=20_000, page_size=16, max_running=256, chunk_size=64)
    for index in range(256):
        scheduler.add(make_request(f"r{index}", 32, 500))
    while scheduler.num_waiting:
        scheduler.schedule()
    scheduler.schedule()
    assert calls_of(scheduler.schedule) < 12 * 256
