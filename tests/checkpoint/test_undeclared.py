"""Quantized weights without a word in config.json, and a word without quantized weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from podquant.checkpoint.index import Checkpoint
from podquant.errors import UnsupportedModelError

U8, I8, I32 = np.zeros((8, 4), np.uint8), np.zeros((8, 8), np.int8), np.zeros((8, 2), np.int32)
U32, F32 = np.zeros((8, 2), np.uint32), np.ones((8, 8), np.float32)
M = "model.layers.0.mlp.up_proj"
E = "model.layers.0.mlp.experts.gate_up_proj"

TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("GPTQ", {f"{M}.qweight": I32, f"{M}.qzeros": I32, f"{M}.scales": F32, f"{M}.g_idx": I32}),
    "awq": ("AWQ", {f"{M}.qweight": I32, f"{M}.qzeros": I32, f"{M}.scales": F32}),
    "bnb nf4": (
        "bitsandbytes (4 bits)",
        {f"{M}.weight": U8, f"{M}.weight.absmax": F32, f"{M}.weight.quant_state.bitsandbytes__nf4": U8},
    ),
    "bnb int8": ("bitsandbytes (int8)", {f"{M}.weight": I8, f"{M}.SCB": F32, f"{M}.weight_format": U8}),
    "quanto": ("quanto", {f"{M}.weight._data": I8, f"{M}.weight._scale": F32, f"{M}.input_scale": F32}),
    "hqq": ("HQQ", {f"{M}.W_q": U8, f"{M}.scale": F32, f"{M}.zero": F32}),
    "torchao": ("torchao", {f"{M}.weight:qdata": I8, f"{M}.weight:scale": F32}),
    "torchao flat": ("torchao", {f"{M}._weight_qdata": I8, f"{M}._weight_scale": F32}),
    "mlx": ("MLX", {f"{M}.weight": U32, f"{M}.scales": F32, f"{M}.biases": F32}),
    "mxfp4": ("MXFP4", {f"{E}_blocks": U8, f"{E}_scales": U8}),
    "nvfp4": ("ModelOpt (NVFP4)", {f"{M}.weight": U8, f"{M}.weight_scale": F32, f"{M}.weight_scale_2": F32}),
    "fp8 blocks": ("DeepSeek's fp8 in blocks", {f"{M}.weight": I8, f"{M}.weight_scale_inv": F32}),
    "packed": ("compressed-tensors", {f"{M}.weight_packed": I32, f"{M}.weight_scale": F32, f"{M}.weight_shape": I32}),
    "codes and scales": ("compressed-tensors", {f"{M}.weight": I8, f"{M}.weight_scale": F32}),
    "codes alone": ("an unknown tool", {f"{M}.weight": I8}),
    "bytes alone": ("an unknown tool", {f"{M}.weight": U8}),
}


def write(place: Path, tensors: dict[str, Any], config: dict[str, Any]) -> str:
    (place / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": np.ones(8, np.float32), **tensors}, place / "model.safetensors")
    return str(place)


@pytest.mark.parametrize("case", list(TOOLS))
def test_undeclared_weights_are_refused_by_the_tools_name(tmp_path: Path, case: str) -> None:
    tool, tensors = TOOLS[case]
    with pytest.raises(UnsupportedModelError, match=re.escape(f"quantized by {tool} does, but config.json has no")):
        Checkpoint.open(write(tmp_path, tensors, {}))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("section", [{"quant_method": "awq", "bits": 4}, {"quant_method": "fp8"}, {"bits": 8}])
def test_a_section_over_plain_weights_is_left_out_and_told(tmp_path: Path, key: str, section: dict[str, Any]) -> None:
    plain = write(tmp_path, {f"{M}.weight": F32}, {"vocab_size": 3, key: section})
    opened = Checkpoint.open(plain)
    assert opened.config == {"vocab_size": 3}
    assert opened.notes == (f"{key} of config.json is left out: every weight is plain",)
    opened.close()


def test_plain_weights_are_plain(tmp_path: Path) -> None:
    """Names that only look like those of quantized weights."""
    tensors = {f"{M}.weight": F32, "layer_scale": F32, "a.scales": F32, "mask_blocks": F32, "ids": np.arange(4)}
    opened = Checkpoint.open(write(tmp_path, tensors, {}))
    assert opened.notes == ()
    opened.close()
