"""Checkpoints whose experts are fused, as transformers 5 has them in memory: made from one that has them one by one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np

from tests.weights.quantized_checkpoints import Array, Tensors, read_file, write_file

_EXPERT = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)\.weight")
_USUAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def fuse(tensors: Tensors) -> Tensors:
    """The same with `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F] for each layer, below `mlp.experts`."""
    fused: Tensors = {}
    experts: dict[str, dict[str, list[Array]]] = {}
    for name, array in tensors.items():
        if match := _EXPERT.fullmatch(name):
            experts.setdefault(match[1], {}).setdefault(_USUAL.get(match[2], match[2]), []).append(array)
        else:
            fused[name.replace(".block_sparse_moe.", ".mlp.")] = array
    for layer, found in experts.items():
        gate, up, down = (np.stack(found[name]) for name in ("gate_proj", "up_proj", "down_proj"))
        fused[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{layer}.mlp.experts.down_proj"] = down
    return fused


def fused_copy(golden: Path, place: Path) -> Path:
    """A checkpoint in one file, at `place`, with its experts fused."""
    shutil.copytree(golden, place)
    write_file(place / "model.safetensors", fuse(read_file(golden / "model.safetensors")))
    return place
