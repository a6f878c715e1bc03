"""The TPU compiler on weights in forms that once were copied or refused: each is read once, as it is.

Decode of 32 rows with 16 layers of public models' shapes; a slice's chips share out all weights, and experts whole.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import MATRIX

pytest.importorskip("libtpu", reason="the TPU compiler exists for Linux on x86-64 only")

pytestmark = [pytest.mark.slow, MATRIX]

PROGRAMS = {"tpu7x:2x2x1": ("Llama-3-70B",), "v6e:4x4": ("Qwen3-32B blocks", "Qwen3-235B blocks")}
CELLS = [(topology, name) for topology, names in PROGRAMS.items() for name in names]
MOST_TEMP_BYTES = 12e6
"""Logits and the like: a copy of one weight of a Llama-3-70B's layer is 59 MB, of a layer's experts 150 MB."""


@cache
def compiled(topology: str) -> Mapping[str, Mapping[str, Any]]:
    child = [sys.executable, str(Path(__file__).with_name("weights_aot_child.py")), topology, *PROGRAMS[topology]]
    done = subprocess.run(child, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("topology", "name"), CELLS)
def test_no_weight_is_copied(topology: str, name: str) -> None:
    assert compiled(topology)[name]["temp_bytes"] < MOST_TEMP_BYTES


@pytest.mark.parametrize(("topology", "name"), [("tpu7x:2x2x1", "Llama-3-70B"), ("v6e:4x4", "Qwen3-32B blocks")])
def test_a_step_reads_its_weights_once(topology: str, name: str) -> None:
    """Of bfloat16 on TPU7x; of fp8 whose shards of down_proj end in the middle of a block of 128 columns."""
    facts = compiled(topology)[name]
    bound = facts["weight_bytes"] + facts["cache_bytes"]
    assert 0.95 * bound < facts["hbm_bytes"] < 1.05 * bound
