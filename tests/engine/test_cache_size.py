"""How many tokens the KV cache has, and what is said where it has none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from jax.sharding import AbstractMesh

from podquant.config.scheme import Scheme
from podquant.engine.cache_size import CPU_CACHE_TOKENS, cache_tokens
from podquant.engine.memory import leaf_bytes, slot_bytes, token_bytes
from podquant.engine.settings import Settings
from podquant.errors import CapacityError
from podquant.families.registry import read_model_config
from podquant.model.axes import TP
from podquant.model.layout import Model
from podquant.model.matmul import Numerics
from tests.engine.shapes import LLAMA_3_8B

SETTINGS = Settings(
    max_running_requests=256, chunked_prefill_size=2048, page_size=128, mem_fraction_static=0.9, ep_size=1
)
MODEL = Model(
    read_model_config(LLAMA_3_8B, ()),
    lambda module: Scheme("int8"),
    Numerics("bfloat16", "tpu"),
    AbstractMesh((8,), (TP,)),
)
HELD = sum(leaf_bytes(MODEL)) + slot_bytes(MODEL, 256)


def test_what_memory_is_left_is_the_caches() -> None:
    room = 1000 * token_bytes(MODEL, "int8")
    assert cache_tokens(MODEL, SETTINGS, "int8", HELD + room, 8192, None) == 1000
    assert 500 <= cache_tokens(MODEL, SETTINGS, "auto", HELD + room, 8192, None) < 520
    assert cache_tokens(MODEL, SETTINGS, "auto", 1 << 40, 8192, None) == 256 * 8192  # more could not be used
    assert cache_tokens(MODEL, SETTINGS, "auto", None, 8192, None) == CPU_CACHE_TOKENS
    assert cache_tokens(MODEL, SETTINGS, "auto", 0, 8192, 4096) == 4096


def test_too_little_memory_says_what_would_fit() -> None:
    with pytest.raises(CapacityError, match=r"less than one page of 128: .*; --max-running-requests \d+") as caught:
        cache_tokens(MODEL, SETTINGS, "auto", HELD, 8192, None)
    fitting = int(str(caught.value).split("--max-running-requests ")[1].split()[0])
    assert 0 < fitting < 256
    fewer = replace(SETTINGS, max_running_requests=fitting)
    assert cache_tokens(MODEL, fewer, "auto", HELD, 8192, None) >= 128
    with pytest.raises(CapacityError, match=r"weights take [\d,]+; use more devices"):
        cache_tokens(MODEL, SETTINGS, "auto", HELD // 2, 8192, None)


def test_less_than_a_page_is_refused_where_it_was_asked_for() -> None:
    with pytest.raises(CapacityError, match="would hold 64 tokens, less than one page of 128: give --max-total-tokens"):
        cache_tokens(MODEL, SETTINGS, "auto", None, 8192, 64)
