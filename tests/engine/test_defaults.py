"""What a generation_config.json recommends, and what of it cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest

from podquant.engine.defaults import PLAIN, SamplingDefaults, read_defaults
from podquant.engine.request import SamplingParams
from podquant.errors import CheckpointError


def test_the_keys_of_published_models() -> None:
    settings = {
        "bos_token_id": 1,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "max_length": 20,
    }
    defaults, notes = read_defaults(json.dumps(settings).encode(), "generation_config.json")
    assert defaults == SamplingDefaults(0.6, 0.95, 20, 0.0, 1.05, 2048)
    assert notes == []
    assert str(defaults) == "temperature 0.6, top_p 0.95, top_k 20, repetition_penalty 1.05, max_tokens 2048"
    assert defaults.params() == SamplingParams(
        max_tokens=2048, temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": None, "top_p": None}, {"eos_token_id": [1, 2]}])
def test_nothing_recommended(settings: dict[str, Any]) -> None:
    assert read_defaults(json.dumps(settings).encode(), "f") == (PLAIN, [])
    assert (str(PLAIN), PLAIN.params()) == ("", SamplingParams())


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("temperature", "0.6", "a number, got '0.6'"),
        ("temperature", -1, "0 to 100, got -1"),
        ("temperature", True, "a number, got True"),
        ("top_p", 0, "above 0 and up to 1, got 0"),
        ("top_k", 2.5, "an integer, got 2.5"),
        ("min_p", [0.1], "a number, got [0.1]"),
        ("repetition_penalty", 0, "0.01 to 100, got 0"),
        ("max_new_tokens", -5, "0 or more, got -5"),
    ],
)
def test_a_value_that_cannot_be_is_left_out_and_told(key: str, value: object, problem: str) -> None:
    defaults, notes = read_defaults(json.dumps({key: value, "top_k" if key != "top_k" else "top_p": 1}).encode(), "m/f")
    assert defaults == (SamplingDefaults(top_k=1) if key != "top_k" else PLAIN)
    (note,) = notes
    assert note.startswith(f"m/f: {key} is ignored: ")
    assert problem in note


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b"3"])
def test_a_file_that_is_no_object(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^m/f.* Correct it, or take the file that the model came with\.$"):
        read_defaults(data, "m/f")
