"""Scale blocks that shards cut anywhere: the logits of a model are those of its weights, on any number of devices."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from podquant.config.rules import load_quantization_config
from podquant.weights.source import open_source
from tests.engine.test_goldens import GOLDENS, all_logits, load, reference
from tests.matrix import MATRIX

pytestmark = pytest.mark.slow

COLUMNS = 20
"""Of a block: 8 and 16 shards of o_proj's 64 columns, of 160 of an MLP and 48 of an expert begin and end inside."""

RULES = """
quantization:
  weight_block_size: [8, {columns}]
  dense: {{rules: [{{module_path: '.*_proj', weight_dtype: {dtype}}}]}}
  moe: {{weight_dtype: {dtype}}}
"""
CELLS = {
    ("llama", "int8"): ((1, 1), (8, 1)),
    ("qwen3_moe", "float8_e4m3fn"): ((2, 1), (8, 2)),
    ("deepseek_v3", "int8"): ((4, 1),),
}
LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2))
"""(tp, ep): on how many devices, and in how many groups experts are shared out among them."""


def dequantized(checkpoint: Path, rules: Path, target: Path) -> str:
    """A copy of a checkpoint whose weights are what codes and scales represent."""
    shutil.copytree(checkpoint, target)
    tensors = {
        name: np.asarray(array, np.float32) for name, array in load_file(checkpoint / "model.safetensors").items()
    }
    source = open_source(str(checkpoint), load_quantization_config(str(rules)))
    modules = [name.removesuffix(".weight") for name in tensors if source.quantizes(name.removesuffix(".weight"))]
    assert len(modules) > 10
    for module in modules:
        rows = tensors[f"{module}.weight"].shape[0]
        tensors[f"{module}.weight"] = source.read_quantized(module, 0, rows).dequantize()
    source.close()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return str(target)


@pytest.mark.parametrize(
    ("name", "dtype", "tp", "ep"),
    [
        pytest.param(*model, *layout, marks=() if layout in layouts else MATRIX)
        for model, layouts in CELLS.items()
        for layout in LAYOUTS
        if model[0] != "llama" or layout[1] == 1
    ],
)
def test_logits_are_those_of_the_dequantized_weights_on_any_mesh(
    tmp_path: Path, name: str, dtype: str, tp: int, ep: int
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES.format(dtype=dtype, columns=COLUMNS))
    tokens = reference(name)["input_ids"]
    plain = open_source(dequantized(GOLDENS / name, rules, tmp_path / "plain"))
    expected = all_logits(*load(plain, 1), tokens)
    source = open_source(str(GOLDENS / name), load_quantization_config(str(rules)))
    got = all_logits(*load(source, tp, ep), tokens)
    plain.close()
    source.close()
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
