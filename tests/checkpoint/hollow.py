"""Checkpoints of any size that take no room: headers of every tensor that config.json implies, and files of holes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from podquant.families.declaration import declare
from podquant.families.registry import read_model_config


def write_hollow(folder: Path, config: dict[str, Any]) -> Path:
    """A bfloat16 checkpoint of one file, whose bytes all read as zeros and are not stored."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in declare(read_model_config(config, ())).tensors.items():
        begin, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder
