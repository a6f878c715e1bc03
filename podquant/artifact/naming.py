"""The names of an artifact's files and tensors. Knows nothing of their content."""

from __future__ import annotations

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "podquant.json"
QUALITY = "quality.json"

HEADER_METADATA = {"format": "pt"}
"""In every safetensors header of an artifact; other software that loads checkpoints expects it."""


def weights_file(number: int, count: int) -> str:
    """Name of the `number`-th (from 1) of `count` files of tensors, as Hugging Face counts them."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def folder_of(rank: int | None, tp_size: int) -> str:
    """The folder of a rank's slices (None: of what is not cut), to prefix a file's name; empty at tp_size 1."""
    if tp_size == 1:
        return ""
    return "shared/" if rank is None else f"tp-{rank:02d}-of-{tp_size:02d}/"


def weight_of(module: str) -> str:
    """Name of the tensor that holds a module's weight or, quantized, its codes."""
    return f"{module}.weight"


def scales_of(module: str) -> str:
    """Name of the tensor that holds the scales of a quantized module."""
    return f"{module}.weight_scale"


def module_of(tensor: str) -> str | None:
    """The module whose weight a tensor is; None when the tensor is not a weight."""
    module, dot, leaf = tensor.rpartition(".")
    return module if dot and leaf == "weight" else None


def is_safe(name: str) -> bool:
    """Whether a file name read from a manifest stays inside the artifact's directory."""
    parts = name.split("/")
    return "\\" not in name and "\0" not in name and all(part not in ("", ".", "..") for part in parts)
