"""Sums over shards: the same bits however the devices are shared out, where parity is the point."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from podquant.model.axes import TP
from podquant.model.collectives import sum_over_shards


@pytest.mark.parametrize(("dtype", "collective"), [("float32", "all-gather"), ("bfloat16", "all-reduce")])
def test_shards_are_added_in_an_order_of_their_own_in_float32(dtype: str, collective: str) -> None:
    mesh = jax.make_mesh((4,), (TP,), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec(TP)
    add = jax.jit(jax.shard_map(sum_over_shards, mesh=mesh, in_specs=spec, out_specs=spec))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4 * 3, 5)), dtype)
    text = add.lower(x).compile().as_text() or ""
    assert [name for name in ("all-gather", "all-reduce") if f" {name}(" in text] == [collective]
    expected = np.asarray(x, np.float32).reshape(4, 3, 5).sum(axis=0)
    assert np.allclose(
        np.asarray(add(x), np.float32).reshape(4, 3, 5), expected, atol=1e-5 if dtype == "float32" else 0.1
    )
