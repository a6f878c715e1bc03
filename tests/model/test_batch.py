"""Where the tokens of a flat batch stand."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from podquant.families.registry import read_model_config
from podquant.model.batch import flat_batch

LLAMA = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "llama" / "config.json").read_text())


def test_rows_lie_one_behind_the_other_and_padding_is_written_to_page_zero() -> None:
    table = jnp.asarray(np.arange(1, 49, dtype=np.int32).reshape(3, 16))
    starts, lengths = jnp.asarray([40, 15, 0]), jnp.asarray([1, 3, 0])
    config = read_model_config(LLAMA, ())
    at = flat_batch(config, 6, starts, lengths, starts + lengths, table, page_size=16, pages_per_layer=50)
    assert np.asarray(at.positions).tolist() == [40, 15, 16, 17, 0, 0]
    assert np.asarray(at.rows).tolist()[:4] == [0, 1, 1, 1]
    assert np.asarray(at.is_token).tolist() == [True] * 4 + [False] * 2
    assert np.asarray(at.write_pages).tolist() == [3, 17, 18, 18, 0, 0]
    assert np.asarray(at.write_slots).tolist() == [8, 15, 0, 1, 0, 0]
    assert np.asarray(at.firsts).tolist() == [0, 1, 4]
    assert np.asarray(at.lasts).tolist() == [0, 3, 0]


def test_a_batch_without_rows_is_padding() -> None:
    nothing = jnp.zeros(2, jnp.int32)
    config = read_model_config(LLAMA, ())
    at = flat_batch(config, 4, nothing, nothing, nothing, jnp.ones((2, 4), jnp.int32), page_size=16, pages_per_layer=5)
    assert not np.asarray(at.is_token).any()
    assert np.asarray(at.write_pages).tolist() == [0] * 4
