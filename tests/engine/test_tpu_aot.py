"""The TPU compiler on the real step at a real size: what it needs of a chip, and what was made of it, without a TPU.

Llama-3-8B over 8 chips, and Llama-3-70B over the 16 chips of four hosts, which hold two copies of each key/value head:
bfloat16 activations, every dense layer, the embedding and the output projection quantized; decode at batch 32 (48)
with a cache of 2,048 tokens a row in pages of 64, prefill of 512 tokens into the same cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import MATRIX

pytest.importorskip("libtpu", reason="the TPU compiler exists for Linux on x86-64 only")

pytestmark = pytest.mark.slow

PROGRAMS = {
    "v5e:2x4": ("decode int8", "decode int8_w8a8", "prefill int8", "planted int8"),
    "v6e:2x4": ("decode int8", "decode int8_w8a8"),
    "v5e:4x4": ("decode int8",),
    "v6e:4x4": ("decode int8",),
}
_IN_EVERY_RUN = ("v5e:2x4",)
"""A model on the chips of two hosts; the others have another generation of chips, or more hosts."""
REAL = [
    pytest.param(topology, name, marks=() if topology in _IN_EVERY_RUN else MATRIX)
    for topology, names in PROGRAMS.items()
    for name in names
    if not name.startswith("planted")
]
HBM_BYTES = {"v5e": 15.75 * 2**30, "v6e": 31.24 * 2**30}
"""What the compiler lets a program use; it refuses more than that itself."""


class Compiler:
    """A child process for each topology whose programs are asked for."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}

    def __call__(self, topology: str, name: str) -> dict[str, Any]:
        if topology not in self._found:
            child = [sys.executable, str(Path(__file__).with_name("tpu_aot_child.py")), topology, *PROGRAMS[topology]]
            done = subprocess.run(child, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (
                f"compiling for {topology} ended with {done.returncode}:\n{done.stderr[-4000:]}"
            )
            self._found[topology] = json.loads(done.stdout)
        facts: dict[str, Any] = self._found[topology][name]
        return facts


@pytest.fixture(scope="module")
def compiled() -> Compiler:
    return Compiler()


@pytest.mark.parametrize(("topology", "name"), REAL)
def test_a_step_fits_and_takes_no_memory_beside_weights_and_cache(compiled: Compiler, topology: str, name: str) -> None:
    facts = compiled(topology, name)
    assert facts["argument_bytes"] + facts["temp_bytes"] < HBM_BYTES[topology.partition(":")[0]]
    assert facts["temp_bytes"] <= 0.01 * facts["argument_bytes"]
    # The cache is written where it lies; the compiler rounds the few last tokens up.
    assert facts["donated_bytes"] <= facts["alias_bytes"] < facts["donated_bytes"] + 4096


@pytest.mark.parametrize(("topology", "name"), REAL)
def test_chips_meet_twice_a_layer_and_three_times_outside(compiled: Compiler, topology: str, name: str) -> None:
    facts = compiled(topology, name)
    assert facts["layer_collectives"] == ["all-reduce", "all-reduce"]
    # Of every kind, and in the step that meets most, whatever requests ask for: the embedding, the logits, the tokens.
    assert len(facts["other_collectives"]) <= 3
    assert facts["repeated_collectives"] == []


@pytest.mark.parametrize(("topology", "name"), REAL)
def test_a_step_takes_the_memory_that_a_plan_says(compiled: Compiler, topology: str, name: str) -> None:
    facts = compiled(topology, name)
    assert facts["argument_bytes"] + facts["temp_bytes"] == pytest.approx(facts["planned_bytes"], rel=0.03)


@pytest.mark.parametrize(("topology", "name"), [pair for pair in REAL if "decode" in str(pair.values)])
def test_a_step_reads_what_a_plan_says(compiled: Compiler, topology: str, name: str) -> None:
    """Weights once, and the keys and values of rows that are all alike."""
    facts = compiled(topology, name)
    assert facts["bound_bytes"] < facts["hbm_bytes"] <= 1.1 * facts["bound_bytes"]


@pytest.mark.parametrize(("topology", "name"), REAL)
def test_no_floating_point_copy_of_a_weight(compiled: Compiler, topology: str, name: str) -> None:
    assert compiled(topology, name)["wide_copies"] == []


def test_a_planted_copy_of_the_smallest_weight_is_caught(compiled: Compiler) -> None:
    """k_proj scaled in front of its product: 33 MB of bfloat16, in VMEM on this chip and so not counted in temp."""
    copies = compiled("v5e:2x4", "planted int8")["wide_copies"]
    assert any("bf16[32,128,4096]" in copy for copy in copies), copies


@pytest.mark.parametrize(("topology", "name"), REAL)
def test_every_product_reads_codes(compiled: Compiler, topology: str, name: str) -> None:
    """Seven weights a layer, and two products of attention for each kind of row, which have none; then the logits."""
    facts = compiled(topology, name)
    product = "s8 s8 s32" if name.endswith("w8a8") else "bf16 s8 f32"
    assert sorted(facts["layer_products"]) == sorted([product] * 7 + ["bf16 bf16 f32"] * 4)
    assert facts["other_products"] == [product]
