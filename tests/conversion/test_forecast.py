"""What is foretold of conversions on many hosts, for models too large to hold: from headers made of shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.forecast import Forecast, forecast
from podquant.conversion.plan import MOST_UNIT_BYTES, Plan, plan_conversion
from tests.conversion.header_sets import (
    DEEPSEEK_V3,
    LLAMA_405B,
    Shapes,
    deepseek_shapes,
    llama_shapes,
    nbytes,
    write_header_set,
)

BUCKET_WINDOW = 16 << 20
"""`GcsStore.window_bytes`."""

MOST_WORKER_MEMORY = 600_000_000
MODELS: dict[str, tuple[Mapping[str, Any], Callable[[Mapping[str, Any]], Shapes], int, float]] = {
    "Llama-3.1-405B": (LLAMA_405B, llama_shapes, 633, 811.7),
    "DeepSeek-V3": (DEEPSEEK_V3, deepseek_shapes, 1271, 1342.1),
}


def spread(plan: Plan, num_hosts: int, workers_per_host: int = 1, threads: int = 4) -> Forecast:
    return forecast(
        plan, num_hosts=num_hosts, workers_per_host=workers_per_host, threads=threads, window_bytes=BUCKET_WINDOW
    )


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 16])
@pytest.mark.parametrize("model", MODELS)
def test_large_models_fit_workers_and_spread_evenly(tmp_path: Path, model: str, tp_size: int) -> None:
    config, make_shapes, num_units, gigabytes = MODELS[model]
    shapes = make_shapes(config)
    write_header_set(tmp_path / model, config, shapes)
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / model).iterdir()) < 100e6  # holes
    checkpoint = Checkpoint.open(str(tmp_path / model))
    plan = plan_conversion(checkpoint, load_quantization_config("int8.yaml"), source_name=model, tp_size=tp_size)
    checkpoint.close()

    assert plan.bytes_in == nbytes(shapes)
    assert plan.bytes_in / 1e9 == pytest.approx(gigabytes, abs=0.1)
    assert len(plan.units) == num_units
    assert all(unit.bytes_in <= MOST_UNIT_BYTES or len(unit.tensors) == 1 for unit in plan.units)
    # A byte a weight and 4 for a row's scale; what is no matrix, and the routers, in two bytes; and headers.
    quantized = [shape for name, shape in shapes.items() if len(shape) == 2 and ".mlp.gate." not in name]
    codes, scales = sum(map(math.prod, quantized)), sum(4 * rows for rows, _ in quantized)
    expected = codes + scales + plan.bytes_in - 2 * codes
    assert expected < plan.bytes_out < expected * 1.001

    for num_hosts in (1, 16, 64):
        found = spread(plan, num_hosts)
        assert found.num_units == num_units
        assert -(-num_units // num_hosts) <= found.most_units
        assert plan.bytes_in / num_hosts <= found.bytes_in <= plan.bytes_in / num_hosts * 1.05
        assert plan.bytes_out / num_hosts <= found.bytes_out <= plan.bytes_out / num_hosts * 1.05
        assert 1 <= found.balance < 1.05
        assert 100e6 < found.worker_memory == found.host_memory <= MOST_WORKER_MEMORY


@pytest.mark.slow
def test_cutting_for_more_ranks_does_not_break_the_bound(tmp_path: Path) -> None:
    write_header_set(tmp_path / "model", LLAMA_405B, llama_shapes(LLAMA_405B))
    checkpoint = Checkpoint.open(str(tmp_path / "model"))
    for rules in ("int8.yaml", "fp8_keep_embedding.yaml"):
        for tp_size in (1, 2, 8, 13, 32, 64):
            plan = plan_conversion(checkpoint, load_quantization_config(rules), source_name="m", tp_size=tp_size)
            assert spread(plan, 64).worker_memory <= MOST_WORKER_MEMORY
    checkpoint.close()


def test_workers_share_what_is_there(source: Any) -> None:
    _, plan = source.plan("int8.yaml", unit_bytes=10_000)
    one, six = spread(plan, 1), spread(plan, 2, 3)
    assert (one.most_units, one.bytes_in, one.balance) == (len(plan.units), plan.bytes_in, 1.0)
    assert one.bytes_out == plan.bytes_out - sum(plan.copied.values())
    assert six.host_memory == 3 * six.worker_memory
    assert six.most_units < one.most_units
    assert plan.bytes_in / 2 <= six.bytes_in < one.bytes_in
    assert spread(plan, 1, threads=8).worker_memory > one.worker_memory


def test_more_workers_than_units_leave_some_idle(source: Any) -> None:
    _, plan = source.plan("int8.yaml")
    found = spread(plan, 64)
    assert (found.num_units, found.most_units, found.bytes_in, found.balance) == (1, 1, plan.bytes_in, 64.0)
