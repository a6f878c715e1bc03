"""How a model's sizes are shared out among shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from podquant.errors import MeshError
from podquant.families.config import ModelConfig
from podquant.families.layout import Layout, plan_layout
from podquant.families.registry import read_model_config

LLAMA = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "llama" / "config.json").read_text())


def config(**changes: Any) -> ModelConfig:
    """8 query heads, 4 key/value heads, FFN width 160, vocabulary 512, or changed."""
    return read_model_config({**LLAMA, **changes}, ())


def test_heads_are_shared_out() -> None:
    assert plan_layout(config(), 4) == Layout(4, 4, 512)


def test_fewer_key_value_heads_than_shards_are_repeated() -> None:
    assert plan_layout(config(), 8) == Layout(8, 8, 512)


def test_the_vocabulary_is_rounded_up() -> None:
    assert plan_layout(config(vocab_size=509), 4) == Layout(4, 4, 512)


@pytest.mark.parametrize(
    ("tp", "changes", "what"),
    [
        (3, {}, "8 attention heads and 4 key/value heads and an FFN width of 160"),
        (4, {"intermediate_size": 162}, "an FFN width of 162"),
        (16, {}, "8 attention heads"),
        (4, {"num_attention_heads": 12, "num_key_value_heads": 6}, "6 key/value heads"),
    ],
)
def test_what_does_not_divide_is_named(tp: int, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(MeshError) as caught:
        plan_layout(config(**changes), tp)
    assert f"LlamaForCausalLM cannot be cut into tp_size {tp}: {what} do not divide" in str(caught.value)


def test_the_sizes_that_fit_are_named() -> None:
    with pytest.raises(MeshError, match=r"sizes that fit this model: 1, 2, 4, 8$"):
        plan_layout(config(), 3)


def test_experts_are_shared_out() -> None:
    path = Path(__file__).parents[1] / "data" / "goldens" / "qwen3_moe" / "config.json"
    moe = read_model_config(json.loads(path.read_text()), ())
    assert plan_layout(moe, 4, 2) == Layout(4, 4, 512, 2)
    with pytest.raises(MeshError, match=r"--ep-size 3 must divide --tp-size 4 and the 8 experts .* fit: 1, 2, 4$"):
        plan_layout(moe, 4, 3)
    with pytest.raises(MeshError, match="LlamaForCausalLM has none"):
        plan_layout(config(), 4, 2)
