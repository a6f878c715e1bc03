"""What serve does on each kind of device where the flags do not say, and why."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from podquant.app.options import ServeOptions
from podquant.cluster.topology import GENERATIONS, Generation, generation_of
from podquant.engine.device_defaults import device_defaults
from podquant.families.config import ModelConfig
from podquant.families.layout import plan_layout
from podquant.families.registry import read_model_config
from tests.engine.shapes import LLAMA_3_8B, QWEN3_30B


def dense() -> ModelConfig:
    return read_model_config(LLAMA_3_8B, ())


def sparse(**changed: Any) -> ModelConfig:
    config = read_model_config(QWEN3_30B, ())
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, **changed))


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda row: row.name)
def test_a_tpu_runs_256_sequences_in_pages_of_128_with_all_but_a_tenth_of_its_memory(generation: Generation) -> None:
    found = device_defaults(generation, dense(), 8)
    assert found.max_running_requests.value == 256
    assert found.page_size.value == 128
    assert found.mem_fraction_static.value == 0.9
    assert found.ep_size.value == 1


def test_a_small_chip_takes_half_the_prompt_tokens_of_a_step() -> None:
    budgets = {row.name: device_defaults(row, dense(), 8).chunked_prefill_size.value for row in GENERATIONS}
    assert budgets == {"v4": 2048, "v5litepod": 1024, "v5p": 2048, "v6e": 2048, "tpu7x": 2048}


def test_what_is_no_tpu_gets_what_serve_has_always_done() -> None:
    assert generation_of("cpu") is None
    found = device_defaults(None, sparse(), 2)
    values = [getattr(found, field.name).value for field in fields(found)]
    assert values == [8, 256, 64, 0.85, 1]


@pytest.mark.parametrize(
    ("tp_size", "changed", "expected"),
    [
        (1, {}, 1),
        (8, {}, 8),
        (16, {}, 16),
        (8, {"num_experts": 60}, 4),
        (8, {"num_experts": 60, "ffn_size": 1407}, 1),  # ep 4 would halve an odd width; tp 8 fits no way
    ],
)
def test_experts_are_shared_out_whole_as_far_as_their_count_divides(
    tp_size: int, changed: dict[str, int], expected: int
) -> None:
    config = sparse(**changed)
    found = device_defaults(generation_of("TPU v6 lite"), config, tp_size).ep_size
    assert found.value == expected
    if expected > 1:
        plan_layout(config, tp_size, expected)


def test_each_choice_is_a_line_with_the_flag_and_the_reason() -> None:
    lines = list(device_defaults(generation_of("TPU v6 lite"), sparse(), 8).lines)
    assert len(lines) == 5
    assert "--ep-size 8: each device has 16 whole experts, and reads a chosen one at once" in lines
    for line in lines:
        flag, _, reason = line.partition(": ")
        assert hasattr(ServeOptions, flag.split()[0].removeprefix("--").replace("-", "_"))
        assert reason
