"""The plan: pure, deterministic, complete before a weight is read."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.checkpoint.header import TensorInfo
from podquant.config.scheme import Scheme
from podquant.conversion.memory import CLIENT_BYTES, windows_in_flight
from podquant.conversion.units import TensorPlan
from podquant.dtypes import BY_NAME
from podquant.errors import ConfigError, UnsupportedModelError
from podquant.storage.gcs.chunks import uploads_nbytes

BLOCKS = """
quantization:
  dense:
    rules:
      - module_path: '.*'
        weight_dtype: int8
        weight_block_size: [16, 8]
"""


def tensor(shape: tuple[int, ...], scheme: Scheme | None = None) -> TensorPlan:
    return TensorPlan(TensorInfo("t", BY_NAME["bfloat16"], shape, "f", 0, 2 * math.prod(shape)), scheme, ())


def test_the_same_checkpoint_gives_the_same_plan(source: Any) -> None:
    first, second = source.plan("int8.yaml")[1], source.plan("int8.yaml")[1]
    assert first == second


def test_units_are_runs_of_whole_tensors_in_source_order(source: Any) -> None:
    checkpoint, whole = source.plan("int8.yaml")
    assert [unit.file for unit in whole.units] == ["model-00001-of-00001.safetensors"]
    _, plan = source.plan("int8.yaml", unit_bytes=10_000)
    names = [tensor.source.name for unit in plan.units for tensor in unit.tensors]
    assert names == list(checkpoint.tensors)
    assert [unit.file for unit in plan.units] == [
        f"model-{number:05d}-of-{len(plan.units):05d}.safetensors" for number in range(1, len(plan.units) + 1)
    ]
    for unit, following in zip(plan.units, plan.units[1:], strict=False):
        assert unit.bytes_in <= 10_000 or len(unit.tensors) == 1
        assert unit.bytes_in + following.tensors[0].source.nbytes > 10_000
    assert plan.bytes_in == sum(info.nbytes for info in checkpoint.tensors.values())


@pytest.mark.parametrize("window_bytes", [1, 100, 640, 4096, 1 << 20])
@pytest.mark.parametrize(
    ("shape", "scheme", "step"),
    [
        ((37, 10), Scheme("int8"), 1),
        ((37, 10), Scheme("int8", None, (16, 4)), 16),
        ((37,), None, 1),
        ((3, 4, 5), None, 1),
    ],
)
def test_windows_cover_a_tensor_in_whole_rows_of_blocks(
    window_bytes: int, shape: tuple[int, ...], scheme: Scheme | None, step: int
) -> None:
    planned = tensor(shape, scheme)
    windows = list(planned.windows(window_bytes))
    assert [row for start, stop in windows for row in range(start, stop)] == list(range(shape[0]))
    row_bytes = 2 * math.prod(shape[1:])
    for start, stop in windows:
        assert start % step == 0
        assert (stop - start) * row_bytes <= max(window_bytes, step * row_bytes)
        assert (stop - start) * row_bytes <= planned.window_nbytes(window_bytes)


def test_tensors_without_rows_have_their_window() -> None:
    assert list(tensor(()).windows(1)) == [(0, 1)]
    assert list(tensor((0, 4)).windows(1)) == []
    assert tensor((0, 4)).window_nbytes(1) == 0


def test_peak_memory_does_not_grow_with_the_tensor(source: Any, make_source: Callable[..., Any]) -> None:
    _, small = source.plan("int8.yaml")
    _, large = make_source({"model.embed_tokens.weight": np.zeros((9600, 32), np.float16)}).plan("int8.yaml")
    window, in_flight = 64 * 32, windows_in_flight(3)
    held = 9600 * (64 + 2 * 4)
    assert large.peak_memory(3, window) <= in_flight * window * 3 // 2 + held + uploads_nbytes(1) + CLIENT_BYTES
    assert small.peak_memory(3, window) <= large.peak_memory(3, window)


def test_the_largest_units_are_begun_first(source: Any) -> None:
    _, plan = source.plan("int8.yaml", unit_bytes=10_000)
    sizes = [unit.bytes_in for unit in plan.queue]
    assert sizes == sorted(sizes, reverse=True) != [unit.bytes_in for unit in plan.units]
    assert set(plan.queue) == set(plan.units)


def test_every_module_has_its_decision(source: Any) -> None:
    _, plan = source.plan(BLOCKS)
    assert plan.modules["lm_head"].scheme == Scheme("int8", None, (16, 8))
    assert plan.modules["lm_head"].rule == 'rules.yaml:5 ".*" (dotted)'
    outputs = {output.name: output for unit in plan.units for output in unit.outputs}
    assert outputs["model.layers.0.mlp.up_proj.weight_scale"].shape == (5, 4)
    assert outputs["model.layers.0.mlp.down_proj.weight_scale"].shape == (2, 10)
    assert outputs["model.norm.weight"].dtype.disk == "BF16"


def test_rules_that_decide_nothing(source: Any) -> None:
    _, plan = source.plan(BLOCKS.replace("'.*'", "'model.layers.7.*'"))
    assert [unmatched.rule for unmatched in plan.unmatched] == ['rules.yaml:5 "model.layers.7.*"']
    with pytest.raises(ConfigError, match=r"model.layers.7.* matches no module .* run without --strict-rules"):
        plan.refuse_unmatched()
    assert "quantization_config" not in plan.config
    source.plan("int8.yaml")[1].refuse_unmatched()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra.weight": np.ones((2, 4, 8), np.float32)}, r"extra.weight: has the shape \[2, 4, 8\]; only matrices"),
        (
            {"a.mlp.experts.up_proj": np.ones((2, 4, 8), np.float32)},
            r"experts.up_proj: has the shape \[2, 4, 8\]; only",
        ),
        ({"extra.weight": np.ones((0, 8), np.float32)}, r"extra.weight: has the shape \[0, 8\]; only matrices"),
    ],
)
def test_what_cannot_be_quantized_is_named_with_its_rule(
    make_source: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        make_source(changes).plan("int8.yaml")


def test_fused_experts_may_be_kept(make_source: Callable[..., Any]) -> None:
    source = make_source({"a.mlp.experts.up_proj": np.ones((2, 4, 8), np.float32)})
    _, plan = source.plan(BLOCKS)
    assert "a.mlp.experts.up_proj" in {output.name for unit in plan.units for output in unit.outputs}
    assert "a.mlp.experts.up_proj" not in plan.modules


def test_rules_for_a_quantized_checkpoint_do_not_fit(source: Any) -> None:
    with pytest.raises(ConfigError, match=r"rules.yaml: is_static_checkpoint says .* is not"):
        source.plan(BLOCKS.replace("  dense:", "  is_static_checkpoint: true\n  dense:"))


def test_the_source_is_named_without_its_place(source: Any, tmp_path: Path) -> None:
    _, plan = source.plan("int8.yaml")
    assert plan.source.name == "source"
    assert str(tmp_path) not in repr(plan.source)
    assert plan.copied == {"tokenizer.json": 9}


def test_every_weight_is_cut_and_the_rest_is_stored_once(source: Any) -> None:
    _, plan = source.plan("int8_keep_embedding.yaml", tp_size=4, unit_bytes=20_000)
    assert len(plan.units) > 2
    for unit in plan.units:
        assert all(name.endswith(f"/{unit.file}") for name in unit.files)
    held: dict[str, list[str]] = {}
    for unit in plan.units:
        for name, entries in unit.files.items():
            held.setdefault(name.partition("/")[0], []).extend(entry[0] for entry in entries)
    ranks = [held.pop(f"tp-{rank:02d}-of-04") for rank in range(4)]
    assert ranks == [ranks[0]] * 4
    assert "model.embed_tokens.weight" in ranks[0]
    assert "model.layers.0.self_attn.o_proj.weight" in ranks[0]
    assert "model.layers.0.self_attn.q_proj.weight_scale" in ranks[0]
    assert set(held) == {"shared"}
    assert not set(held["shared"]) & set(ranks[0])
    for name in ("self_attn.o_proj.weight_scale", "input_layernorm.weight", "self_attn.q_proj.bias"):
        assert f"model.layers.1.{name}" in held["shared"]


def test_a_plan_can_be_sent_to_another_process(source: Any) -> None:
    _, plan = source.plan(BLOCKS, tp_size=2)
    for unit in plan.units:
        assert pickle.loads(pickle.dumps(unit)) == unit
