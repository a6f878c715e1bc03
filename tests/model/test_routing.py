"""Which experts a token goes to, against the definition spelled out in NumPy; and what config.json says of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.families.config import MoEConfig
from podquant.families.registry import read_model_config
from podquant.model.routing import route

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
LOGITS = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)


def how(**more: Any) -> MoEConfig:
    return MoEConfig(num_experts=8, top_k=2, ffn_size=16, layers=(True,), **more)


def test_softmax_scores_normalized_or_not() -> None:
    scores = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    best = np.argsort(-scores, axis=-1)[:, :2]
    taken = np.take_along_axis(scores, best, axis=-1)
    experts, weights = route(jnp.asarray(LOGITS), how(normalize=False))
    np.testing.assert_array_equal(experts, best)
    np.testing.assert_allclose(weights, taken, rtol=1e-5)
    _, weights = route(jnp.asarray(LOGITS), how())
    np.testing.assert_allclose(weights, taken / taken.sum(-1, keepdims=True), rtol=1e-5)


def test_a_bias_decides_the_choice_and_not_the_weight() -> None:
    bias = np.array([0, 0, 0, 0, 0, 9, 0, 9], np.float32)
    experts, weights = route(jnp.asarray(LOGITS), how(scoring="sigmoid", scaling=1.5), jnp.asarray(bias))
    assert {tuple(sorted(row)) for row in np.asarray(experts).tolist()} == {(5, 7)}
    scores = np.take_along_axis(1 / (1 + np.exp(-LOGITS)), np.asarray(experts), axis=-1)
    np.testing.assert_allclose(weights, 1.5 * scores / scores.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("group_score", "group"), [("max", 0), ("top2", 1)])
def test_experts_are_chosen_in_the_best_groups(group_score: Any, group: int) -> None:
    logits = jnp.asarray([[4.0, -9.0, 2.9, 2.8, -5.0, -5.0, -5.0, -5.0]])
    experts, _ = route(
        logits, how(scoring="sigmoid", num_groups=4, top_groups=1, group_score=group_score, normalize=False)
    )
    assert sorted(np.asarray(experts)[0].tolist()) == [2 * group, 2 * group + 1]


def golden(name: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDENS / name / "config.json").read_text())
    return config | changes


def test_layers_with_experts() -> None:
    def layers(name: str, **changes: Any) -> tuple[bool, ...]:
        moe = read_model_config(golden(name, **changes), ()).moe
        assert moe is not None
        return moe.layers

    assert layers("glm4_moe") == (False, True, True)
    assert layers("qwen3_moe", mlp_only_layers=[1]) == (True, False, True)
    assert layers("qwen2_moe", decoder_sparse_step=2) == (False, True, False)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"n_routed_experts": None}, CheckpointError, "`num_experts` must be an integer"),
        ({"num_experts_per_tok": 9}, CheckpointError, "cannot choose 9 of `n_routed_experts: 8` experts in 1 of 1"),
        ({"n_group": 3}, CheckpointError, "expected groups of equal size"),
        ({"n_group": 8, "topk_group": 4}, CheckpointError, "groups have one each|have one each"),
        ({"scoring_func": "softmax"}, UnsupportedModelError, "`scoring_func: 'softmax'` is not supported"),
    ],
)
def test_experts_that_cannot_be_are_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_model_config(golden("glm4_moe", **changes), ())
