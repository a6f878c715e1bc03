"""The scheduler: every request ends with its own tokens on a reference machine, and who is next."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from podquant.engine.pages import PagePool
from podquant.engine.request import Request, SamplingParams
from podquant.engine.scheduler import Scheduler
from podquant.engine.steps import Chunk, Sequence, Step
from tests.calls import calls_of
from tests.engine.reference_machine import VOCABULARY, Run, expected_tokens


def make_request(name: str, num_prompt: int, max_tokens: int) -> Request:
    prompt = tuple((ord(name[-1]) * 13 + i * 5) % VOCABULARY for i in range(num_prompt))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens))


def make_scheduler(
    num_pages: int = 64,
    page_size: int = 4,
    max_running: int = 8,
    max_tokens: int = 8,
    *,
    keeps_prefixes: bool = True,
    num_drafts: int = 0,
) -> tuple[PagePool, Scheduler]:
    pool = PagePool(num_pages, page_size)
    options = {"max_running": max_running, "max_tokens": max_tokens, "num_drafts": num_drafts}
    return pool, Scheduler(pool, **options, keeps_prefixes=keeps_prefixes)


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
    room=st.integers(1, 9),
    run_ahead=st.integers(0, 2),
    stop_token=st.integers(0, 4),
    keeps_prefixes=st.booleans(),
    num_drafts=st.sampled_from((0, 0, 1, 4)),
)
@example([(0, 7, 14, None, 0, "")] * 4, 2, 0, 4, 3, 2, -1, True, 0)
@example([(0, 7, 14, None, 1, "")] * 4, 2, 0, 4, 3, 2, -1, True, 0)
def test_every_request_ends_with_its_own_tokens(
    arrivals: list[tuple[int, int, int, int | None, int, str]],
    page_size: int,
    spare_pages: int,
    max_running: int,
    room: int,
    run_ahead: int,
    stop_token: int,
    keeps_prefixes: bool,
    num_drafts: int,
) -> None:
    longest = max(-(-(prompt + max(new - 1, 0)) // page_size) for _, prompt, new, *_ in arrivals)
    pool, scheduler = make_scheduler(
        1 + longest + spare_pages,
        page_size,
        max_running,
        max_running + room,
        keeps_prefixes=keeps_prefixes,
        num_drafts=num_drafts,
    )
    run = Run(pool, scheduler, max_running, max_running + room, run_ahead, stop_token, num_drafts)
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


def prompt(sequence: Sequence, start: int, length: int, *, samples: bool = True) -> Chunk:
    return Chunk(sequence, start, length, is_prompt=True, samples=samples)


def next_step(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    assert step is not None
    return step


def lengths(scheduler: Scheduler) -> dict[str, int]:
    """How many tokens of each sequence, by the last letter of its name, the next step takes."""
    return {chunk.sequence.request.id[-1]: chunk.length for chunk in next_step(scheduler).chunks}


def test_a_step_has_a_token_of_each_that_generates_and_fills_up_with_prompts() -> None:
    """A prompt that needs several steps has a quarter of each."""
    _, scheduler = make_scheduler(max_tokens=8)
    first = scheduler.add(make_request("a", 3, 10))
    assert scheduler.schedule() == Step((prompt(first, 0, 3),))
    second = scheduler.add(make_request("b", 9, 10))
    steps = [next_step(scheduler) for _ in range(4)]
    firsts, seconds = (
        [Chunk(sequence, start + i, 1, is_prompt=False, samples=True) for i in range(4)]
        for sequence, start in ((first, 3), (second, 9))
    )
    assert steps == [
        Step((firsts[0], prompt(second, 0, 2, samples=False))),
        Step((firsts[1], prompt(second, 2, 7))),
        Step((seconds[0], firsts[2])),  # of one token each, the longer context in front
        Step((seconds[1], firsts[3])),
    ]


def test_several_prompts_share_a_step() -> None:
    _, scheduler = make_scheduler(max_tokens=16)
    for name in "abc":
        scheduler.add(make_request(name, 5, 4))
    assert lengths(scheduler) == {"a": 5, "b": 5, "c": 5}
    assert lengths(scheduler) == {"a": 1, "b": 1, "c": 1}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    _, scheduler = make_scheduler(num_pages=1000, max_tokens=8)
    scheduler.add(make_request("long", 400, 10))
    assert lengths(scheduler) == {"g": 8}
    scheduler.add(make_request("a", 3, 2))
    assert lengths(scheduler) == {"g": 5, "a": 3}
    scheduler.add(make_request("b", 5, 10))
    assert lengths(scheduler) == {"a": 1, "g": 2, "b": 5}
    assert lengths(scheduler) == {"g": 2, "b": 1}


def test_a_long_prompt_has_half_of_every_step_however_many_short_ones_come() -> None:
    _, scheduler = make_scheduler(num_pages=1000, max_tokens=8, max_running=4)
    long = scheduler.add(make_request("long", 40, 1))
    for number in range(10):
        scheduler.add(make_request(f"{number}", 3, 1))
        before = long.num_computed
        scheduler.schedule()
        assert long.num_left == 0 or long.num_computed - before >= 4


def test_of_prompts_as_long_the_first_is_prefilled_whole() -> None:
    _, scheduler = make_scheduler(max_tokens=4)
    for name in "abc":
        scheduler.add(make_request(name, 12, 1))
    assert [lengths(scheduler) for _ in range(9)] == [{name: 4} for name in "aaabbbccc"]


def test_of_requests_with_min_tokens_one_begins_in_a_step() -> None:
    """It brings its end tokens along, and a step has room for those of one."""
    _, scheduler = make_scheduler(max_tokens=16)
    for name in "ab":
        request = make_request(name, 3, 4)
        scheduler.add(replace(request, params=replace(request.params, min_tokens=2)))
    scheduler.add(make_request("c", 3, 4))
    assert lengths(scheduler) == {"a": 3, "c": 3}
    assert lengths(scheduler) == {"a": 1, "c": 1, "b": 3}


def test_a_short_prompt_overtakes_a_long_one_that_waits_for_memory_and_makes_room_for_it() -> None:
    _, scheduler = make_scheduler(num_pages=13, page_size=4, max_tokens=16)
    first = scheduler.add(make_request("a", 24, 3))
    long = scheduler.add(make_request("long", 40, 2))
    short = scheduler.add(make_request("b", 8, 20))
    assert lengths(scheduler) == {"a": 8, "b": 8}
    assert (long.slot, scheduler.num_waiting) == (-1, 1)
    assert lengths(scheduler) == {"b": 1, "a": 4}
    scheduler.finish(first)
    assert lengths(scheduler) == {"g": 16}
    assert (short.slot, len(long.pages), scheduler.num_preemptions) == (-1, 10, 1)


def test_a_long_prompt_that_waits_for_memory_is_not_overtaken_for_ever() -> None:
    pool, scheduler = make_scheduler(num_pages=9, page_size=4, max_tokens=8, max_running=3)
    run = Run(pool, scheduler, max_running=3, max_tokens=8, run_ahead=1, stop_token=-1)
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
    assert [step and step.chunks[0].start for step in steps] == [0, 3, 4, None]
    assert [scheduler.complete(step, [[9]]) for step in steps if step] == [[(sequence, [9])]] * 3
    assert sequence.finished
    assert not scheduler.has_work


def test_pages_and_slot_are_free_once_the_last_token_is_dispatched() -> None:
    pool, scheduler = make_scheduler(max_running=1)
    first = scheduler.add(make_request("a", 3, 1))
    second = scheduler.add(make_request("b", 3, 1))
    step = next_step(scheduler)
    assert step == Step((prompt(first, 0, 3),))
    assert scheduler.schedule() == Step((prompt(second, 0, 3),))
    assert pool.num_free == pool.num_usable - 1
    assert scheduler.complete(step, [[5]]) == [(first, [5])]


def test_a_request_for_no_tokens_only_prefills() -> None:
    pool, scheduler = make_scheduler(max_tokens=4)
    sequence = scheduler.add(make_request("a", 6, 0))
    steps = [next_step(scheduler) for _ in range(2)]
    assert steps == [Step((prompt(sequence, 0, 4, samples=False),)), Step((prompt(sequence, 4, 2),))]
    assert scheduler.schedule() is None
    assert scheduler.complete(steps[0], []) == []
    assert not sequence.finished
    assert scheduler.complete(steps[1], [[1]]) == [(sequence, [])]
    assert sequence.finished
    assert pool.num_free == pool.num_usable


def test_tokens_of_a_stopped_sequence_are_dropped() -> None:
    pool, scheduler = make_scheduler()
    sequence = scheduler.add(make_request("a", 3, 10))
    steps = [next_step(scheduler) for _ in range(3)]
    assert scheduler.complete(steps[0], [[1]]) == [(sequence, [1])]
    scheduler.finish(sequence)
    scheduler.finish(sequence)
    assert pool.num_free == pool.num_usable
    assert scheduler.complete(steps[1], [[2]]) == [(sequence, [])]
    assert scheduler.complete(steps[2], [[3]]) == [(sequence, [])]
    assert sequence.token_ids[3:] == [1]
    assert not scheduler.has_work


def test_the_latest_is_preempted_and_prefilled_again_but_for_what_is_kept() -> None:
    _, scheduler = make_scheduler(num_pages=5, page_size=2, max_running=2)
    first = scheduler.add(make_request("a", 1, 6))
    second = scheduler.add(make_request("b", 1, 6))
    steps: list[Step] = []
    while scheduler.has_work:
        steps.append(next_step(scheduler))
        if scheduler.num_preemptions == 1 and not first.finished:
            assert [chunk.sequence for chunk in steps[-1].chunks] == [first]
            assert (scheduler.num_running, scheduler.num_waiting, second.pages, second.slot) == (1, 1, [], -1)
        scheduler.complete(steps[-1], [[3]] * len(steps[-1].sampling))
    assert scheduler.num_preemptions == 1
    prompts = [chunk for step in steps for chunk in step.chunks if chunk.is_prompt]
    assert prompts == [prompt(first, 0, 1), prompt(second, 0, 1), prompt(second, 2, 3)]


def test_a_preempted_sequence_waits_for_its_tokens_in_flight() -> None:
    _, scheduler = make_scheduler(num_pages=5, page_size=2, max_running=2)
    first, second = scheduler.add(make_request("a", 1, 6)), scheduler.add(make_request("b", 1, 6))
    steps: deque[Step] = deque()
    while scheduler.num_preemptions == 0:
        steps.append(next_step(scheduler))
    scheduler.finish(first)
    assert second.num_in_flight > 0
    while second.num_in_flight > 0:
        assert scheduler.schedule() is None
        step = steps.popleft()
        scheduler.complete(step, [[3]] * len(step.sampling))
    assert scheduler.schedule() == Step((prompt(second, 0, len(second.token_ids)),))


def test_drafts_are_what_followed_earlier_and_count_as_far_as_they_are_right() -> None:
    pool, scheduler = make_scheduler(num_drafts=3)
    text = (1, 2, 3, 4, 5, 6, 1, 2, 3)
    sequence = scheduler.add(Request("a", text, SamplingParams(max_tokens=20)))
    scheduler.complete(next_step(scheduler), [])
    assert scheduler.complete(next_step(scheduler), [[4]]) == [(sequence, [4])]
    (chunk,) = next_step(scheduler).chunks
    assert (chunk.start, chunk.length, chunk.drafts, chunk.num_sampled) == (9, 4, (5, 6, 1), 4)
    assert scheduler.schedule() is None  # until it is known what was right
    assert scheduler.complete(Step((chunk,)), [[5, 9, 1, 2]]) == [(sequence, [5, 9])]
    assert (sequence.num_computed, scheduler.num_draft_tokens, scheduler.num_accepted_tokens) == (11, 3, 1)
    (chunk,) = next_step(scheduler).chunks
    assert (chunk.start, chunk.drafts) == (11, ())  # nothing followed 5, 9 before
    assert pool.num_free == pool.num_usable - 4


def test_no_more_is_guessed_than_may_follow() -> None:
    _, scheduler = make_scheduler(num_drafts=4)
    sequence = scheduler.add(Request("a", (1, 2, 1, 2, 1), SamplingParams(max_tokens=3)))
    assert scheduler.complete(next_step(scheduler), [[2]]) == [(sequence, [2])]
    step = next_step(scheduler)
    assert step.chunks[0].drafts == (1,)
    assert scheduler.complete(step, [[1, 2]]) == [(sequence, [1, 2])]
    assert sequence.finished


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
    assert [[chunk.sequence for chunk in next_step(scheduler).chunks] for _ in range(3)] == [[first]] * 3
    assert pool.num_free == pool.num_pages_for(len(second.token_ids))
    scheduler.finish(first)
    assert scheduler.schedule() == Step((prompt(second, 0, 8),))


def test_what_just_fits_runs() -> None:
    pool, scheduler = make_scheduler(num_pages=5, page_size=4)
    run = Run(pool, scheduler, max_running=8, max_tokens=8, run_ahead=1, stop_token=-1)
    request = make_request("a", 8, 9)
    run.add(request)
    while scheduler.has_work:
        run.advance()
    assert run.outputs["a"] == expected_tokens(request, -1)


def test_a_decode_step_costs_a_few_calls_for_each_of_256() -> None:
    _, scheduler = make_scheduler(num_pages=20_000, page_size=16, max_running=256, max_tokens=512)
    for index in range(256):
        scheduler.add(make_request(f"r{index}", 32, 500))
    while scheduler.num_waiting:
        scheduler.schedule()
    scheduler.schedule()
    assert calls_of(scheduler.schedule) < 12 * 256
