"""Sampling on the devices against exact probabilities, at several tensor-parallel sizes."""

from __future__ import annotations

from functools import cache, partial
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


@cache
def program(tp: int, num_top: int) -> Any:
    step = jax.shard_map(
        partial(sample, vocab_size=VOCAB, num_top=num_top),
        mesh=make_mesh("cpu", tp),
        in_specs=(PartitionSpec(None, "tp"), PartitionSpec(None, "tp"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return jax.jit(step)


def draw(logits: Array, tp: int, num_top: int = 4, adjusted: Array | None = None, **asked: Any) -> Sampled:
    """Sample each row of `logits` [B, VOCAB], its padding full of tempting values; `adjusted` to choose from others."""
    batch = len(logits)
    columns = {
        "temperature": np.ones(batch, np.float32),
        "top_p": np.ones(batch, np.float32),
        "min_p": np.zeros(batch, np.float32),
        "top_k": np.zeros(batch, np.int32),
        "seeds": np.arange(batch, dtype=np.int32),
        "positions": np.zeros(batch, np.int32),
        "wants_logprobs": np.ones(batch, np.bool_),
        "is_adjusted": np.full(batch, adjusted is not None),
    }
    given = {name: np.broadcast_to(value, batch).astype(columns[name].dtype) for name, value in asked.items()}
    padded = [np.full((batch, PADDED), 99.0, np.float32) for _ in range(2)]
    padded[0][:, :VOCAB], padded[1][:, :VOCAB] = logits, logits if adjusted is None else adjusted
    how = Sampling(**{name: jnp.asarray(column) for name, column in (columns | given).items()})
    found: Sampled = jax.tree.map(np.asarray, program(tp, num_top)(*map(jnp.asarray, padded), how))
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


NEAR_ZERO = [1e-6, 1e-8, 1e-20, 1e-38, 1e-45, 0.0]


@pytest.mark.parametrize("temperature", NEAR_ZERO)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, 1e30])
def test_a_temperature_next_to_zero_is_greedy(temperature: float, scale: float) -> None:
    rows = np.random.default_rng(7).normal(0.0, scale, (40, VOCAB)).astype(np.float32)
    filters: dict[str, Any] = {"top_k": 5, "top_p": 0.9, "min_p": 0.1}
    for more in ({}, filters):
        assert draw(rows, 2, temperature=temperature, **more).tokens.tolist() == rows.argmax(-1).tolist()


@pytest.mark.parametrize("top_p", NEAR_ZERO)
def test_a_top_p_next_to_zero_is_greedy(top_p: float) -> None:
    rows = np.random.default_rng(8).normal(0.0, 0.1, (40, VOCAB)).astype(np.float32)
    rows[:, 3] = rows[:, 9] = 1.0  # of two that are as likely the first
    for temperature in (1.0, 100.0):
        assert draw(rows, 1, temperature=temperature, top_p=top_p).tokens.tolist() == [3] * 40


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_a_low_temperature_keeps_digits_whatever_the_logits_add_up_to(offset: float) -> None:
    """Two logits 1/64 apart at temperature 1/64: e times as likely; divided first, 64 e4 would swallow the noise."""
    rows = np.full((4000, VOCAB), offset - 100.0, np.float32)
    rows[:, 2], rows[:, 7] = offset, offset + 1 / 64
    tokens = draw(rows, 1, temperature=1 / 64).tokens
    share = np.mean(tokens == 7)
    assert set(tokens.tolist()) == {2, 7}
    assert abs(share - np.e / (1 + np.e)) < 4 * np.sqrt(0.2 / 4000)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_choice_is_of_the_adjusted_logits_and_the_logprobs_of_the_others(tp: int, batch: int) -> None:
    chooser = np.random.default_rng(batch)
    logits, adjusted = chooser.normal(0.0, 1.0, (2, batch, VOCAB)).astype(np.float32)
    found = draw(logits, tp, num_top=VOCAB, adjusted=adjusted, temperature=0.0)
    expected = np.stack([np.log(softmax(row)) for row in logits])
    assert found.tokens.tolist() == adjusted.argmax(-1).tolist()
    np.testing.assert_allclose(found.logprobs, expected[np.arange(batch), found.tokens], atol=1e-6)
    np.testing.assert_allclose(found.top_logprobs, -np.sort(-expected), atol=1e-5)
