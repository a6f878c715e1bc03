"""Checkpoints as other software writes them once it has quantized them: by NumPy and `struct` alone.

Each form is written from the same float weights, beside what its codes and scales stand for.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]
Write = Callable[[str, Array], tuple[Tensors, Array]]
"""A module's name and float32 weight → its tensors on disk, and the float32 weight that these stand for."""

E4M3, BF16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
DISK = {
    "BF16": BF16,
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
    "F8_E4M3": E4M3,
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
TOKEN = {"strategy": "token", "dynamic": True, "symmetric": True, "num_bits": 8}


def read_file(path: Path) -> Tensors:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[first:last], DISK[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_file(path: Path, tensors: Mapping[str, Array]) -> None:
    names = {dtype: name for name, dtype in DISK.items()}
    header, parts, end = {}, [], 0
    for name, array in tensors.items():
        header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        parts.append(array.tobytes())
        end += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def _codes(weight: Array, scale: Array, kind: str) -> Array:
    if kind == "int":
        return np.clip(np.rint(weight / scale), -128, 127).astype(np.int8)
    return np.clip(weight / scale, -448, 448).astype(E4M3)


def _scales(weight: Array, strategy: str, kind: str) -> Array:
    """[out, 1] or [1, 1], a little too small, as those that clip a few values for the sake of the others are."""
    peak = np.abs(weight).max(axis=1 if strategy == "channel" else None, keepdims=True)
    return np.asarray(peak / (132.0 if kind == "int" else 460.0), np.float32)


def rows(kind: str, strategy: str = "channel", dtype: Any = np.float32, shape: tuple[int, ...] = (-1, 1)) -> Write:
    """`int-quantized` or `float-quantized` with a scale for each output channel, or one for all."""

    def write(module: str, weight: Array) -> tuple[Tensors, Array]:
        scale = _scales(weight, strategy, kind).astype(dtype)
        wide = scale.astype(np.float32)
        codes = _codes(weight, wide, kind)
        tensors = {f"{module}.weight": codes, f"{module}.weight_scale": scale.reshape(shape)}
        return tensors, codes.astype(np.float32) * wide

    return write


def packed(strategy: str = "channel") -> Write:
    """`pack-quantized`: q + 128, four to an int32, the first in the lowest byte."""

    def write(module: str, weight: Array) -> tuple[Tensors, Array]:
        scale = _scales(weight, strategy, "int")
        codes = _codes(weight, scale, "int")
        words = np.zeros((len(codes), codes.shape[1] // 4), np.uint32)
        for place in range(4):
            words |= (codes[:, place::4].astype(np.int64) + 128).astype(np.uint32) << np.uint32(8 * place)
        tensors = {
            f"{module}.weight_packed": words.view(np.int32),
            f"{module}.weight_scale": scale,
            f"{module}.weight_shape": np.array(weight.shape, np.int64),
        }
        return tensors, codes.astype(np.float32) * scale

    return write


def blocks(size: tuple[int, int], label: str) -> Write:
    """float8 with a scale a block, under `X.<label>`."""

    def write(module: str, weight: Array) -> tuple[Tensors, Array]:
        out, width = weight.shape
        scale = np.empty((-(-out // size[0]), -(-width // size[1])), np.float32)
        codes, value = np.empty(weight.shape, E4M3), np.empty(weight.shape, np.float32)
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                at = np.s_[row * size[0] : (row + 1) * size[0], column * size[1] : (column + 1) * size[1]]
                scale[row, column] = np.abs(weight[at]).max() / 448
                codes[at] = _codes(weight[at], scale[row, column], "float")
                value[at] = codes[at].astype(np.float32) * scale[row, column]
        return {f"{module}.weight": codes, f"{module}.{label}": scale}, value

    return write


def group(
    kind: str, strategy: str | None = "channel", activations: Mapping[str, Any] | None = None, **more: Any
) -> Any:
    """One group of compressed-tensors."""
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **more}
    return {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}


def compressed(form: str, **groups: Any) -> dict[str, Any]:
    """The section of compressed-tensors."""
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": groups}


def inverse(size: tuple[int, int]) -> dict[str, Any]:
    """The section that DeepSeek's checkpoints have."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(size)}


_KEPT = (".gate.weight", ".eh_proj.weight", ".shared_head.head.weight", ".embed_tokens.weight")


def is_linear(name: str, array: Array) -> bool:
    """Whether a tensor is one that these tools quantize."""
    return array.ndim == 2 and "layers" in name and not name.endswith(_KEPT)


def with_next_token_layer(golden: Path, place: Path) -> Path:
    """A golden of DeepSeek with a layer more, which predicts a further token, as DeepSeek-V3 is published."""
    tensors = read_file(golden / "model.safetensors")
    last = json.loads((golden / "config.json").read_text())["num_hidden_layers"]
    prefix, width = f"model.layers.{last}.", len(tensors["model.norm.weight"])
    for name, array in list(tensors.items()):
        if f"layers.{last - 1}." in name:
            tensors[name.replace(f".{last - 1}.", f".{last}.", 1)] = array
    tensors |= {f"{prefix}{name}.weight": np.ones(width, BF16) for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors[f"{prefix}eh_proj.weight"] = np.ones((width, 2 * width), BF16)
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"]
    shutil.copytree(golden, place)
    write_file(place / "model.safetensors", tensors)
    return place


def write_pair(golden: Path, place: Path, section: Mapping[str, Any], write: Write) -> tuple[Path, Path]:
    """A golden in a form, and the plain float32 checkpoint of what it then stands for."""
    config = json.loads((golden / "config.json").read_text())
    quantized: Tensors = {}
    plain: Tensors = {}
    for name, array in read_file(golden / "model.safetensors").items():
        plain[name] = array.astype(np.float32)
        if is_linear(name, array):
            tensors, plain[name] = write(name.removesuffix(".weight"), plain[name])
            quantized |= tensors
        else:
            quantized[name] = array
    for folder, tensors, more in (
        ("quantized", quantized, {"quantization_config": section}),
        ("plain", plain, {"dtype": "float32"}),
    ):
        shutil.rmtree(place / folder, ignore_errors=True)
        (place / folder).mkdir(parents=True)
        write_file(place / folder / "model.safetensors", tensors)
        (place / folder / "config.json").write_text(json.dumps({**config, **more}))
    return place / "quantized", place / "plain"
