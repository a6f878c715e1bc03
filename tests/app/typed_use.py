"""What a type checker makes of a user's code; mypy checks this file, nothing runs it.

A `type: ignore` that is not needed is an error of mypy's: so each of them holds that a mistake is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import podquant
from podquant import Conversion, Engine, EngineOptions, Output, Plan, SamplingParams


def convert() -> None:
    assert_type(podquant.__version__, str)
    assert_type(podquant.plan(Path("MODEL"), "int8.yaml", tp_size=2), Plan)
    assert_type(podquant.convert("MODEL", "OUT", "int8.yaml", overwrite=True), Conversion)
    assert_type(podquant.verify("OUT"), list[str])
    podquant.convert("MODEL", "OUT", "int8.yaml", tp_sizes=2)  # type: ignore[call-arg]
    podquant.converted  # type: ignore[attr-defined]  # noqa: B018


def generate() -> None:
    with podquant.load("OUT", device="cpu") as engine:
        assert_type(engine, Engine)
        assert_type(engine.generate("a", max_tokens=8), str)
        assert_type(engine.generate(["a", "b"], SamplingParams(max_tokens=8)), list[str])
        assert_type(engine.stream("a", temperature=0.0), Iterator[str])
        assert_type(engine.chat([{"role": "user", "content": "a"}]), str)
        assert_type(engine.complete(["a", [1, 2]]), list[Output])
        engine.generate("a", max_token=8)  # type: ignore[call-overload]
        engine.stream("a", temperature="hot")  # type: ignore[arg-type]
    podquant.load(EngineOptions("OUT"), tp_size=2).close()
    podquant.load("OUT", device="gpu")  # type: ignore[arg-type]
