"""Conversions at any tensor-parallel size hold the same bytes, only cut: merged, they are those at tp_size 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from podquant.artifact.merge import merge_artifact
from podquant.artifact.reader import Artifact
from podquant.artifact.verify import verify_artifact
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.errors import ArtifactError, StorageError

MIXED = """
quantization:
  weight_block_size: [5, 7]
  moe:
    weight_dtype: int8
  dense:
    rules:
      - module_path: '.*lm_head'
        weight_dtype: null
      - module_path: '.*mlp'
        weight_dtype: float8_e4m3fn
        weight_block_size: [20, 24]
      - module_path: '.*(o_proj|odd)'
        weight_dtype: float8_e4m3fn
        weight_block_size: null
      - module_path: '.*'
        weight_dtype: int8
        activation_dtype: int8
        weight_block_size: [8, 128]
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def odd_tensors() -> dict[str, np.ndarray[Any, Any]]:
    """Shapes that no size divides, fewer rows than ranks, experts and their router, and a stack left as it is."""
    random = np.random.default_rng(3)
    shapes = {
        "odd.weight": (37, 11),
        "odd.o_proj.weight": (7, 13),
        "one.weight": (1, 5),
        "one.down_proj.weight": (5, 1),
        "a.mlp.experts.0.up_proj.weight": (13, 9),
        "a.mlp.experts.0.down_proj.weight": (9, 13),
        "a.mlp.gate.weight": (4, 9),
        "stack.conv.bias": (2, 3, 4),
    }
    return {
        name: random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("rules", ["int8.yaml", MIXED])
@pytest.mark.parametrize("tp_size", [2, 3, 4, 8])
def test_merged_slices_are_the_artifact_of_one(
    make_source: Callable[..., Any], tmp_path: Path, rules: str, tp_size: int
) -> None:
    source = make_source(odd_tensors())
    for size, name in ((1, "whole"), (tp_size, "cut")):
        checkpoint, plan = source.plan(rules, tp_size=size, unit_bytes=15_000)
        assert len(plan.units) > 3
        convert(checkpoint, plan, str(tmp_path / name), threads=2, window_bytes=900)
        assert verify_artifact(str(tmp_path / name)) == []
    assert "model.safetensors.index.json" not in contents(tmp_path / "cut")
    manifest = merge_artifact(str(tmp_path / "cut"), str(tmp_path / "merged"))
    assert manifest.tp_size == 1
    assert contents(tmp_path / "merged") == contents(tmp_path / "whole")
    whole, cut = (Artifact.open(str(tmp_path / name)) for name in ("whole", "cut"))
    for name, tensor in whole.tensors.items():
        assert cut.read_tensor(name).tobytes() == whole.read_tensor(name).tobytes()
        assert cut.tensors[name].shape == tensor.shape


@pytest.mark.parametrize("rules", ["int8.yaml", MIXED])
def test_the_bytes_of_a_slice_do_not_depend_on_the_work(
    make_source: Callable[..., Any], tmp_path: Path, rules: str
) -> None:
    source = make_source(odd_tensors())
    results = []
    for number, (threads, window_bytes) in enumerate([(1, 1), (3, 777), (2, 1 << 24)]):
        checkpoint, plan = source.plan(rules, tp_size=4, unit_bytes=15_000)
        counts: list[int] = []
        place = tmp_path / f"place-{number}"
        convert(checkpoint, plan, str(place), threads=threads, window_bytes=window_bytes, on_progress=counts.append)
        assert sum(counts) == plan.bytes_in  # each source byte is read once, whatever the ranks
        results.append(contents(place))
    assert all(result == results[0] for result in results)


def test_the_slices_of_a_rank_are_its_own_and_the_rest_lies_once(
    source: Any, tensors: dict[str, Any], read_file: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    """Read without podquant."""
    checkpoint, plan = source.plan("int8_keep_embedding.yaml", tp_size=2)
    convert(checkpoint, plan, str(tmp_path / "out"), threads=2, window_bytes=500)
    (file,) = (unit.file for unit in plan.units)
    ranks = [read_file(tmp_path / f"out/tp-{rank:02d}-of-02" / file) for rank in range(2)]
    shared = read_file(tmp_path / "out/shared" / file)
    scale = "model.layers.0.mlp.{}.weight_scale"
    assert scale.format("down_proj") in shared
    assert scale.format("up_proj") in ranks[0]
    np.testing.assert_array_equal(
        np.concatenate([rank["lm_head.weight"] for rank in ranks]).view(np.uint8),
        tensors["lm_head.weight"].view(np.uint8),
    )
    down = "model.layers.0.mlp.down_proj.weight"
    codes = np.concatenate([rank[down] for rank in ranks], axis=1)
    restored = codes * shared[scale.format("down_proj")]
    assert np.abs(restored - tensors[down].astype(np.float32)).max() <= shared[scale.format("down_proj")].max() / 1.99
    assert not set(shared) & set(ranks[0])
    assert {**shared, **ranks[0]}.keys() == {output.name for unit in plan.units for output in unit.outputs}


@pytest.mark.parametrize("name", ["shared/{}", "tp-01-of-02/{}", "tokenizer.json"])
def test_a_changed_byte_is_not_merged(source: Any, tmp_path: Path, name: str) -> None:
    checkpoint, plan = source.plan("int8.yaml", tp_size=2)
    convert(checkpoint, plan, str(tmp_path / "cut"), threads=1)
    name = name.format(plan.units[0].file)
    data = bytearray((tmp_path / "cut" / name).read_bytes())
    data[-3] ^= 4
    (tmp_path / "cut" / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=f"cut: {name}: expected CRC32C .* the content has changed"):
        merge_artifact(str(tmp_path / "cut"), str(tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "source"]


def test_a_place_that_is_taken_is_not_merged_into(source: Any, tmp_path: Path) -> None:
    checkpoint, plan = source.plan("int8.yaml", tp_size=2)
    convert(checkpoint, plan, str(tmp_path / "cut"), threads=1)
    before = contents(tmp_path / "cut")
    with pytest.raises(StorageError, match="cut: already exists"):
        merge_artifact(str(tmp_path / "cut"), str(tmp_path / "cut"))
    assert contents(tmp_path / "cut") == before


def test_merging_holds_a_window_whatever_the_tensor(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """A tensor of 64 MB cut along its input, in windows of 4 MB."""
    source = make_source({"big.down_proj.weight": np.ones((8000, 8000), np.float16)}, files=1)
    checkpoint, plan = source.plan("int8.yaml", tp_size=4)
    convert(checkpoint, plan, str(tmp_path / "cut"), threads=2)
    watched: list[int] = []

    def resident(count: int) -> None:
        watched.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

    merge_artifact(str(tmp_path / "cut"), str(tmp_path / "merged"), resident)
    assert len(watched) > 50
    assert max(watched) - min(watched) < 24 << 20
    assert json.loads((tmp_path / "merged/podquant.json").read_text())["tp_size"] == 1


def test_slices_are_cut_as_the_family_computes(tmp_path: Path) -> None:
    """First-generation Qwen: `mlp.w2`, its gate, goes along its output, and only `c_proj` along its input."""
    checkpoint = Checkpoint.open(str(Path(__file__).parents[1] / "data/goldens/qwen1"))
    rules = load_quantization_config("int8.yaml")
    plan = plan_conversion(checkpoint, rules, source_name="golden", tp_size=2)
    checkpoint.close()
    cuts = {output.name: output.cut for unit in plan.units for output in unit.outputs}
    axes = {name: cuts[f"transformer.h.1.{name}.weight"] for name in ("mlp.w1", "mlp.w2", "mlp.c_proj", "attn.c_proj")}
    assert {name: cut and cut.axis for name, cut in axes.items()} == {
        "mlp.w1": 0,
        "mlp.w2": 0,
        "mlp.c_proj": 1,
        "attn.c_proj": 1,
    }
