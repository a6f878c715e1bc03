"""What cannot be asked is refused where it is written down, and news of a request add up."""

from __future__ import annotations

from typing import Any

import pytest

from podquant.engine.request import FinishReason, Output, SamplingParams, TokenLogprobs
from podquant.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_tokens", -1, "0 or more"),
        ("min_tokens", -1, r"0 to max_tokens \(16\)"),
        ("min_tokens", 17, r"0 to max_tokens \(16\)"),
        ("temperature", -0.5, "0 to 100"),
        ("temperature", float("nan"), "0 to 100"),
        ("top_p", 0.0, "above 0 and up to 1"),
        ("top_p", 1.5, "above 0 and up to 1"),
        ("top_k", -2, r"-1 to 2\*\*31 - 1"),
        ("min_p", 2.0, "0 to 1"),
        ("seed", -1, r"0 to 2\*\*31 - 1, or None"),
        ("seed", 1 << 31, r"0 to 2\*\*31 - 1, or None"),
        ("stop", "end", "a tuple of strings"),
        ("stop", ["end"], "a tuple of strings"),
        ("stop_token_ids", [2], "a tuple of token ids"),
    ],
)
def test_a_parameter_that_cannot_be(name: str, value: Any, expected: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}: expected {expected}, got ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_the_ends_of_every_range_are_taken() -> None:
    SamplingParams(max_tokens=0, min_tokens=0, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0, seed=0)
    last = (1 << 31) - 1
    SamplingParams(max_tokens=16, min_tokens=16, temperature=100.0, top_p=1e-9, top_k=last, min_p=1.0, seed=last)


def test_news_add_up() -> None:
    first = Output("a", (1,), "x", (TokenLogprobs(1, -0.5),), (None,))
    last = Output("a", (2, 3), "yz", (TokenLogprobs(2, -1.0),), (), FinishReason.STOP, 3)
    whole = Output("a", (1, 2, 3), "xyz", first.logprobs + last.logprobs, (None,), FinishReason.STOP, 3)
    assert Output.join([first, last]) == whole
    assert Output.join([last]) == last
