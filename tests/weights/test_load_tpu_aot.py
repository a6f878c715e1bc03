"""The TPU compiler on what places the weights of a Llama-3-70B over the 16 chips of 4 hosts, without a TPU."""

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

MODELS = [("v6e:4x4", "int8"), pytest.param("v5e:4x4", "int8", marks=MATRIX), ("v6e:4x4", "float8_e4m3fn")]
"""Topologies whose processes have a square of 2x2 chips, and element types of the codes."""

MOST_TEMP_BYTES = 256 << 10


@pytest.mark.parametrize(("topology", "dtype"), MODELS)
def test_rows_are_moved_by_one_collective_and_written_where_they_belong(topology: str, dtype: str) -> None:
    child = [sys.executable, str(Path(__file__).with_name("load_aot_child.py")), topology, dtype]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    programs: dict[str, dict[str, Any]] = json.loads(done.stdout)
    kinds = set()
    for name, facts in programs.items():
        module = name.split(" ")[0].split(".")[-2]
        kind = (facts["spread"], *facts["collectives"])
        kinds.add(kind)
        if name.split(" ")[0].endswith("_proj.weight"):
            expected = {
                "o_proj": ("SPLIT", "all-to-all"),
                "down_proj": ("SPLIT", "all-to-all"),
                "k_proj": ("SPLIT", "all-gather"),
                "v_proj": ("SPLIT", "all-gather"),
            }
            assert kind == expected.get(module, ("OWN_ROWS",)), name
        # The leaf is donated and nothing of its size is copied; the compiler rounds small ones up.
        assert facts["weight_bytes"] <= facts["alias_bytes"] < facts["weight_bytes"] + 4096, name
        assert facts["temp_bytes"] <= MOST_TEMP_BYTES, name
        assert facts["block_bytes"] <= 8 << 20, name
    assert kinds == {("OWN_ROWS",), ("ONE", "all-gather"), ("SPLIT", "all-to-all"), ("SPLIT", "all-gather")}
