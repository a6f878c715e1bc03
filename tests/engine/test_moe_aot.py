"""The TPU compiler on experts of a real size: what a layer of Qwen3-235B takes of 16 chips, without a TPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import MATRIX

pytest.importorskip("libtpu", reason="the TPU compiler exists for Linux on x86-64 only")

pytestmark = [pytest.mark.slow, MATRIX]

EP_SIZES = ("1", "16")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    child = [sys.executable, str(Path(__file__).with_name("moe_aot_child.py")), "v6e:4x4", *EP_SIZES]
    done = subprocess.run(child, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_experts_take_one_all_reduce_and_no_memory_beside_their_codes(
    compiled: dict[str, dict[str, Any]], ep_size: str
) -> None:
    facts = compiled[ep_size]
    assert facts["layer_collectives"] == ["all-reduce", "all-reduce"]  # attention's and the experts'
    assert facts["repeated_collectives"] == []
    # An expert's projection in bfloat16 is 12.6 MB, in int8 6.3 MB.
    assert facts["temp_bytes"] < 6e6
    assert facts["temp_bytes"] < 0.01 * sum(facts["expert_bytes"])


@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_experts_are_multiplied_as_codes(compiled: dict[str, dict[str, Any]], ep_size: str) -> None:
    """Four projections of attention and three of experts; the rest are attention's own and the router's."""
    products = compiled[ep_size]["layer_products"]
    assert products.count("bf16 s8 f32") == 7
    assert len(products) == 12
