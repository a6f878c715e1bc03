"""What a model takes of a device's memory, on a mesh of no devices."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

from podquant.config.scheme import CacheDtype, Scheme
from podquant.engine.memory import cache_copies, device_bytes, leaf_bytes, slot_bytes, token_bytes
from podquant.families.registry import read_model_config
from podquant.model.axes import TP
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from tests.engine.shapes import DEEPSEEK_V3, LLAMA_3_8B, LLAMA_3_70B


def laid_out(config: dict[str, Any], tp_size: int, ep_size: int = 1, dtype: str = "bfloat16") -> Model:
    mesh = AbstractMesh((tp_size,), (TP,))
    model = read_model_config(config, ())
    return Model(model, lambda module: Scheme("int8"), Numerics(dtype, "tpu"), mesh, ep_size)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", 32 * 2 * 128 * 2),
        ("bfloat16", 32 * 2 * 128 * 2),
        ("int8", 32 * 2 * (128 + 4)),
        ("fp8", 32 * 2 * (128 + 4)),
    ],
)
def test_a_token_of_one_head_a_chip(dtype: CacheDtype, expected: int) -> None:
    """Llama-3-8B over its 8 heads: 32 layers of a key and a value of 128 numbers; in 8 bits each with its scale."""
    assert token_bytes(laid_out(LLAMA_3_8B, 8), dtype) == expected


def test_a_token_is_as_the_programs_keep_it() -> None:
    for model in (laid_out(LLAMA_3_8B, 4), laid_out(LLAMA_3_8B, 2, dtype="float32"), laid_out(DEEPSEEK_V3, 16, 16)):
        pages = device_bytes(jax.tree.leaves(model.cache_arrays(CacheShape(3, 64, 1, 1))))
        assert pages == 3 * 64 * token_bytes(model)


def test_surplus_heads_are_copies_and_so_are_latents() -> None:
    assert cache_copies(laid_out(LLAMA_3_70B, 8)) == 1
    assert cache_copies(laid_out(LLAMA_3_70B, 16)) == 2
    assert cache_copies(laid_out(DEEPSEEK_V3, 32, 32)) == 32


def test_weights_of_8b_in_int8_are_an_eighth_each_and_norms_whole() -> None:
    """As the TPU compiler counted the arguments of this very step on v5e:2x4, with the cache and the slots."""
    model = laid_out(LLAMA_3_8B, 8)
    layers = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
    scales = 32 * 4 * ((4096 + 1024 + 1024 + 2 * 14336) // 8 + 2 * 4096)
    outside = 2 * 128256 * (4096 + 4) // 8
    assert sum(leaf_bytes(model)) == layers // 8 + scales + outside + (2 * 32 + 1) * 4096 * 2
    cache = 64 * (1 + 32 * 2048 // 64) * token_bytes(model)
    assert sum(leaf_bytes(model)) + cache + slot_bytes(model, 32) == pytest.approx(2_082_892_288, rel=1e-4)
