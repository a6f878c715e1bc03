"""Sampling on the devices against exact probabilities, at several tensor-parallel sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from podquant.engine.sampling import Sampled, Sampling, sample
from podquant.model.mesh import make_mesh
from tests.matrix import MATRIX

VOCAB = 13
PADDED = 16
LOGITS = np.random.default_rng(3).normal(0.0, 0.7, VOCAB).astype(np.float32)
Array = np.ndarray[Any, np.dtype[Any]]


def draw(logits: Array, tp: int, num_top: int = 4, **how: Any) -> Sampled:
    """Sample each row of `logits` [B, VOCAB], its padding full of tempting values."""
    batch = len(logits)
    columns = {
        "temperature": np.ones(batch, np.float32),
        "top_p": np.ones(batch, np.float32),
        "min_p": np.zeros(batch, np.float32),
        "top_k": np.zeros(batch, np.int32),
        "seeds": np.arange(batch, dtype=np.int32),
        "positions": np.zeros(batch, np.int32),
        "wants_logprobs": np.ones(batch, np.bool_),
    }
    given = {name: np.broadcast_to(value, batch).astype(columns[name].dtype) for name, value in how.items()}
    padded = np.full((batch, PADDED), 99.0, np.float32)
    padded[:, :VOCAB] = logits
    specs = (PartitionSpec(None, "tp"), PartitionSpec())
    step = jax.shard_map(
        partial(sample, vocab_size=VOCAB, num_top=num_top),
        mesh=make_mesh("cpu", tp),
        in_specs=specs,
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    sampled = jax.jit(step)(
        jnp.asarray(padded), Sampling(**{name: jnp.asarray(column) for name, column in (columns | given).items()})
    )
    found: Sampled = jax.tree.map(np.asarray, sampled)
    return found


def softmax(logits: Array) -> Array:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(weights / weights.sum())


def filtered(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, temperature: float = 1.0) -> Array:
    """The exact distribution: top_k, then the smallest set that reaches top_p, then min_p."""
    p = softmax(LOGITS / temperature)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0.0
    p /= p.sum()
    p[order[int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1 :]] = 0.0
    p[p < min_p * p.max()] = 0.0
    return np.asarray(p / p.sum())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(how: dict[str, Any]) -> None:
    count = 6000
    tokens = draw(np.tile(LOGITS, (count, 1)), 1, **how).tokens
    expected = filtered(**how)
    found = np.bincount(tokens, minlength=PADDED)
    assert found[VOCAB:].sum() == 0  # padding is never drawn
    assert found[:VOCAB][expected == 0].sum() == 0
    seen = expected > 0
    chi_square = ((found[:VOCAB][seen] - count * expected[seen]) ** 2 / (count * expected[seen])).sum()
    # mean + 4 standard deviations of a chi-square with (outcomes - 1) degrees of freedom
    freedom = seen.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("batch", [pytest.param(1, marks=MATRIX), 3, pytest.param(8, marks=MATRIX)])
def test_shards_change_nothing(batch: int) -> None:
    logits = np.random.default_rng(batch).normal(0.0, 2.0, (batch, VOCAB)).astype(np.float32)
    how: dict[str, Any] = {
        "temperature": np.resize([0.0, 1.0, 0.7], batch),
        "top_k": np.resize([0, 5], batch),
        "top_p": 0.9,
    }
    whole = draw(logits, 1, **how)
    for tp in (2, 4, 8):
        cut = draw(logits, tp, **how)
        np.testing.assert_array_equal(cut.tokens, whole.tokens)
        np.testing.assert_array_equal(cut.top_tokens, whole.top_tokens)
        np.testing.assert_allclose(cut.top_logprobs, whole.top_logprobs, atol=1e-6)


def test_a_row_depends_on_its_own_seed_and_position_only() -> None:
    rows = np.tile(LOGITS, (6, 1))
    tokens = draw(rows, 1, seeds=[5, 9, 5, 2, 5, 5], positions=[3, 1, 3, 8, 3, 4]).tokens
    assert tokens[0] == tokens[2] == tokens[4] == draw(rows[:1], 1, seeds=[5], positions=[3]).tokens[0]
    many = draw(np.tile(LOGITS, (64, 1)), 1, seeds=5, positions=np.arange(64)).tokens
    assert len(set(many.tolist())) > 3


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.zeros((2, VOCAB), np.float32)
    logits[1, [4, 11]] = 1.0
    for tp in (1, 4):
        assert draw(logits, tp, temperature=0.0).tokens.tolist() == [0, 4]


def test_logprobs_are_of_the_whole_distribution() -> None:
    expected = np.log(softmax(LOGITS))
    found = draw(LOGITS[None], 2, temperature=0.3, top_k=1, num_top=VOCAB + 2)
    best = np.argsort(-expected)
    assert found.tokens.tolist() == [best[0]]
    np.testing.assert_allclose(found.logprobs, [expected[best[0]]], atol=1e-6)
    assert found.top_tokens[0, :VOCAB].tolist() == best.tolist()
    np.testing.assert_allclose(found.top_logprobs[0, :VOCAB], expected[best], atol=1e-5)
    assert not draw(LOGITS[None], 2, wants_logprobs=False).top_logprobs.any()
