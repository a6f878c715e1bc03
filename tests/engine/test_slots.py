"""Tallies by token on the devices, and what they do to logits, against plain numpy, at several sizes of tp."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from podquant.engine.slots import NUM_ENDS, Adjustment, adjust, tally
from podquant.model.mesh import make_mesh

VOCAB, SLOTS = 16, 2
CUT, WHOLE = PartitionSpec(None, "tp"), PartitionSpec()
Array = np.ndarray[Any, np.dtype[Any]]


@cache
def program(work: Callable[..., Any], mesh: jax.sharding.Mesh, specs: tuple[Any, ...]) -> Any:
    return jax.jit(jax.shard_map(work, mesh=mesh, in_specs=specs, out_specs=CUT, check_vma=False))


class Devices:
    """Runs the functions on shards."""

    def __init__(self, tp: int) -> None:
        self._mesh = make_mesh("cpu", tp)
        self.tallies: Any = jnp.full((SLOTS, VOCAB), 77, jnp.int32)  # whatever the last sequence left

    def _run(self, work: Callable[..., Any], specs: tuple[Any, ...], *given: Any) -> Any:
        return program(work, self._mesh, specs)(*given)

    def prefill(self, slot: int, text: list[int], start: int, stop: int, prompt: int, ends: list[int]) -> None:
        """One step of a sequence, padded."""
        tokens, positions = np.zeros(8, np.int32), np.full(8, -1, np.int32)
        tokens[: stop - start], positions[: stop - start] = text[start:stop], np.arange(start, stop)
        padded = np.full((NUM_ENDS, 2), -1, np.int32)
        padded[: len(ends), 0], padded[: len(ends), 1] = 0, ends
        self._tally([slot], [start], [prompt], [True], tokens, positions, np.zeros(8, np.int32), padded)

    def decode(self, slots: list[int], tokens: list[int], used: list[bool]) -> None:
        """A token of each, behind prompts of one token."""
        rows, ends = np.arange(len(slots)), np.full((NUM_ENDS, 2), -1)
        self._tally(slots, [5] * len(slots), [1] * len(slots), used, tokens, [5] * len(slots), rows, ends)

    def _tally(self, *given: Any) -> None:
        arrays = [jnp.asarray(each) for each in given]
        arrays = [each if each.dtype == bool else each.astype(jnp.int32) for each in arrays]
        self.tallies = self._run(tally, (CUT, *(WHOLE,) * 8), self.tallies, *arrays)

    def adjust(self, logits: Array, slots: list[int], **how: Any) -> Array:
        batch = len(slots)
        defaults = {"is_used": True, "forbids_ends": False, "repetition": 1.0, "presence": 0.0, "frequency": 0.0}
        given = {
            name: jnp.broadcast_to(jnp.asarray(how.get(name, value), type(value)), (batch,))
            for name, value in defaults.items()
        }
        rows = self.tallies[jnp.asarray(slots)]
        return np.asarray(self._run(adjust, (CUT, CUT, WHOLE), jnp.asarray(logits), rows, Adjustment(**given)))


def expected(
    logits: Array, prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> Array:
    """As transformers' and OpenAI's documents have it, token by token."""
    result = logits.copy()
    for token in {*prompt, *output}:
        result[token] = result[token] / repetition if result[token] > 0 else result[token] * repetition
    for token in output:
        result[token] -= frequency
    for token in set(output):
        result[token] -= presence
    return result


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits_follow_what_prompt_and_output_hold(tp: int) -> None:
    devices, chooser = Devices(tp), np.random.default_rng(tp)
    prompts = [chooser.integers(0, VOCAB, length).tolist() for length in (11, 3)]
    outputs = [chooser.integers(0, VOCAB, length).tolist() for length in (6, 6)]
    for slot, prompt in enumerate(prompts):
        for start in range(0, len(prompt), 8):
            devices.prefill(slot, prompt, start, min(start + 8, len(prompt)), len(prompt), [])
    for tokens in zip(*outputs, strict=True):
        devices.decode([1, 0, SLOTS], [*reversed(tokens), 0], [True, True, False])
    logits = chooser.normal(0.0, 2.0, (2, VOCAB)).astype(np.float32)
    how = {"repetition": [1.3, 0.8], "presence": [0.5, -0.25], "frequency": [0.25, 1.5]}
    found = devices.adjust(logits, [0, 1], **how)
    for row in range(2):
        numbers = (how[name][row] for name in ("repetition", "presence", "frequency"))
        np.testing.assert_allclose(found[row], expected(logits[row], prompts[row], outputs[row], *numbers), rtol=1e-5)
    np.testing.assert_array_equal(devices.adjust(logits, [0, 1], is_used=False, repetition=9.0), logits)
    np.testing.assert_array_equal(devices.adjust(logits, [0, 1]), logits)


@pytest.mark.parametrize("tp", [1, 4])
def test_a_sequence_prefilled_again_is_tallied_as_before(tp: int) -> None:
    """After a preemption what it had generated comes with the prompt; what was in the slot before is gone."""
    devices = Devices(tp)
    prompt, output = [3, 3, 9, 15, 0, 1, 1], [9, 4, 4, 15, 4]
    devices.prefill(0, prompt, 0, 7, 7, [2, 15])
    for token in output:
        devices.decode([0], [token], [True])
    text = prompt + output
    devices.prefill(1, text, 0, 8, 7, [2, 15])
    devices.prefill(1, text, 8, 12, 7, [2, 15])
    np.testing.assert_array_equal(np.asarray(devices.tallies[0]), np.asarray(devices.tallies[1]))


@pytest.mark.parametrize("tp", [1, 4])
def test_end_tokens_are_never_chosen_while_they_are_forbidden(tp: int) -> None:
    devices = Devices(tp)
    devices.prefill(0, [5], 0, 1, 1, [2, 15])
    logits = np.ones((1, VOCAB), np.float32)
    found = devices.adjust(logits, [0], forbids_ends=True)
    assert np.isneginf(found[0]).nonzero()[0].tolist() == [2, 15]
    np.testing.assert_array_equal(devices.adjust(logits, [0], forbids_ends=False), logits)


def test_rows_that_ask_for_nothing_are_left_alone() -> None:
    devices = Devices(2)
    before = np.asarray(devices.tallies)
    devices.decode([0, 1], [3, 4], [False, False])
    np.testing.assert_array_equal(np.asarray(devices.tallies), before)
