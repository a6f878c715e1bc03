"""What the compiler is told, by chip."""

from __future__ import annotations

import pytest

from podquant.engine.compiler import compiler_options


@pytest.mark.parametrize(
    ("device_kind", "dtype", "count"),
    [("TPU7x", "bfloat16", 1), ("TPU7x", "float32", 0), ("TPU v6 lite", "bfloat16", 0), ("cpu", "bfloat16", 0)],
)
def test_only_16_bit_weights_on_tpu7x_need_an_option(device_kind: str, dtype: str, count: int) -> None:
    """What it does there: see test_weights_aot."""
    assert len(compiler_options(device_kind, dtype)) == count
