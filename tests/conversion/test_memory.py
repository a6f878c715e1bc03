"""What a worker is foretold to hold is what it allocates."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from podquant.conversion.memory import CLIENT_BYTES
from podquant.storage.gcs.chunks import uploads_nbytes

WINDOW, THREADS = 1 << 20, 2
MEASURE = """
import sys, tracemalloc
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
source, target, rules, tp_size, window, threads = sys.argv[1:]
checkpoint = Checkpoint.open(source)
plan = plan_conversion(checkpoint, load_quantization_config(rules), source_name="s", tp_size=int(tp_size))
options = {"threads": int(threads), "window_bytes": int(window)}
convert(checkpoint, plan, target + ".warm", **options)
tracemalloc.start()
convert(checkpoint, plan, target, **options)
print(tracemalloc.get_traced_memory()[1], plan.peak_memory(int(threads), int(window)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 4])
@pytest.mark.parametrize("rules", ["int8.yaml", "int8_keep_embedding.yaml"])
def test_a_worker_allocates_what_is_foretold(make_source: Callable[..., Any], rules: str, tp_size: int) -> None:
    large = np.full((2000, 4096), 0.5, ml_dtypes.bfloat16)
    names = ("model.embed_tokens", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj")
    source = make_source({f"{name}.weight": large for name in names})
    target = source.path.parent / "out"
    arguments = (str(source.path), str(target), rules, str(tp_size), str(WINDOW), str(THREADS))
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    measured, foretold = map(int, done.stdout.split())
    foretold -= CLIENT_BYTES + uploads_nbytes(1 if tp_size == 1 else tp_size + 1)  # a local file holds nothing
    print(measured, foretold)
    assert measured <= foretold + (1 << 20)  # the interpreter's own objects
    assert measured >= 0.6 * foretold
