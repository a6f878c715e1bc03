"""What is read of a DeepSeek's config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from podquant.errors import UnsupportedModelError
from podquant.families.config import ModelConfig
from podquant.families.registry import read_model_config

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"


def read(name: str, **changes: Any) -> ModelConfig:
    return read_model_config({**json.loads((GOLDENS / name / "config.json").read_text()), **changes}, ())


def test_v3_scores_by_sigmoid_in_groups_and_corrects() -> None:
    config = read("deepseek_v3")
    assert config.moe is not None
    assert config.latent is not None
    assert (config.moe.scoring, config.moe.num_groups, config.moe.top_groups) == ("sigmoid", 4, 2)
    assert (config.moe.correction_bias, config.moe.layers) == (True, (False, True, True))
    assert (config.latent.q_rank, config.latent.kv_rank, config.head_dim) == (32, 24, 8)


def test_v2_scores_by_softmax_and_groups_only_if_it_says_so() -> None:
    config = read("deepseek_v2", n_group=4, topk_group=2)
    assert config.moe is not None
    assert config.latent is not None
    assert (config.moe.scoring, config.moe.normalize, config.moe.num_groups) == ("softmax", False, 1)
    assert config.latent.q_rank is None
    grouped = read("deepseek_v2", n_group=4, topk_group=2, topk_method="group_limited_greedy").moe
    assert grouped is not None
    assert (grouped.num_groups, grouped.top_groups, grouped.group_score) == (4, 2, "max")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v2", {"scoring_func": "sigmoid"}),
        ("deepseek_v2", {"topk_method": "noaux_tc"}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"moe_layer_freq": 2}),
    ],
)
def test_other_routing_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=f"`{next(iter(changes))}: .* is not supported"):
        read(name, **changes)
