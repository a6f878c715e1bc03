"""Names of pages, and the prompts that share them."""

from __future__ import annotations

from dataclasses import replace

from podquant.engine.prefix import PageKeys
from podquant.engine.request import Request, SamplingParams
from tests.engine.reference_machine import Run, expected_tokens
from tests.engine.test_scheduler import make_request, make_scheduler


def keys(tokens: list[int], salt: str = "", count: int = 3) -> list[bytes]:
    return PageKeys(2, salt).of(tokens, count)


def test_a_key_tells_all_tokens_up_to_its_page_and_the_salt() -> None:
    tokens = [5, 6, 7, 8, 9, 10]
    found = keys(tokens)
    assert len(set(found)) == 3
    assert keys([*tokens, 11]) == found
    assert keys([5, 6, 0, 8, 9, 10])[0] == found[0]
    assert not {*keys([5, 6, 0, 8, 9, 10])[1:]} & {*found}
    assert not {*keys([0, *tokens[1:]])} & {*found}
    assert not {*keys(tokens, "salt")} & {*found}
    assert keys([5, 6, 5, 6], count=2)[0] != keys([5, 6, 5, 6], count=2)[1]


def test_keys_are_the_same_asked_for_page_by_page() -> None:
    tokens = [1, 2, 3]
    grown = PageKeys(2, "")
    first = grown.of(tokens, 1)
    tokens += [4, 5, 6]
    assert grown.of(tokens, 3) == keys(tokens)
    assert grown.of(tokens, 1) == first == keys(tokens, count=1)


def test_half_a_surrogate_pair_is_a_salt() -> None:
    assert keys([1, 2, 3, 4], "\ud800", 2) != keys([1, 2, 3, 4], "", 2)


def run_to_the_end(run: Run) -> None:
    while run.scheduler.has_work:
        run.advance()
    for name, sequence in run.sequences.items():
        assert run.outputs[name] == expected_tokens(sequence.request, run.stop_token)


def make_run(num_pages: int = 64, *, keeps_prefixes: bool = True) -> Run:
    pool, scheduler = make_scheduler(num_pages, page_size=4, keeps_prefixes=keeps_prefixes)
    return Run(pool, scheduler, max_running=8, max_tokens=8, run_ahead=1, stop_token=-1)


def alike(name: str, num_prompt: int, max_tokens: int = 3, salt: str = "") -> Request:
    """A request whose prompt is the beginning of one text."""
    return replace(make_request("text", num_prompt, max_tokens), id=name, cache_salt=salt)


def test_a_prompt_that_begins_like_an_earlier_one_is_computed_from_where_they_part() -> None:
    run = make_run()
    run.add(alike("first", 30))
    run_to_the_end(run)
    # whole pages alone, and never the last token: the logits after it are wanted
    for name, length, num_cached in (("same", 30, 28), ("longer", 40, 28), ("shorter", 17, 16), ("page", 28, 24)):
        run.add(alike(name, length))
        run_to_the_end(run)
        assert run.sequences[name].num_cached == num_cached
    assert run.scheduler.num_cached_tokens == 28 + 28 + 16 + 24
    assert run.pool.num_free == run.pool.num_usable


def test_what_was_generated_is_kept_too() -> None:
    run = make_run()
    run.add(alike("turn", 10, 15))
    run_to_the_end(run)
    turn = run.sequences["turn"]
    run.add(Request("next turn", (*turn.token_ids, 1, 2, 3), SamplingParams(max_tokens=2)))
    run_to_the_end(run)
    assert run.sequences["next turn"].num_cached == 24


def test_prompts_that_come_together_compute_what_they_share_once() -> None:
    run = make_run()
    for number in range(4):
        run.add(alike(f"r{number}", 33 + number))
    prefilled = 0
    while run.scheduler.has_work:
        step = run.scheduler.schedule()
        if step is not None:
            prefilled += sum(chunk.length for chunk in step.chunks if chunk.is_prompt)
            run.scheduler.complete(step, run.machine.run(step))
    assert prefilled == 33 + 2 + 3 + 4  # 32 tokens are shared


def test_requests_with_different_salts_share_nothing() -> None:
    run = make_run()
    for name, salt, num_cached in (("a", "x", 0), ("b", "y", 0), ("c", "", 0), ("d", "y", 28)):
        run.add(alike(name, 30, salt=salt))
        run_to_the_end(run)
        assert run.sequences[name].num_cached == num_cached


def test_a_request_that_needs_its_whole_prompt_computed_takes_nothing_from_the_cache() -> None:
    run = make_run()
    run.add(alike("first", 30))
    run_to_the_end(run)
    for name, params in (
        ("scored", SamplingParams(max_tokens=1, prompt_logprobs=0)),
        ("penalized", SamplingParams(max_tokens=1, presence_penalty=0.5)),
        ("minimum", SamplingParams(max_tokens=1, min_tokens=1)),
    ):
        run.add(replace(alike(name, 30), params=params))
        run_to_the_end(run)
        assert run.sequences[name].num_cached == 0


def test_nothing_is_kept_where_nothing_is_to_be_kept() -> None:
    run = make_run(keeps_prefixes=False)
    for name in ("first", "second"):
        run.add(alike(name, 30))
        run_to_the_end(run)
    assert run.scheduler.num_cached_tokens == 0


def test_what_was_unused_for_longest_makes_room() -> None:
    run = make_run(num_pages=17)
    for name, request in (("a", alike("a", 30)), ("b", make_request("b", 30, 3)), ("c", make_request("c", 20, 3))):
        run.add(request)
        run_to_the_end(run)
        assert run.sequences[name].num_cached == 0
    run.add(replace(make_request("b", 30, 3), id="b again"))  # still whole
    run_to_the_end(run)
    assert run.sequences["b again"].num_cached == 28
    run.add(alike("a again", 30))  # its last pages have gone first
    run_to_the_end(run)
    assert 0 < run.sequences["a again"].num_cached < 28
