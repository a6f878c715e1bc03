"""Plans and figures as people read them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from podquant.app.report import plan_lines, quality_lines, size_text
from podquant.conversion.forecast import forecast


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (3_080_000_000, "3.08 GB"), (10**16, "10000.00 TB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


def test_a_plan_tells_modules_units_and_memory(source: Any) -> None:
    _, plan = source.plan("int8_keep_embedding.yaml")
    text = "\n".join(plan_lines(plan, threads=2, window_bytes=1 << 21))
    assert "source   source: 2 files" in text
    assert "model.layers.*.mlp.up_proj       2      int8 weight-only" in text
    assert "lm_head                          1      kept" in text
    assert f"writes {size_text(plan.bytes_out)}" in text
    assert "warning" not in text
    assert "hosts" not in text


def test_a_plan_tells_what_hosts_would_do(source: Any) -> None:
    _, plan = source.plan("int8.yaml", unit_bytes=20_000)
    spread = forecast(plan, num_hosts=2, workers_per_host=3, threads=4, window_bytes=1 << 21)
    lines = plan_lines(plan, threads=4, window_bytes=1 << 21, spread=spread)
    (at,) = (number for number, line in enumerate(lines) if line.split()[:1] == ["hosts"])
    titles = re.split(" {2,}", lines[at].strip())
    assert titles[:7] == ["hosts", "workers", "units", "at most", "reads", "writes", "busiest/mean"]
    assert titles[7:] == ["memory/worker", "memory/host"]
    assert lines[at + 1].split()[:4] == ["2", "6", str(len(plan.units)), f"{spread.most_units}/worker"]
    memory = [*size_text(spread.worker_memory).split(), *size_text(3 * spread.worker_memory).split()]
    assert lines[at + 1].split()[-4:] == memory


def test_a_plan_warns(make_source: Callable[..., Any]) -> None:
    rules = "quantization:\n  dense:\n    rules:\n      - {module_path: 'model.layer.*q_prj', weight_dtype: int8}\n"
    source = make_source(tie_word_embeddings=True)
    text = "\n".join(plan_lines(source.plan(rules)[1], threads=1, window_bytes=1 << 21))
    assert "warning: rules.yaml:4" in text
    assert "note: lm_head.weight is left out: config.json ties it to model.embed_tokens.weight" in text
    assert "warning: nothing is quantized" in text


def test_quality_is_summed_up_by_kind_of_weight() -> None:
    def figures(sqnr: float | None) -> dict[str, Any]:
        return {"sqnr_db": sqnr, "max_error_ratio": 0.004, "zeros_share": 0.01, "scale_min": 1e-3, "scale_max": 2e-3}

    lines = quality_lines({"l.0.w": figures(40), "l.1.w": figures(42), "head": figures(None)})
    assert [line.split()[:4] for line in lines[1:]] == [
        ["l.*.w", "2", "41.00", "40.00"],
        ["head", "1", "exact", "exact"],
        ["all", "3", "41.00", "40.00"],
    ]
    assert quality_lines({}) == []
